"""Learning-rate schedules as fvcore parameter schedulers, by epochs; what looks wrong in one."""

from collections.abc import Mapping, Sequence

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
        warmup_iters: iterations of the warm-up; they stay as they are.
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


def doubts(schedule: Mapping, max_iter: int, rate: float | None = None) -> list[str]:
    """What is probably not meant of a config's ``lr_multiplier``, in a run of this length, and of
    its learning rate."""
    found = []
    if rate == 0:
        found.append("The learning rate is 0 (optimizer.lr): nothing is learned")
    warmup, tenth = schedule.get("warmup_iters") or 0, max(max_iter // 10, 1)
    if warmup > max(max_iter / 10, 1):
        found.append(
            f"The warm-up takes {warmup} iterations, more than a tenth of the run's {max_iter}, in "
            f"which little is learned: lr_multiplier.warmup_iters={tenth} would be a tenth"
        )
    length = schedule.get("max_iter")
    if length not in (None, max_iter):
        found.append(
            f"The learning rate is scheduled for {length} iterations, the run has {max_iter}: "
            "lr_multiplier.max_iter='${train.max_iter}' makes it follow"
        )
    return found
