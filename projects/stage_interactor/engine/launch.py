"""The processes of a run on this machine: started, watched and ended together."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from ..d2 import comm
from ..errors import UserError, explain
from .signals import (
    GRACE,
    NUMBERS,
    SIGNALS,
    Stopped,
    end_process,
    logger,
    name_of,
    put_back,
    take,
)

_TIMEOUT = timedelta(minutes=30)
_SAME_CAUSE = 2.0  # seconds in which the others may fail of what one has failed of
_READY = "ready"


class LostProcess(UserError):
    """A process of a run has ended, and the others cannot go on without it."""


class Place(NamedTuple):
    """Of a process among all of a run, and among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int


@contextmanager
def process_group(place: Place, url: str) -> Iterator[None]:
    """Joins the other processes, by NCCL where there are GPUs, a process having one, else by gloo.

    Raises:
        ConnectionError: they do not meet at ``url``.
        LostProcess: one of them has gone.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(place.local_rank)
    try:
        size, rank = place.world_size, place.rank
        store, *_ = next(dist.rendezvous(url, rank, size, timeout=_TIMEOUT))
        # torchrun's may be the one of the processes before these, with addresses of theirs.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend="nccl" if has_gpu else "gloo",
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            world_size=size,
            rank=rank,
            timeout=_TIMEOUT,
        )
        comm.create_local_process_group(place.local_size)
        comm.synchronize()  # or fast processes may time out while slow ones still start
    except RuntimeError as error:
        raise ConnectionError(
            f"process {place.rank} of {place.world_size} could not join the others at {url}: "
            f"{reason(error)}. Another run may use this address: --dist-url names another"
        ) from error
    try:
        yield
        # Threads of a group that outlive the interpreter can abort the process at its end: nobody
        # may still talk to another, and nothing, not even garbage such as a wrapped model, hold a
        # group.
        comm.synchronize()
    except RuntimeError as error:
        if _is_of_another_process(error):
            raise LostProcess(
                f"process {place.rank} of {place.world_size} has lost another one "
                f"({reason(error)}); --resume goes on from the last checkpoint"
            ) from error
        raise
    comm.forget_groups()
    gc.collect()
    dist.destroy_process_group()


def _is_of_another_process(error: RuntimeError) -> bool:
    if isinstance(error, UserError):
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def reason(error: BaseException) -> str:
    """The first sentence of what is said, without the place in the source of PyTorch."""
    text = re.sub(r"\[\S+:\d+\] ", "", str(error)).strip()
    return re.split(r"\. |\n", text)[0].rstrip(".") or type(error).__name__


def launch(
    function: Callable,
    args: tuple = (),
    *,
    processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    grace: float = GRACE,
) -> None:
    """Calls ``function(*args)`` in several processes of this machine, and waits for all of them.

    A signal to this process, or to one of them, is one to all; when one fails the others are ended.
    What has not ended ``grace`` seconds later is killed. All of them end if this process is killed.

    Args:
        function: can be imported, since processes are spawned.
        processes: on each machine.
        num_machines, machine_rank: how many machines take part, and which of them this is.
        dist_url: where processes meet, e.g. ``tcp://127.0.0.1:8686``; ``"auto"`` takes a free port
            of this machine.
        grace: seconds.

    Raises:
        Stopped: by a signal.
        LostProcess: a process was killed, or has crashed.
        Exception: what ``function`` has raised, once, whatever number of processes did.
        ValueError: there are fewer GPUs, or ``dist_url`` is no address.
    """
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("--dist-url auto is for one machine; name tcp://HOST:PORT")
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    _require_address(dist_url)
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > gpus:
        raise ValueError(
            f"{processes} processes were asked for, but there are only {gpus} GPUs. "
            "Lower --num-gpus."
        )
    if num_machines > 1:  # of which nothing is heard until all are there
        print(
            f"Machine {machine_rank} of {num_machines} waits for the others at {dist_url}, "
            f"{_TIMEOUT.seconds // 60} minutes at most",
            flush=True,
        )
    size = processes * num_machines
    workers = [
        _Worker(Place(machine_rank * processes + index, size, index, processes))
        for index in range(processes)
    ]
    with _received() as received:
        before = _block_signals()
        try:  # which they inherit: a signal waits until they know what to do about it
            for worker in workers:
                worker.start(dist_url, grace, function, args)
        except BaseException:
            for worker in workers:
                worker.kill()
            raise
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _wait(workers, received, grace)
    _raise_of(workers, received)


def _require_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("env", "file") or (
            parts.scheme == "tcp" and parts.hostname and parts.port
        )
    except ValueError:  # of the port
        good = False
    if not good:
        raise ValueError(f"--dist-url must be tcp://HOST:PORT, a port from 1 to 65535, got {url}")


def _find_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _block_signals() -> Any:
    if not (_in_main_thread() and hasattr(signal, "pthread_sigmask")):
        return None
    return signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


@contextmanager
def _received() -> Iterator[list[int]]:
    """Takes the signals, and gives those that have come."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)

    previous = take(receive) if _in_main_thread() else {}
    try:
        yield received
    finally:
        put_back(previous, bool(received))


class _Failure(NamedTuple):
    """What a process has raised."""

    error: bytes | None  # pickled, if it can be
    text: str | None  # what a user is told; None for a bug
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> "_Failure":
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            pickled = None
        trace = "".join(traceback.format_exception(error))
        return cls(pickled, explain(error), trace)

    def rebuilt(self) -> Exception:
        if self.error:
            error = pickle.loads(self.error)
        else:
            error = UserError(self.text) if self.text else RuntimeError(self.trace)
        error.trace = self.trace
        return error


