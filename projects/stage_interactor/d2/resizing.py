"""detectron2's augmentations where a side of the picture is a pixel or two: none is left without.

``ResizeShortestEdge`` gives an image of 1 x 3000 a height of 0, for which Pillow has an error, and
``RandomCrop`` cuts such a height out of it. For all other images they do and draw what detectron2's
do. The stand-in's leave a pixel themselves.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":  # where it is not used
    from .embedded import transforms as T
else:
    from detectron2.data import transforms as T


class ResizeShortestEdge(T.ResizeShortestEdge):
    def get_transform(self, image: Any) -> Any:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


class RandomCrop(T.RandomCrop):
    def get_crop_size(self, image_size: Any) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(1, height), max(1, width)


_KEEPING = {T.ResizeShortestEdge: ResizeShortestEdge, T.RandomCrop: RandomCrop}


class AugmentationList(T.AugmentationList):
    """detectron2's, in which the augmentations leave at least a pixel; configs name those of it."""

    def __init__(self, augs: Sequence[Any]):
        super().__init__([self._keeping_a_pixel(aug) for aug in augs])

    @classmethod
    def _keeping_a_pixel(cls, aug: Any) -> Any:
        if type(aug) is T.AugmentationList:
            return cls(aug.augs)
        if type(aug) in _KEEPING:
            aug = copy.copy(aug)  # whoever made it may use it elsewhere
            aug.__class__ = _KEEPING[type(aug)]
        return aug
