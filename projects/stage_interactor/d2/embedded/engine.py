"""Stands in for ``detectron2.engine``; see the modules it gathers."""

from . import hooks
from .defaults import create_ddp_model, default_setup
from .train_loop import HookBase, SimpleTrainer

__all__ = [
    "HookBase",
    "SimpleTrainer",
    "create_ddp_model",
    "default_setup",
    "hooks",
]
