"""Boxes, instances and padded image batches."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.structures import *
else:
    from detectron2.structures import Boxes, BoxMode, ImageList, Instances
