"""Saving, finding and loading checkpoints."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.checkpoint import DetectionCheckpointer
else:
    from .embedded.checkpoint import DetectionCheckpointer

__all__ = [
    "DetectionCheckpointer",
]
