"""Stands in for ``detectron2.data.transforms``: flip, resize, crop, and the means to combine them.

Left out: all other augmentations, boxes beside the image in ``AugInput`` (they follow by the
transform that is returned), semantic segmentation, other interpolations, and the older names of the
base classes.
With the same state of numpy's global random generator the results are those of detectron2, bit by
bit: the same numbers are drawn in the same order.
"""

import inspect
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from PIL import Image

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "RandomCrop",
    "RandomFlip",
    "ResizeShortestEdge",
    "ResizeTransform",
    "TransformList",
]


class AugInput:
    """An image, changed in place by augmentations.

    Attributes:
        image: (H, W, C), uint8 in [0, 255] or floating point.
    """

    def __init__(self, image: np.ndarray):
        self.image = image


class Augmentation:
    """A policy, often random, that looks at an image and returns the transform to apply.

    A subclass defines ``get_transform``.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        raise NotImplementedError

    def __call__(self, aug_input: AugInput) -> Transform:
        """Choose a transform, apply it to the input in place, and return it."""
        transform = self.get_transform(aug_input.image)
        if not isinstance(transform, Transform):
            name = type(self).__name__
            raise TypeError(f"{name}.get_transform returned {transform!r}, no Transform.")
        aug_input.image = transform.apply_image(aug_input.image)
        return transform

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"


class AugmentationList(Augmentation):
    """Augmentations one after the other, each seeing what the last one left."""

    def __init__(self, augs: Sequence[Augmentation]):
        self.augs = list(augs)

    def __call__(self, aug_input: AugInput) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])


class RandomFlip(Augmentation):
    """Mirror with a probability, horizontally by default.

    Raises:
        ValueError: unless exactly one of the two directions is chosen.
    """

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        if horizontal == vertical:
            raise ValueError(
                f"RandomFlip got horizontal={horizontal} and vertical={vertical}; choose one, and "
                "use two of them to do both."
            )
        self.prob = prob
        self.horizontal = horizontal
        self.vertical = vertical

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


class ResizeTransform(Transform):
    """Resize an image of (h, w) to (new_h, new_w) pixels.

    uint8 images go through Pillow, by its filter ``interp``; floating-point ones through torch,
    which has three of them.
    """

    def __init__(
        self, h: int, w: int, new_h: int, new_w: int, interp: int = Image.Resampling.BILINEAR
    ):
        super().__init__()
        self.h = h
        self.w = w
        self.new_h = new_h
        self.new_w = new_w
        self.interp = Image.Resampling(interp)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        if img.dtype == np.uint8:
            size = (self.new_w, self.new_h)
            return np.asarray(Image.fromarray(img).resize(size, self.interp))
        mode = {0: "nearest", 2: "bilinear", 3: "bicubic"}[self.interp.value]
        corners = None if mode == "nearest" else False
        batch = torch.from_numpy(np.ascontiguousarray(img)).permute(2, 0, 1)[None]
        batch = F.interpolate(batch, (self.new_h, self.new_w), mode=mode, align_corners=corners)
        return batch[0].permute(1, 2, 0).numpy()

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        coords[:, 0] = coords[:, 0] * (self.new_w * 1.0 / self.w)
        coords[:, 1] = coords[:, 1] * (self.new_h * 1.0 / self.h)
        return coords


class ResizeShortestEdge(Augmentation):
    """Resize so that the shorter edge has a random length, keeping the aspect ratio.

    Args:
        short_edge_length: in pixels; (min, max) for ``"range"``, a list for ``"choice"``, or one
            number.
        max_size: limit on the longer edge in pixels; it wins over ``short_edge_length``.
        sample_style: ``"range"`` or ``"choice"``.
        interp: filter of Pillow's, a number.

    Raises:
        ValueError: for another ``sample_style``, or a range that is not two numbers.
    """

    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = Image.Resampling.BILINEAR,
    ):
        if sample_style not in ("range", "choice"):
            raise ValueError(f"sample_style is {sample_style!r}; it must be 'range' or 'choice'.")
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        if sample_style == "range" and len(short_edge_length) != 2:
            raise ValueError(
                f"short_edge_length is {short_edge_length}; with sample_style='range' it must be "
                "(min, max)."
            )
        self.short_edge_length = short_edge_length
        self.max_size = max_size
        self.sample_style = sample_style
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if self.sample_style == "range":
            shortest, longest = self.short_edge_length
            size = np.random.randint(shortest, longest + 1)
        else:
            size = np.random.choice(self.short_edge_length)
        if size == 0:
            return NoOpTransform()
        new_height, new_width = self.get_output_shape(height, width, size, self.max_size)
        return ResizeTransform(height, width, new_height, new_width, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """The size (height, width) in pixels that an image of (oldh, oldw) gets.

        At least 1 x 1, which is beyond detectron2's: it has no size for an image of 1 x 3000.
        """
        # The order of the operations decides how the last pixel is rounded: keep it.
        size = short_edge_length * 1.0
        scale = size / min(oldh, oldw)
        height, width = (size, scale * oldw) if oldh < oldw else (scale * oldh, size)
        if max(height, width) > max_size:
            scale = max_size * 1.0 / max(height, width)
            height, width = height * scale, width * scale
        return max(1, int(height + 0.5)), max(1, int(width + 0.5))


class RandomCrop(Augmentation):
    """Cut out a random rectangle.

    Args:
        crop_type: what ``crop_size`` means:
            ``"relative"``: the shares (of height, of width), each in (0, 1];
            ``"relative_range"``: the lower bounds of these shares, the upper bound being 1;
            ``"absolute"``: (height, width) in pixels, at most the image's;
            ``"absolute_range"``: (min, max) in pixels for both height and width.

    Raises:
        ValueError: for another ``crop_type``, or an absolute range whose ends are exchanged.
    """

    def __init__(self, crop_type: str, crop_size: Sequence[float]):
        types = ("relative", "relative_range", "absolute", "absolute_range")
        if crop_type not in types:
            raise ValueError(f"crop_type is {crop_type!r}; it must be one of {types}.")
        if crop_type == "absolute_range" and crop_size[0] > crop_size[1]:
            raise ValueError(f"crop_size is {crop_size}; for an absolute range give (min, max).")
        self.crop_type = crop_type
        self.crop_size = crop_size

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        crop_height, crop_width = self.get_crop_size((height, width))
        top = np.random.randint(height - crop_height + 1)
        left = np.random.randint(width - crop_width + 1)
        return CropTransform(left, top, crop_width, crop_height)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Draw the (height, width) in pixels to cut from an image of (height, width).

        Of relative sizes at least 1 x 1, which is beyond detectron2's.
        """
        height, width = image_size
        first, second = self.crop_size
        if self.crop_type == "absolute":
            return min(int(first), height), min(int(second), width)
        if self.crop_type == "absolute_range":
            low, high = int(first), int(second)
            crop_height = np.random.randint(min(height, low), min(height, high) + 1)
            crop_width = np.random.randint(min(width, low), min(width, high) + 1)
            return crop_height, crop_width
        if self.crop_type == "relative_range":
            lowest = np.asarray(self.crop_size, dtype=np.float32)
            first, second = lowest + np.random.rand(2) * (1 - lowest)
        return max(1, int(height * first + 0.5)), max(1, int(width * second + 0.5))
