"""Signals that end a run: it saves what it has, and leaves in time."""

import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from traceback import walk_stack
from typing import Any, NoReturn

from torch.utils.data import dataloader
from torch.utils.data._utils import signal_handling

from ..d2 import comm
from ..d2.engine import HookBase
from ..errors import NUMBERS, leave_at_once
from .buffers import any_process
from .trainer import Trainer

logger = logging.getLogger("stage_interactor.engine")

GRACE = 30.0  # seconds; train.grace_seconds
_DEATH_AGAIN = 0.1  # seconds until another look whether data are waited for


def name_of(number: int) -> str:
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


def take(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Gives the signals to a handler; what had them before."""
    # What nohup has started shall not hear that its terminal is gone.
    deaf = "SIGHUP" if signal.getsignal(NUMBERS[-1]) is signal.SIG_IGN else ""
    return {n: signal.signal(n, handler) for n in NUMBERS if name_of(n) != deaf}


def put_back(previous: Mapping[int, Any], received: bool) -> None:
    """Gives the signals back, except to a program that is leaving, which they shall not disturb."""
    for number, handler in previous.items():
        if not (received and handler is leave_at_once):
            signal.signal(number, handler or signal.SIG_DFL)


class Stopped(SystemExit):
    """A signal has ended the run; its exit status is 128 and the number of the signal.

    Attributes:
        told: whether it has been said.
    """

    told = False

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    def tell(self, text: str) -> None:
        """Says it, once."""
        if not self.told and comm.is_main_process():
            logger.warning(f"Stopped by {name_of(self.number)} {text}")
        self.told = True

    def leave(self) -> NoReturn:
        """Ends the process without the interpreter's clean-up, which can take seconds."""
        end_process(128 + self.number)


class Signals:
    """What SIGTERM, Ctrl-C and SIGHUP do to the run of this process.

    The first one counts; those that follow, from a launcher or an impatient hand, change nothing.
    Whatever still runs when the grace time is over is killed, unless somebody works in the process.

    Attributes:
        received: number of the signal that has come, or 0.
        grace: seconds from the signal to the end.
        patience: seconds more, where another process looks after this one's end.
    """

    def __init__(self) -> None:
        self.received = 0
        self.grace = GRACE
        self.patience = 0.0
        self._raises = False
        self._process = 0
        self._previous: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the signals, and gives them back at the end; within itself it changes nothing.

        They arrive in the main thread alone: elsewhere nothing is done about them.
        """
        if self._previous or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.take()
        try:
            yield
        finally:
            self._give_back()

    def take(self) -> None:
        """Takes the signals for good; one that comes raises :class:`Stopped`."""
        self.received, self._raises, self._process = 0, True, os.getpid()
        self._previous = take(self._receive)
        WORKERS_DEATHS.take()

    def _give_back(self) -> None:
        previous, self._previous = self._previous, {}
        put_back(previous, bool(self.received))
        WORKERS_DEATHS.forget()
        if self._timer and leave_at_once not in previous.values():
            self._timer.cancel()

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # forked, such as a loader's worker, which ends with the process it works for
        if not self.received:
            self.received = number
            self._timer = threading.Timer(self.grace + self.patience, self._kill)
            self._timer.daemon = True
            self._timer.start()
        if not self._raises:
            return
        if _in_a_finalizer(frame):  # where an exception would be lost
            threading.Timer(0.02, signal.raise_signal, [number]).start()
            return
        self._raises = False
        raise Stopped(self.received)

    def _kill(self) -> None:
        if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
            return
        told = f"Still running {self.grace:g} s (train.grace_seconds) after "
        told += f"{name_of(self.received)}: killed. --resume goes on from the last checkpoint.\n"
        os.write(2, told.encode())
        end_process(128 + self.received)

    def hold(self) -> None:
        """From now on a signal waits for the end of an iteration, see :class:`StopOnSignal`."""
        self._raises = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal raises :class:`Stopped`, also one that has come before."""
        before, self._raises = self._raises, True
        try:
            if self.received:
                raise Stopped(self.received)
            yield
        finally:
            self._raises = before and not self.received


SIGNALS = Signals()


class WorkersDeaths:
    """What the death of a loader's worker does to this process.

    PyTorch raises an error of it (SIGCHLD) wherever the process then is: in the middle of a
    checkpoint, in the code that would give gradients back, in a decoder whose picture gets the
    blame. Here it is raised where the data of that loader are waited for, which will never come.
    """

    def __init__(self) -> None:
        self._find: Any = None  # PyTorch's handler, which raises of workers that have died
        self._deaths: list[RuntimeError] = []  # found, and not raised yet
        self._process = 0
        self._in_a_run = False
        self._left: set[int] = set()  # workers that have outlived a run, which nobody waits for
        self._again: threading.Timer | None = None

    def take(self) -> None:
        """For good, as PyTorch's handler is: a loader's workers may outlive a run that failed."""
        if not hasattr(signal, "SIGCHLD"):
            return
        if self._find is None:
            signal_handling._set_SIGCHLD_handler()  # as the first loader does
            handler = signal.getsignal(signal.SIGCHLD)
            if callable(handler):
                self._find = handler
                signal.signal(signal.SIGCHLD, self._receive)
        self._deaths, self._process, self._in_a_run = [], os.getpid(), True
        self._again = None

    def forget(self) -> None:
        """A run has ended, and with it the wait for data."""
        self._deaths, self._in_a_run = [], False
        self._left |= {child.pid for child in multiprocessing.active_children() if child.pid}

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # forked, such as a worker itself
            self._find(number, frame)
            return
        try:
            self._find(number, frame)
        except RuntimeError as error:
            if not _workers_of(error) & self._left:
                self._deaths.append(error)
        waiting = set() if _in_a_finalizer(frame) else _workers_waited_for(frame)
        for death in self._deaths:
            if not self._in_a_run or _workers_of(death) & waiting:  # of others as PyTorch has it
                self._deaths.remove(death)
                raise death
        if self._deaths and self._again is None:
            self._again = threading.Timer(_DEATH_AGAIN, self._look_again, [number])
            self._again.daemon = True
            self._again.start()

    def _look_again(self, number: int) -> None:
        """Of a timer: the main thread alone runs handlers, and may wait in a call that a signal has
        to end."""
        self._again = None
        signal.pthread_kill(threading.main_thread().ident or 0, number)


WORKERS_DEATHS = WorkersDeaths()


def end_process(status: int) -> NoReturn:
    """Ends this process and those that load data for it, whatever its threads are doing."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(status)


def _in_a_finalizer(frame: Any) -> bool:
    return any(found.f_code.co_name == "__del__" for found, _ in walk_stack(frame))


def _workers_of(error: RuntimeError) -> set[int]:
    """PyTorch's message has their numbers."""
    return set(map(int, re.findall(r"\d+", str(error))))


def _workers_waited_for(frame: Any) -> set[int]:
    """Of the loader that the process waits for: one without workers reads the pictures itself."""
    waits = dataloader._MultiProcessingDataLoaderIter._try_get_data.__code__
    for found, _ in walk_stack(frame):
        if found.f_code is waits:
            return {worker.pid for worker in found.f_locals["self"]._workers}
    return set()


class StopOnSignal(HookBase):
    """SIGTERM, Ctrl-C and SIGHUP end the run after the current iteration, with a checkpoint.

    Args:
        save: writes the checkpoint of a name if this iteration has none yet; all processes call
            it.
    """

    trainer: Trainer

    def __init__(self, save: Callable[[str], None]):
        self._save = save
        self._taken = ExitStack()

    def before_train(self) -> None:
        self._taken.enter_context(SIGNALS.taken())  # if nobody has
        SIGNALS.hold()

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if not any_process(bool(SIGNALS.received), self.trainer.device):
            return
        if iteration + 1 >= self.trainer.max_iter:
            return  # and with it the run, of which all is saved
        stopped = Stopped(max(comm.all_gather(SIGNALS.received)))
        self._save(f"model_{iteration:07d}")
        comm.synchronize()  # nobody leaves, and is missed, while the first one saves
        stopped.tell(f"after iteration {iteration}; --resume goes on from there.")
        raise stopped

    def after_train(self) -> None:
        self._taken.close()
