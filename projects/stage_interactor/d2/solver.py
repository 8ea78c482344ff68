"""Learning-rate schedules and parameter groups."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.solver import *
else:
    from detectron2.solver import (
        LRMultiplier,
        WarmupParamScheduler,
        get_default_optimizer_params,
    )
