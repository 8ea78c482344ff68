"""SIGTERM and Ctrl-C: a run saves what it has, and leaves."""

import logging
import signal
import threading
import time
from typing import Any

from ..d2.engine import HookBase
from .buffers import any_process
from .milestones import Milestones
from .trainer import Trainer

logger = logging.getLogger("stage_interactor.engine")

_TOGETHER = 1.0  # seconds


class StopOnSignal(HookBase):
    """SIGTERM and Ctrl-C end the run after the current iteration, with a checkpoint.

    A second signal ends it at once, unless it comes with the first: a launcher that ends and its
    process group both send one. Signals arrive in the main thread alone: elsewhere nothing is
    done about them.
    """

    trainer: Trainer

    def __init__(self, milestones: Milestones):
        self._milestones = milestones
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def before_train(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self._received and time.monotonic() - self._received_at > _TOGETHER:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._received_at = number, time.monotonic()

    def after_step(self) -> None:
        if not any_process(bool(self._received), self.trainer.device):
            return
        iteration = self.trainer.iter
        self._milestones.save(f"model_{iteration:07d}")
        logger.warning(
            f"Stopped by a signal after iteration {iteration}; --resume goes on from there."
        )
        raise SystemExit(128 + (self._received or signal.SIGTERM))

    def after_train(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
