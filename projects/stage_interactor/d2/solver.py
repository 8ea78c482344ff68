"""Learning-rate schedules and parameter groups."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
else:
    from .embedded.solver import WarmupParamScheduler, get_default_optimizer_params

__all__ = [
    "WarmupParamScheduler",
    "get_default_optimizer_params",
]
