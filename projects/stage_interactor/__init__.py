"""StageInteractor: a query-based object detector with cross-stage interaction (ICCV 2023)."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Detector":  # imported when it is asked for: it brings all the rest along
        from .predictor import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
