"""Training beyond what detectron2 has: the step, hooks, checkpoints, schedules."""

from .checkpoint import (
    Checkpointer,
    CheckpointError,
    read_checkpoint,
    save_atomically,
    save_safetensors,
)
from .hooks import (
    BestCheckpointer,
    ConsoleWriter,
    ModelEma,
    PeriodicCheckpointer,
    ProgressBar,
    StopOnSignal,
    load_weights,
)
from .schedule import warmup_cosine, warmup_multistep
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
    "SERVICES",
    "ProgressBar",
    "StopOnSignal",
    "Trainer",
    "load_weights",
    "read_checkpoint",
    "save_atomically",
    "save_safetensors",
    "warmup_cosine",
    "warmup_multistep",
]
