"""Saving, finding and loading checkpoints."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
else:
    from .embedded.checkpoint import DetectionCheckpointer, PeriodicCheckpointer

__all__ = [
    "DetectionCheckpointer",
    "PeriodicCheckpointer",
]
