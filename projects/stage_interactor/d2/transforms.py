"""Geometric augmentations of an image."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.transforms import *
else:
    from detectron2.data.transforms import (
        AugInput,
        Augmentation,
        RandomCrop,
        RandomFlip,
        ResizeShortestEdge,
        ResizeTransform,
        TransformList,
    )

    from .resizing import AugmentationList
