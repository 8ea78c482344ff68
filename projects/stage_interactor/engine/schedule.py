"""Learning-rate schedules as fvcore parameter schedulers, by epochs."""

from collections.abc import Sequence

from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from ..d2.solver import WarmupParamScheduler


def warmup_multistep(
    *, milestones: Sequence[int], num_epochs: int, warmup_iters: int, max_iter: int
) -> ParamScheduler:
    """x0.1 at each milestone (in epochs), after a linear warm-up from 0.001.

    Args:
        milestones: epochs after which the rate drops.
        num_epochs: of the whole run; the milestones move along when ``max_iter`` is changed.
        warmup_iters: iterations of the warm-up.
        max_iter: iterations of the whole run.
    """
    schedule = MultiStepParamScheduler(
        values=[0.1**drops for drops in range(len(milestones) + 1)],
        milestones=list(milestones),
        num_updates=num_epochs,
    )
    return _warmup(schedule, warmup_iters, max_iter)


def warmup_cosine(*, final: float, warmup_iters: int, max_iter: int) -> ParamScheduler:
    """A cosine from 1 to ``final``, after a linear warm-up from 0.001."""
    return _warmup(CosineParamScheduler(1.0, final), warmup_iters, max_iter)


def _warmup(schedule: ParamScheduler, warmup_iters: int, max_iter: int) -> ParamScheduler:
    length = min(warmup_iters / max_iter, 1.0)
    return WarmupParamScheduler(schedule, warmup_factor=0.001, warmup_length=length)
