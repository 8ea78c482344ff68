"""Boxes, instances and padded image batches."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.structures import Boxes, BoxMode, ImageList, Instances
else:
    from .embedded.structures import Boxes, BoxMode, ImageList, Instances

__all__ = [
    "Boxes",
    "BoxMode",
    "ImageList",
    "Instances",
]
