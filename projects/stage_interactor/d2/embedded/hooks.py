"""Stands in for ``detectron2.engine.hooks``.

Left out: all but the timer.
"""

import datetime
import logging
import time

from fvcore.common.timer import Timer

from .train_loop import HookBase

__all__ = ["IterationTimer"]

logger = logging.getLogger(__name__)

_WARMUP = 3  # iterations at the start that are not timed


class IterationTimer(HookBase):
    """Put the seconds of each iteration as ``time``, and log a summary at the end.

    Register it first: the time of later hooks' ``after_step`` is not the iteration's.
    """

    def __init__(self) -> None:
        self._step_timer = Timer()
        self._total_timer = Timer()
        self._start_time = time.perf_counter()

    def before_train(self) -> None:
        self._start_time = time.perf_counter()
        self._total_timer.reset()
        self._total_timer.pause()

    def before_step(self) -> None:
        self._step_timer.reset()
        self._total_timer.resume()

    def after_step(self) -> None:
        done = self.trainer.storage.iter - self.trainer.start_iter + 1
        if done >= _WARMUP:
            self.trainer.storage.put_scalars(time=self._step_timer.seconds())
        else:
            self._start_time = time.perf_counter()
            self._total_timer.reset()
        self._total_timer.pause()

    def after_train(self) -> None:
        total = time.perf_counter() - self._start_time
        in_steps = self._total_timer.seconds()
        timed = self.trainer.storage.iter + 1 - self.trainer.start_iter - _WARMUP
        if timed > 0 and in_steps > 0:
            logger.info(
                "Overall training speed: %d iterations in %s (%.4f s / it)",
                timed,
                datetime.timedelta(seconds=int(in_steps)),
                in_steps / timed,
            )
        logger.info(
            "Total training time: %s (%s on hooks)",
            datetime.timedelta(seconds=int(total)),
            datetime.timedelta(seconds=int(total - in_steps)),
        )
