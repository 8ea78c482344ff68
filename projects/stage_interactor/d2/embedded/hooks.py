"""Stands in for ``detectron2.engine.hooks``.

Left out: ``CallbackHook``, profilers, precise batch-norm statistics, memory statistics.
"""

import datetime
import logging
import math
import operator
import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer

from . import comm
from .evaluator import flatten_results_dict
from .events import EventWriter
from .solver import LRMultiplier
from .train_loop import HookBase, SimpleTrainer

__all__ = [
    "BestCheckpointer",
    "EvalHook",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
]

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


class PeriodicWriter(HookBase):
    """Let writers write every ``period`` iterations, after the last one, and at the end.

    Raises:
        TypeError: if one is not an EventWriter.
    """

    def __init__(self, writers: list[EventWriter], period: int = 20):
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"PeriodicWriter got {writer!r}, which is no EventWriter.")
        self._writers = writers
        self._period = period

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if next_iter % self._period == 0 or next_iter == self.trainer.max_iter:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            writer.write()  # what other hooks put in their after_train
            writer.close()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's PeriodicCheckpointer as a hook: every ``period`` iterations and after the last."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class LRScheduler(HookBase):
    """Step a learning-rate schedule after every iteration, and put ``lr``.

    Args:
        scheduler: an fvcore ParamScheduler that multiplies the initial rates of the trainer's
            optimiser.
    """

    trainer: SimpleTrainer

    def __init__(self, *, scheduler: ParamScheduler):
        self._scheduler = scheduler
        self._multiplier: LRMultiplier | None = None  # from the start of the training

    def before_train(self) -> None:
        optimizer = self.trainer.optimizer
        self._multiplier = LRMultiplier(
            optimizer, self._scheduler, self.trainer.max_iter, last_iter=self.trainer.iter - 1
        )
        self._group = self.get_best_param_group_id(optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """The group whose rate stands for all: the one with most parameters (the first of them).

        If each group has a single parameter, the first with the most common rate.
        """
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in optimizer.param_groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        assert self._multiplier is not None  # since before_train
        rate = self.trainer.optimizer.param_groups[self._group]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self._multiplier.step()

    def state_dict(self) -> dict:
        return {} if self._multiplier is None else self._multiplier.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        pass  # before_train makes the schedule anew from the iteration and the config


class _Periodic(HookBase):
    """Does something every ``period`` iterations, if that is not 0, and after the last one."""

    def __init__(self, period: int):
        self._period = period

    def _do(self) -> None:
        raise NotImplementedError

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        due = self._period > 0 and next_iter % self._period == 0
        if due and next_iter != self.trainer.max_iter:  # after_train does the last one
            self._do()

    def after_train(self) -> None:
        # not after a failed training
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._do()


class EvalHook(_Periodic):
    """Evaluate every ``eval_period`` iterations and after the last one, in all processes.

    Args:
        eval_period: 0 evaluates only at the end.
        eval_function: takes nothing, returns a nested dict of numbers, which are put with the
            keys joined by ``/``; or nothing.
    """

    def __init__(self, eval_period: int, eval_function: Callable[[], Mapping | None]):
        super().__init__(eval_period)
        self._func = eval_function

    def _do(self) -> None:
        results = self._func()
        if results:
            if not isinstance(results, dict):
                raise TypeError(f"The evaluation function returned {results!r}, not a dict.")
            flat = flatten_results_dict(results)
            for name, value in flat.items():
                try:
                    float(value)
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"The evaluation function returned {name}={value!r}, which is no number."
                    ) from error
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        comm.synchronize()  # processes finish at different times

    def after_train(self) -> None:
        super().after_train()
        del self._func  # a closure that often holds the trainer: break the cycle


class BestCheckpointer(_Periodic):
    """Save a checkpoint when a metric is better than ever; register it after the EvalHook.

    Args:
        eval_period: that of the EvalHook.
        val_metric: name of the scalar, e.g. ``"bbox/AP50"``.
        mode: ``"max"`` or ``"min"``, what is better.

    Raises:
        ValueError: for another mode.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ):
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; it must be 'max' or 'min'.")
        super().__init__(eval_period)
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._better = operator.gt if mode == "max" else operator.lt
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def _do(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            logger.warning("There is no metric %s to choose the best by.", self._val_metric)
            return
        metric, iteration = latest
        better = self.best_metric is None or self._better(metric, self.best_metric)
        if not (better and math.isfinite(metric)):
            logger.info(
                "%s is %.5f at iteration %d; the best stays %s at iteration %s.",
                self._val_metric,
                metric,
                iteration,
                self.best_metric,
                self.best_iter,
            )
            return
        self.best_metric, self.best_iter = metric, iteration
        self._checkpointer.save(self._file_prefix, iteration=iteration)
        logger.info(
            "%s is %.5f at iteration %d, the best so far: saved as %s.",
            self._val_metric,
            metric,
            iteration,
            self._file_prefix,
        )
