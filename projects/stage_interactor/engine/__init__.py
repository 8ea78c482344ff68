"""Training beyond what detectron2 has: the step, hooks, checkpoints, schedules.

What calls them is :func:`stage_interactor.train`, in :mod:`.training`.
"""

from ..inference.weights import (
    CheckpointError,
    load_weights,
    read_checkpoint,
    save_atomically,
    save_safetensors,
)
from .checkpoint import Checkpointer
from .hooks import (
    BestCheckpointer,
    ConsoleWriter,
    ModelEma,
    PeriodicCheckpointer,
    ProgressBar,
)
from .schedule import warmup_cosine, warmup_multistep
from .signals import StopOnSignal
from .trainer import NonFiniteError, Trainer
from .writers import SERVICES

__all__ = [
    "BestCheckpointer",
    "CheckpointError",
    "Checkpointer",
    "ConsoleWriter",
    "ModelEma",
    "NonFiniteError",
    "PeriodicCheckpointer",
    "ProgressBar",
    "SERVICES",
    "StopOnSignal",
    "Trainer",
    "load_weights",
    "read_checkpoint",
    "save_atomically",
    "save_safetensors",
    "warmup_cosine",
    "warmup_multistep",
]
