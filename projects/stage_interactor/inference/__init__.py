"""Using a trained detector: loading, predicting, exporting.

The detector is :class:`stage_interactor.Detector`. Nothing else is imported here: preparing a model
takes PyTorch alone, and using a detector nothing of what writes exported files.
"""

from .prepare import DTYPES, prepare_for_inference

__all__ = ["DTYPES", "prepare_for_inference"]
