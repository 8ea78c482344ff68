"""The training loop, its hooks, and the start of a run."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.engine import (
        HookBase,
        SimpleTrainer,
        create_ddp_model,
        default_argument_parser,
        default_setup,
        hooks,
        launch,
    )
else:
    from .embedded.engine import (
        HookBase,
        SimpleTrainer,
        create_ddp_model,
        default_argument_parser,
        default_setup,
        hooks,
        launch,
    )

__all__ = [
    "HookBase",
    "SimpleTrainer",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "hooks",
    "launch",
]
