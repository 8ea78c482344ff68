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
    for _name, _words in {
        "engine.train_loop": "Exception during training",
        "config.lazy": "Unable to serialize the config",
    }.items():
        _logging.getLogger(f"detectron2.{_name}").addFilter(
            lambda record, words=_words: words not in str(record.msg)
        )
