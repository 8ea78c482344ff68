"""The training loop, its hooks, and the start of a run."""

import logging as _logging
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
    )

    # An error is told once, where it ends the run, and not as a trace before that.
    _logging.getLogger("detectron2.engine.train_loop").addFilter(
        lambda record: "Exception during training" not in str(record.msg)
    )
