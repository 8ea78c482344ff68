"""Using a trained detector: loading, predicting, exporting.

What is named here is imported when it is asked for: preparing a model takes PyTorch alone, and
using a detector nothing of what writes exported files.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blueprint import Blueprint, load_model
    from .detector import Detections, Detector
    from .export import export_checkpoint
    from .predict import predict_files
    from .prepare import DTYPES, prepare_for_inference
    from .results import Results
    from .weights import CheckpointError, load_weights, read_checkpoint

__all__ = [
    "Blueprint",
    "CheckpointError",
    "DTYPES",
    "Detections",
    "Detector",
    "Results",
    "export_checkpoint",
    "load_model",
    "load_weights",
    "predict_files",
    "prepare_for_inference",
    "read_checkpoint",
]
_PLACES = {
    "blueprint": ("Blueprint", "load_model"),
    "detector": ("Detections", "Detector"),
    "export": ("export_checkpoint",),
    "predict": ("predict_files",),
    "prepare": ("DTYPES", "prepare_for_inference"),
    "results": ("Results",),
    "weights": ("CheckpointError", "load_weights", "read_checkpoint"),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
