"""Saving, finding and loading checkpoints."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.checkpoint import *
else:
    from detectron2.checkpoint import DetectionCheckpointer
