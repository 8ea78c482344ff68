"""Hooks that detectron2 has not, or not so: averaging, learning rates, a progress bar."""

import datetime
import logging
import resource
import sys

import torch
from fvcore.common.param_scheduler import ParamScheduler
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..d2 import comm
from ..d2.engine import HookBase
from ..d2.events import EventStorage, EventWriter, get_event_storage
from ..d2.solver import LRMultiplier
from .trainer import Trainer

logger = logging.getLogger("stage_interactor.engine")


class ModelEma(HookBase):
    """Keeps an exponential moving average of weights and buffers (timm's).

    Args:
        model: the model that is trained, without a DDP wrapper.
        decay: of the average at the end; it grows from 0 so that early weights are forgotten.
    """

    trainer: Trainer

    def __init__(self, model: nn.Module, decay: float):
        self.average = ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=3 / 4)
        self._model = model

    def after_step(self) -> None:
        if not self.trainer.skipped:
            self.average.update(self._model, step=self.trainer.steps - 1)


class LearningRate(HookBase):
    """The schedule of the learning rate: it moves on with every step that the optimizer takes.

    Args:
        schedule: an fvcore ParamScheduler that multiplies the optimizer's learning rates.
    """

    trainer: Trainer

    def __init__(self, schedule: ParamScheduler):
        self._schedule = schedule

    def before_train(self) -> None:
        trainer, groups = self.trainer, self.trainer.optimizer.param_groups
        self._multiplier = LRMultiplier(
            trainer.optimizer, self._schedule, trainer.max_iter, last_iter=trainer.steps - 1
        )
        self._shown = max(groups, key=lambda group: len(group["params"]))

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("lr", self._shown["lr"], smoothing_hint=False)
        if not self.trainer.skipped:
            self._multiplier.step()


def _latest(storage: EventStorage, name: str, window: int = 20) -> float | None:
    """The median of a scalar over its last values."""
    history = storage.histories().get(name)
    return None if history is None else history.median(window)


def _summary(storage: EventStorage, max_iter: int) -> dict[str, str]:
    """What a person wants to see of a running training."""
    texts = {}
    losses = ("total_loss", "loss_class", "loss_bbox", "loss_giou")
    for name in losses:
        value = _latest(storage, name)
        if value is not None:
            texts[name] = f"{value:.3f}"
    if "lr" in storage.histories():
        texts["lr"] = f"{storage.history('lr').latest():.2e}"
    images = _latest(storage, "images_per_second")
    if images is not None:
        texts["images/s"] = f"{images:.1f}"
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    storage.put_scalar("memory_gib", memory, smoothing_hint=False)  # the most so far
    texts["memory"] = f"{memory:.1f}G"
    seconds = _latest(storage, "time", 1000)
    if seconds is not None:
        left = seconds * (max_iter - storage.iter - 1)
        storage.put_scalar("eta_seconds", left, smoothing_hint=False)
        texts["eta"] = str(datetime.timedelta(seconds=int(left)))
    return texts


class ConsoleWriter(EventWriter):
    """One line every few iterations: losses of the last stage, lr, images/s, memory, time left."""

    def __init__(self, max_iter: int):
        self._max_iter = max_iter

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter >= self._max_iter:
            return
        texts = _summary(storage, self._max_iter)
        line = "  ".join(f"{name} {value}" for name, value in texts.items())
        logger.info(f"iter {storage.iter + 1}/{self._max_iter}  {line}")


class ProgressBar(HookBase):
    """A bar in a terminal; log lines appear above it. Without a terminal there is none."""

    def __init__(self, period: int = 10):
        self._period = period
        self._bar: tqdm | None = None

    def before_train(self) -> None:
        if not (comm.is_main_process() and sys.stderr.isatty()):
            return
        self._bar = tqdm(
            total=self.trainer.max_iter, initial=self.trainer.start_iter, dynamic_ncols=True
        )
        loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "stage_interactor")]
        self._redirect = logging_redirect_tqdm(loggers)
        self._redirect.__enter__()

    def after_step(self) -> None:
        if self._bar is None:
            return
        self._bar.update()
        if self.trainer.iter % self._period == 0:
            texts = _summary(self.trainer.storage, self.trainer.max_iter)
            texts.pop("eta", None)  # the bar shows it
            self._bar.set_postfix(texts, refresh=False)

    def after_train(self) -> None:
        if self._bar is not None:
            self._redirect.__exit__(None, None, None)
            self._bar.close()
            self._bar = None
