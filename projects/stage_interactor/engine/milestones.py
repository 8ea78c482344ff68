"""The end of an iteration: evaluation, the best weights, metrics, checkpoints."""

import contextlib
import logging
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..config import flatten
from ..d2 import comm
from ..d2.engine import HookBase
from ..d2.events import EventWriter
from ..data import Part
from ..errors import explain
from ..inference.weights import read_checkpoint
from ..untrusted.tensors import CheckpointError
from .buffers import agree_on_buffers, any_process
from .checkpoint import BEST, Checkpointer
from .early_stopping import SIGNS, EarlyStopping, StoppedEarly, Waiting, sign_of, waiting_of
from .signals import SIGNALS, Stopped
from .trainer import NonFiniteError, Trainer

logger = logging.getLogger(__name__)

_SMOOTHED = 20  # iterations that a writer takes the median of
_LARGEST_BATCH = 2**20  # images, or processes, that a checkpoint may speak of
# Not in checkpoints: a run that was interrupted has the same ones as one that was not.
_OF_THE_MACHINE = frozenset(
    ("time", "data_time", "rank_data_time", "images_per_second", "eta_seconds", "memory_gib")
)


class Best(NamedTuple):
    """The best evaluation of a run."""

    value: float
    iteration: int
    metric: str | None = None  # versions up to 0.1 did not say

    @classmethod
    def in_folder(cls, output_dir: str) -> "Best | None":
        """As ``model_best.pth`` says it of itself, which is there whatever a kill prevented."""
        path = os.path.join(output_dir, f"{BEST}.pth")
        if not os.path.isfile(path):
            return None
        try:
            content = read_checkpoint(path, mmap=True)
        except (CheckpointError, OSError) as error:
            logger.warning(f"The best weights are chosen anew: {explain(error)}")
            return None
        try:
            if best := content.get("run", {}).get("best"):
                return cls(
                    float(best["value"]), operator.index(best["iteration"]), best.get("metric")
                )
            old = content.get("trainer", {}).get("hooks", {}).get("BestCheckpointer", {})
            value = old.get("best_metric")
            return None if value is None else cls(float(value), operator.index(old["best_iter"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            logger.warning(
                f"The best weights are chosen anew: {path} says of none how good they are ({error})"
            )
            return None


class RunState:
    """What a run knows beside weights and optimizer: in every checkpoint, as ``run``.

    Attributes:
        best: of the evaluations so far.
        evaluated: the iteration whose evaluation was the last.
        waiting: for a better evaluation, see ``EarlyStopping``.
        pending: whether the checkpoint's iteration is to be evaluated and is not yet.
        written: the iteration up to which metrics are written.
        failed: whether the checkpoint is of before an iteration that fails, whatever the rate.
        parts: of the training, by their kind of batches, see :class:`~stage_interactor.data.Part`;
            none if the loader is not ours.
        data: fingerprint of the images that are trained on, empty in checkpoints of before.
        scalars: for every metric, but for times and memory, whether it is smoothed, and its last
            values with iterations.
    """

    def __init__(self) -> None:
        self.best: Best | None = None
        self.evaluated: int | None = None
        self.waiting: Waiting | None = None
        self.pending = False
        self.written = -1
        self.failed = False
        self.parts: list[Part] = []
        self.data = ""
        self.scalars: dict[str, tuple[bool, list[tuple[float, int]]]] = {}

    def state_dict(self) -> dict:
        best = self.best and self.best._asdict()
        waiting = self.waiting and tuple(self.waiting)
        parts = [tuple(part) for part in self.parts]
        return {**vars(self), "best": best, "waiting": waiting, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All but the best, which :meth:`Best.in_folder` knows.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: it is no state of a run.
        """
        number, evaluated = operator.index, state["evaluated"]
        self.evaluated = None if evaluated is None else number(evaluated)
        self.waiting = waiting_of(state.get("waiting"))  # versions up to 0.1 did not wait
        self.pending = bool(state["pending"])
        self.written = number(state["written"])
        self.parts = [
            Part(number(iterations), number(size), number(processes), bool(grouped))
            for iterations, size, processes, grouped in state.get("parts", [])
        ]
        if any(
            part.iterations < 0 or not 1 <= min(part[1:3]) <= max(part[1:3]) <= _LARGEST_BATCH
            for part in self.parts
        ):
            raise ValueError(f"its batches cannot have been {[tuple(part) for part in self.parts]}")
        self.data = str(state.get("data", ""))
        self.scalars = {
            str(name): (bool(smoothed), [(float(value), number(at)) for value, at in values])
            for name, (smoothed, values) in state["scalars"].items()
        }


class Milestones(HookBase):
    """Evaluates, keeps the best weights, writes metrics and checkpoints, in this order.

    They are one hook because a checkpoint is the state at the end of an iteration, with all that
    follows from it. Where an iteration is evaluated *and* saved, it is saved before the evaluation
    too: if the run is killed while it evaluates, it goes on with the evaluation.

    Where the evaluations end the run early, its last iteration is the one that was evaluated.

    Args:
        state: of the run; if a checkpoint was loaded, its.
        checkpointer: writes on the main process alone.
        evaluate: gives ``{"bbox": {"AP": ...}}`` on the main process; it is told whether it is the
            last evaluation.
        draw: what an evaluation found that was not told to be the last; on the main process.
        models: the model, without a DDP wrapper, and the averages of it.
        writers: of metrics; none on other processes.
        eval_period: in iterations; 0 evaluates after the last one alone, as always.
        period: of checkpoints, in iterations; with 0 there is only ``model_final``.
        max_to_keep: of the periodic checkpoints, 1 or more; None keeps all.
        log_period: of the metrics, in iterations; 0 writes those of an evaluation, and of the end.
        val_metric, mode: what the best weights are chosen by, and whether ``"max"`` or ``"min"``
            is best; None: by its name, see :func:`.early_stopping.sign_of`.
        early_stopping: what ends the run; nothing by default.
        describe: what else a checkpoint says; it is told whether its weights are those of the last
            evaluation.

    Raises:
        ValueError: for another mode, or a number that is too small.
    """

    trainer: Trainer

    def __init__(
        self,
        state: RunState,
        checkpointer: Checkpointer,
        evaluate: Callable[[bool], Mapping[str, Any]],
        draw: Callable[[], None],
        models: Sequence[nn.Module],
        writers: Sequence[EventWriter] = (),
        *,
        eval_period: int,
        period: int,
        max_to_keep: int | None = None,
        log_period: int,
        val_metric: str = "bbox/AP",
        mode: str | None = None,
        early_stopping: EarlyStopping | None = None,
        describe: Callable[[bool], Mapping[str, Any]] = lambda evaluated: {},
    ):
        if mode is not None and mode not in SIGNS:
            raise ValueError(
                f"train.best_checkpointer.mode must be one of {list(SIGNS)}, or null, got {mode!r}"
            )
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"train.checkpointer.max_to_keep must be 1 or more, got {max_to_keep}")
        self._state = state
        self._checkpointer = checkpointer
        self._evaluate = evaluate
        self._draw = draw
        self._models = models
        self._writers = writers
        self._eval_period = eval_period
        self._period = period
        self._max_to_keep = max_to_keep
        self._log_period = log_period
        self._val_metric = val_metric
        self._sign = sign_of(val_metric, mode)
        self._early_stopping = early_stopping or EarlyStopping()
        self._describe = describe
        self._kept: list[str] = []
        self._saved: int | None = None  # iteration of which there is a checkpoint with all of it

    def before_train(self) -> None:
        start, storage = self.trainer.start_iter, self.trainer.storage
        for name, (smoothed, values) in self._state.scalars.items():
            for value, storage.iter in values:
                storage.put_scalar(name, value, smoothing_hint=smoothed)
        folder = self._checkpointer.save_dir
        self._kept = [
            name
            for name in sorted(os.listdir(folder))
            if (found := re.fullmatch(r"model_(\d+)\.pth", name)) and int(found[1]) < start
        ]
        storage.iter = start
        early = self._early_stopping.ends(self._state.waiting)
        last = start > 0 and (start == self.trainer.max_iter or early)
        if self._state.pending or last:
            storage.iter = self.trainer.iter = start - 1
            logger.info(f"Once more from the end of iteration {start - 1}: not all was saved")
            evaluate = self._state.pending or self._state.evaluated != start - 1
            self._finish(evaluate, self._names(start - 1))
            storage.iter = self.trainer.iter = start

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        last = done >= self.trainer.max_iter
        evaluate = last or _is_due(done, self._eval_period)
        names = self._names(self.trainer.iter)
        if evaluate or names:
            agree_on_buffers(*self._models)
        if evaluate and names:
            self._state.pending = True
            self._write(names[0])
        self._finish(evaluate, names)

    def after_train(self) -> None:
        for writer in self._writers:
            writer.close()

    def save(self, name: str, failed: bool = False) -> None:
        """Writes ``<name>.pth``, unless all of this iteration is saved; all processes must call it.

        Args:
            failed: the next iteration fails, whatever the learning rate.

        Raises:
            NonFiniteError: something in it is not finite; nothing is written.
        """
        if self._saved == self.trainer.iter and not failed:
            return
        agree_on_buffers(*self._models)
        self._state.failed = failed
        self._write(name)

    def name_last(self, name: str) -> None:
        """Has a run go on from the checkpoint of this name, a file's."""
        if self._checkpointer.save_to_disk:
            self._checkpointer.tag_last_checkpoint(name)

    def _write(self, name: str) -> None:
        iteration, storage = self.trainer.iter, self.trainer.storage
        hints = storage.smoothing_hints()
        self._state.scalars = {}
        for key, history in storage.histories().items():
            if key in _OF_THE_MACHINE:
                continue
            values = [(value, at) for value, at in history.values() if at <= iteration]
            self._state.scalars[key] = hints[key], values[-_SMOOTHED:]
        if self._state.parts:
            *earlier, last = self._state.parts
            trained = iteration + 1 - sum(part.iterations for part in earlier)
            self._state.parts = [*earlier, last._replace(iterations=trained)]
        described = self._describe(self._state.evaluated == iteration)
        self._checkpointer.save(name, iteration=iteration, **described)

    def _names(self, iteration: int) -> list[str]:
        """The checkpoints that are due after an iteration."""
        done = iteration + 1
        names = []
        if _is_due(done, self._period):
            names.append(f"model_{iteration:07d}")
        return names + (["model_final"] if done >= self.trainer.max_iter else [])

    def _finish(self, evaluate: bool, names: Sequence[str]) -> None:
        """All that follows from an iteration.

        Raises:
            StoppedEarly: it was the last one, before it was meant to be.
        """
        done = self.trainer.iter + 1
        last = done >= self.trainer.max_iter
        better = False
        if evaluate:
            results = flatten(self._evaluated(last), "/")
            scalars = {name: float(value) for name, value in results.items()}
            self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
            if comm.is_main_process():
                better = self._is_best(scalars)
                self._state.waiting = self._early_stopping.after(self._state.waiting, scalars)
            better = any_process(better, self.trainer.device)  # which waits for all of them
            self._state.waiting, *_ = comm.all_gather(self._state.waiting)
            self._state.evaluated = self.trainer.iter
        if early := not last and self._early_stopping.ends(self._state.waiting):
            logger.info(f"The run ends here: {self._early_stopping.told(self._state.waiting)}")
            last, names = True, [*names, "model_final"]
            if comm.is_main_process():
                self._draw()
        if evaluate or last or _is_due(done, self._log_period):
            for writer in self._writers:
                writer.write()
            self._state.written = self.trainer.iter
        self._state.pending = False
        for name in [*([BEST] if better else []), *names]:
            self._write(name)
        if names:
            self._saved = self.trainer.iter
        if _is_due(done, self._period):
            self._keep_the_last(f"{names[0]}.pth")
        if early:
            raise StoppedEarly

    def _evaluated(self, last: bool) -> Mapping[str, Any]:
        """The results of an evaluation, which a signal ends at once: ``--resume`` makes up for it.

        Processes leave it one by one, so that nothing is said between them here.
        """
        try:
            with SIGNALS.at_once():
                return self._evaluate(last) or {}
        except (Stopped, RuntimeError) as end:  # such as that another process is lost
            if not self._state.pending:  # else there is a checkpoint that says so
                self._state.pending = True
                with contextlib.suppress(NonFiniteError):
                    self._write(f"model_{self.trainer.iter:07d}")
            if isinstance(end, Stopped):
                end.tell(
                    f"in the evaluation after iteration {self.trainer.iter}, which --resume makes "
                    "up for; it goes on from there."
                )
            raise

    def _is_best(self, scalars: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far; if so it is remembered."""
        value, best = scalars.get(self._val_metric), self._state.best
        if value is None:
            logger.warning(
                f"There is no metric {self._val_metric} to choose the best weights by "
                f"(train.best_checkpointer.val_metric), only {sorted(scalars)}"
            )
            return False
        if best and best.metric not in (None, self._val_metric):
            logger.warning(f"{BEST}.pth is the best by {best.metric}, not by {self._val_metric}")
            best = None
        if not math.isfinite(value) or (best and self._sign * (value - best.value) <= 0):
            stays = f"{best.value:.5f} of iteration {best.iteration}" if best else "none"
            logger.info(f"{self._val_metric} is {value:.5f}; the best stays {stays}")
            return False
        self._state.best = Best(value, self.trainer.iter, self._val_metric)
        logger.info(f"{self._val_metric} is {value:.5f}, the best so far: saved as {BEST}.pth")
        return True

    def _keep_the_last(self, name: str) -> None:
        self._kept = [*(kept for kept in self._kept if kept != name), name]
        while self._max_to_keep is not None and len(self._kept) > self._max_to_keep:
            path = os.path.join(self._checkpointer.save_dir, self._kept.pop(0))
            if self._checkpointer.save_to_disk and os.path.isfile(path):
                os.remove(path)


def _is_due(done: int, period: int) -> bool:
    """After so many iterations; a period of 0 is never."""
    return period > 0 and done % period == 0
