"""Geometric augmentations of an image together with its boxes."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.data.transforms import (
        AugInput,
        Augmentation,
        AugmentationList,
        CropTransform,
        HFlipTransform,
        NoOpTransform,
        RandomCrop,
        RandomFlip,
        ResizeShortestEdge,
        ResizeTransform,
        TransformList,
    )
else:
    from .embedded.transforms import (
        AugInput,
        Augmentation,
        AugmentationList,
        CropTransform,
        HFlipTransform,
        NoOpTransform,
        RandomCrop,
        RandomFlip,
        ResizeShortestEdge,
        ResizeTransform,
        TransformList,
    )

__all__ = [
    "Augmentation",
    "AugInput",
    "AugmentationList",
    "CropTransform",
    "HFlipTransform",
    "NoOpTransform",
    "RandomCrop",
    "RandomFlip",
    "ResizeShortestEdge",
    "ResizeTransform",
    "TransformList",
]
