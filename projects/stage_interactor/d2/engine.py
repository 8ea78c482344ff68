"""The training loop, its hooks, and the start of a run."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.engine import *
else:
    from detectron2.engine import (
        HookBase,
        SimpleTrainer,
        create_ddp_model,
        default_setup,
        hooks,
        launch,
    )
