"""Pictures decoded and resized several times as fast, with nearly the same pixels.

Sizes, random numbers and boxes are those of the exact way. What differs are grey values: torch's
filter rounds weights to 16 bits and Pillow's to 22, which is one grey value in a few of ten
thousand; and a JPEG that is much larger than it is to be is decoded to a half, a quarter or an
eighth, where each value is the mean of its pixels as the file's own cosines give it.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    Transform,
    VFlipTransform,
)
from PIL import Image
from torch import Tensor

from ..d2 import transforms as T
from ..d2.transforms import ResizeTransform

# By how much a picture is larger than its resized form, at least, when it is decoded: what is then
# left to be averaged evens out what the decoder's means differ by.
_LARGER = 1.5
_KNOWN = (T.RandomFlip, T.RandomCrop, T.ResizeShortestEdge)


def not_plannable(augmentation: T.AugmentationList) -> list[str]:
    """Of augmentations those that may look at more of a picture than its size, or resize with
    another filter."""
    return [
        type(aug).__name__
        for aug in augmentation.augs
        if not isinstance(aug, _KNOWN)
        or getattr(aug, "interp", Image.Resampling.BILINEAR) != Image.Resampling.BILINEAR
    ]


class Reduced:
    """A picture on its way from a file to a model.

    Args:
        augmentation: of which :func:`not_plannable` is empty.

    Attributes:
        size: (height, width) of the picture, where it is decoded to a fraction; else None.
    """

    def __init__(self, augmentation: T.AugmentationList):
        self._augmentation = augmentation
        self._planned: list[Transform] | None = None
        self.size: tuple[int, int] | None = None

    def least_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that a picture of this one may be decoded to in place of it."""
        self.size = size
        self._planned = self._plan(size)
        transform = next(iter(_resize_first(self._planned)), None)
        if isinstance(transform, ResizeTransform):
            return math.ceil(_LARGER * transform.new_h), math.ceil(_LARGER * transform.new_w)
        return size

    def transformed(self, pixels: np.ndarray) -> tuple[T.TransformList, Tensor]:
        """What was done to a picture of its own size, and the result, (3, H, W), made of the
        decoded pixels (H, W, 3)."""
        decoded = pixels.shape[0], pixels.shape[1]
        size = self.size or decoded
        if self._planned is None:
            self._planned = self._plan(size)
        fraction = next(
            n for n in (1, 2, 4, 8) if all(-(-own // n) == now for own, now in zip(size, decoded))
        )
        # The last row and column stand for the rest that is no whole block.
        size = size[0] / fraction, size[1] / fraction
        image: Any = torch.from_numpy(pixels).permute(2, 0, 1)
        for transform in _resize_first(self._planned):
            if isinstance(transform, HFlipTransform):
                image = image.flip(2)
            elif isinstance(transform, VFlipTransform):
                image = image.flip(1)
            elif isinstance(transform, CropTransform):
                rows = slice(transform.y0, transform.y0 + transform.h)
                image = image[:, rows, transform.x0 : transform.x0 + transform.w]
            elif isinstance(transform, ResizeTransform):
                image = _resized(image, size, (transform.new_h, transform.new_w))
            elif not isinstance(transform, NoOpTransform):
                raise TypeError(f"{type(transform).__name__} is no flip, crop or resize")
            size = image.shape[1:]
        return T.TransformList(self._planned), image.contiguous()

    def _plan(self, size: tuple[int, int]) -> list[Transform]:
        planned = []
        for aug in self._augmentation.augs:
            # A picture of that size that takes a byte.
            transform = aug.get_transform(np.broadcast_to(np.uint8(0), (*size, 3)))
            planned.append(transform)
            if isinstance(transform, ResizeTransform):
                size = transform.new_h, transform.new_w
            elif isinstance(transform, CropTransform):
                size = transform.h, transform.w
        return planned


def _resize_first(transforms: list[Transform]) -> list[Transform]:
    """The same for pixels: a resize comes before the flips that it follows, such that what is
    decoded to a fraction ends on the right and below with what is no whole block."""
    for index, transform in enumerate(transforms):
        if isinstance(transform, ResizeTransform):
            flips = [_flip_after(flip, transform) for flip in transforms[:index]]
            return [transform, *flips, *transforms[index + 1 :]]
        if isinstance(transform, CropTransform):
            break
    return transforms


def _flip_after(flip: Transform, resize: ResizeTransform) -> Transform:
    if isinstance(flip, HFlipTransform):
        return HFlipTransform(resize.new_w)
    return VFlipTransform(resize.new_h) if isinstance(flip, VFlipTransform) else flip


def _resized(image: Tensor, extent: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """(3, *size) of what lies in the first ``extent``, (height, width), of an image."""
    if tuple(image.shape[1:]) == extent:
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    # Never a row or a column less by rounding.
    factors = [(1 + 1e-12) * new / old for old, new in zip(extent, size)]
    larger = F.interpolate(image[None], scale_factor=factors, mode="bilinear", antialias=True)[0]
    return larger[:, : size[0], : size[1]]