class _Worker:
    """A process of a run, seen by the one that has started it."""

    def __init__(self, place: Place):
        self.place = place
        self.ready = False
        self.killed = False
        self.told = False  # that it was stopped
        self.error: Exception | None = None
        self.process: Any = None
        self.pipe: Any = None

    def start(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        # Not as a daemon: it may start loaders.
        arguments = (theirs, self.place, multiprocessing.get_start_method(), *arguments)
        self.process = context.Process(target=_work, args=arguments)
        self.process.start()
        theirs.close()

    def read(self) -> None:
        """What it has said."""
        try:
            while self.pipe and self.pipe.poll():
                said = self.pipe.recv()
                if said == _READY:
                    self.ready = True
                elif isinstance(said, _Failure):
                    self.error = said.rebuilt()
                else:
                    self.told = bool(said)
        except (EOFError, OSError):
            self.pipe = None

    def stop(self, number: int) -> None:
        """Hands a signal on. Before it is ready, it has nothing to save, and cannot hear."""
        if not self.ready:
            self.kill()
        elif self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.killed = True
            self.process.kill()


def _wait(workers: Sequence[_Worker], received: list[int], grace: float) -> None:
    """Until all have ended."""
    handed_on = False
    deadline = hand_on = None
    while live := [worker for worker in workers if worker.process.is_alive()]:
        pipes = [worker.pipe for worker in workers if worker.pipe]
        multiprocessing.connection.wait([*(w.process.sentinel for w in live), *pipes], timeout=0.2)
        for worker in workers:
            worker.read()
        if received and not handed_on:
            handed_on = True
            for worker in live:
                worker.stop(received[0])
        now = time.monotonic()
        codes = [worker.process.exitcode for worker in workers]
        failed = [code for code in codes if code]
        if deadline is None and (received or failed):
            deadline = now + grace
            hand_on = now + (0 if failed and _signal_of(failed[0]) else _SAME_CAUSE)
        if hand_on is not None and now >= hand_on and failed:
            hand_on = None
            for worker in live:
                worker.stop(received[0] if received else _signal_of(failed[0]) or signal.SIGTERM)
        if deadline is not None and now >= deadline:
            deaf = [worker for worker in live if worker.process.is_alive()]
            for worker in deaf:
                worker.kill()
            if deaf:
                logger.warning(
                    f"{len(deaf)} of {len(workers)} processes still ran {grace:g} s "
                    "(train.grace_seconds) after the run was to end: killed"
                )
            deadline = now + 3600  # nothing more can be done than to wait
    for worker in workers:
        worker.process.join()
        worker.read()


def _signal_of(code: int) -> int:
    """The signal that asked a process with this exit status to end; 0 for other ends."""
    number = -code if code < 0 else code - 128
    return number if number in NUMBERS else 0


def _raise_of(workers: Sequence[_Worker], received: Sequence[int]) -> None:
    """What the ends of all processes amount to."""
    codes = [worker.process.exitcode for worker in workers]
    if not any(codes):
        return
    errors = [worker.error for worker in workers if worker.error]
    causes = [error for error in errors if not isinstance(error, LostProcess)]
    if causes:
        raise causes[0]
    for worker in workers:
        code = worker.process.exitcode
        if code and not worker.killed and not worker.error and not _signal_of(code):
            hint = " (Linux does so when memory is short)" if code == -signal.SIGKILL else ""
            killed = f"was killed by {name_of(-code)}{hint}"
            how = killed if code < 0 else f"ended with status {code}"
            raise LostProcess(
                f"process {worker.place.rank} of {worker.place.world_size} "
                f"(pid {worker.process.pid}) {how}, and the others have ended after it; "
                "--resume goes on from the last checkpoint"
            )
    number = received[0] if received else next(filter(None, map(_signal_of, codes)), 0)
    if number:
        stopped = Stopped(number)
        if not any(worker.told for worker in workers):
            when = (
                "and could not save"
                if any(worker.ready for worker in workers)
                else "before it was ready"
            )
            stopped.tell(f"{when}; --resume goes on from the last checkpoint, if there is one.")
        raise stopped
    if errors:
        raise errors[0]
    raise LostProcess("the processes of the run had to be killed")


def _work(
    pipe: Any,
    place: Place,
    start_method: str,
    url: str,
    grace: float,
    function: Callable,
    args: tuple,
) -> None:
    """A process of a run."""
    _end_with_launcher(grace)
    # For the loaders: as in a run of one process, not spawned as this one.
    multiprocessing.set_start_method(start_method, force=True)
    try:
        SIGNALS.grace, SIGNALS.patience = grace, 5.0
        SIGNALS.take()
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
        if not torch.cuda.is_available():  # where each would take all of them
            cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
            torch.set_num_threads(max(1, len(cores) // place.local_size))
        with process_group(place, url):  # which no signal can interrupt
            pipe.send(_READY)
            function(*args)
    except BaseException as error:
        SIGNALS.hold()
        stopped = isinstance(error, SystemExit)
        code = error.code if isinstance(error, SystemExit) else 1
        with suppress(OSError):  # there may be nobody to hear it
            pipe.send(getattr(error, "told", False) if stopped else _Failure.of(error))
        # Not by the interpreter, whose clean-up could meet threads of the group, and abort.
        end_process(code if isinstance(code, int) else 1)


def _end_with_launcher(grace: float) -> None:
    """If the launcher is killed nobody would end this process."""

    def watch() -> None:
        launcher = multiprocessing.parent_process()
        assert launcher is not None
        multiprocessing.connection.wait([launcher.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        end_process(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
