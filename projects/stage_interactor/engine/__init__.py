"""Training beyond what detectron2 has: the step, hooks, checkpoints, schedules.

What calls them is :func:`stage_interactor.train`, in :mod:`.training`.
"""

from ..inference.weights import load_weights, read_checkpoint, save_atomically, save_safetensors
from ..untrusted.tensors import CheckpointError
from .checkpoint import Checkpointer
from .hooks import ConsoleWriter, LearningRate, ModelEma, ProgressBar
from .milestones import Milestones, RunState
from .parameters import parameter_groups
from .schedule import warmup_cosine, warmup_multistep
from .signals import StopOnSignal
from .trainer import NonFiniteError, Trainer
from .writers import SERVICES

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "ConsoleWriter",
    "LearningRate",
    "Milestones",
    "ModelEma",
    "NonFiniteError",
    "ProgressBar",
    "RunState",
    "SERVICES",
    "StopOnSignal",
    "Trainer",
    "load_weights",
    "parameter_groups",
    "read_checkpoint",
    "save_atomically",
    "save_safetensors",
    "warmup_cosine",
    "warmup_multistep",
]
