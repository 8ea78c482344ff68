"""Geometric augmentations of an image."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.data.transforms import (
        AugInput,
        Augmentation,
        AugmentationList,
        RandomCrop,
        RandomFlip,
        ResizeShortestEdge,
        TransformList,
    )
else:
    from .embedded.transforms import (
        AugInput,
        Augmentation,
        AugmentationList,
        RandomCrop,
        RandomFlip,
        ResizeShortestEdge,
        TransformList,
    )

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "RandomCrop",
    "RandomFlip",
    "ResizeShortestEdge",
    "TransformList",
]
