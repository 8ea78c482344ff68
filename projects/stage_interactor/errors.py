"""Which errors are told in one line, and how: a mistake of whoever runs the project is no bug.

A module that finds such a mistake raises a :class:`UserError`, or Python's own OSError or
ValueError, whose message says what is wrong and what to do. Programs turn it into a line in one
place, :func:`call`; processes that they start do the same.
"""

import errno
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NUMBERS = tuple(  # of the signals that end a program, as far as the system has them
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
TRACE = "STAGE_INTERACTOR_TRACE"  # environment variable: 1 shows where an error comes from
_HINT = f"{TRACE}=1 shows where it comes from"
# What helps, behind what the system says of a file.
_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or write to another folder")
_ADVICE |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit: ulimit -n 65536")
_ADVICE |= {
    errno.EROFS: "write to another folder",
    errno.ENOTDIR: "name another folder",
    errno.EEXIST: "name another folder",
    errno.EACCES: "whose file is it, and who runs this?",
}
# What PyTorch's data loader makes of an error in one of its processes, whose own words come last.
_IN_WORKER = re.compile(r"Caught \w+ in .*?\nOriginal Traceback .*\n[\w.]+: (.*)", re.DOTALL)
_WORKER_ENDED = re.compile(r"DataLoader worker \(pid.*", re.DOTALL)
_SHARED_MEMORY = re.compile(r"shared memory|Bus error|file </torch_", re.IGNORECASE)
_LOADER = "torch.utils.data.dataloader"  # the module
_ONE_VALUE = "Expected more than 1 value per channel when training"  # PyTorch's norms
_NO_COMPILER = re.compile(r"(No working C\+\+|Failed to find C) compiler[^.]*", re.IGNORECASE)
MORE_SHARED_MEMORY = (
    "enlarge it (docker run --shm-size=8g), or do without (dataloader.train.num_workers=0 "
    "dataloader.test.num_workers=0)"
)
_LONGEST = 2000  # letters, of what is told of an error

_told: list[BaseException] = []  # by this process
_in_a_program = False  # which ends when a run does; else whoever has called one goes on


class UserError(Exception):
    """A wrong value, file or machine; its message says what to do about it."""


def explain(error: BaseException) -> str | None:
    """What a user is told of an error in one line; None for a bug, which keeps its trace.

    Names of others are in it as :func:`legible` makes them, and of a long line the two ends.
    """
    text = _explained(error)
    if text is not None and len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"
    return None if text is None else legible(text)


def _explained(error: BaseException) -> str | None:
    if error.__cause__ and _worker_ended(error) and _worker_ended(error.__cause__):
        error = error.__cause__  # which may know the signal
    text = " ".join(_IN_WORKER.sub(r"\1", str(error)).split())
    if isinstance(error, UserError):
        return text
    worker_ended = _worker_ended(error)
    if worker_ended and "signal" not in text:
        text = _ends_of_workers(error) or text
    if _lacks_shared_memory(error) or worker_ended and _SHARED_MEMORY.search(text):
        return (
            "the shared memory in which data loaders hand pictures over, /dev/shm, is too small "
            f"({text}): {MORE_SHARED_MEMORY}"
        )
    if worker_ended:
        return (
            f"a process that loads pictures has ended ({text}): if memory ran out, fewer of them "
            "take less, dataloader.train.num_workers and dataloader.test.num_workers"
        )
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name not in (None, "")]
        said = f"{' and '.join(names)}: {error.strerror}" if names else text
        if error.errno == errno.ENOENT and not names and _folder_is_gone():
            return "the folder that this was started in is gone: change to another"
        advice = _ADVICE.get(error.errno or 0)
        return f"{said}; {advice}" if advice else said or type(error).__name__
    if lacks_memory(error):
        # Of a GPU, what was asked for and what there is; more is about PyTorch's allocator.
        said = ". ".join(text.split(". ")[:3])
        return (
            f"not enough memory{f' ({said})' if said else ''}: smaller batches or pictures take "
            "less (dataloader.train.total_batch_size, train.accumulation_steps, --batch-size)"
        )
    if found := isinstance(error, RuntimeError) and _NO_COMPILER.search(text):
        return (
            f"PyTorch or Triton needs a compiler ({found[0]}): install gcc and g++, or do without, "
            "with compile=false, and on a GPU with STAGE_INTERACTOR_OPS=reference"
        )
    if isinstance(error, ValueError) and text.startswith(_ONE_VALUE):
        return (
            f"a norm cannot learn statistics from one number a channel ({text}): take larger "
            "pictures, more of them at a time (dataloader.train.total_batch_size, or fewer "
            "train.accumulation_steps), or statistics that stay (model.backbone.freeze_norm=true)"
        )
    if isinstance(error, RecursionError):
        return f"something in a file is nested too deeply ({text}); {_HINT}"
    if isinstance(error, ImportError):
        return text
    if type(error).__module__.startswith("omegaconf."):  # a key that a config lacks
        key = getattr(error, "full_key", None)
        return f"the config: {str(error).splitlines()[0]}" + (f" (key {key})" if key else "")
    if isinstance(error, ValueError):
        return f"{text or type(error).__name__}; {_HINT}" if _from_elsewhere(error) else text
    if isinstance(error, KeyError) and error.args and " " in str(error.args[0]):
        return " ".join(str(error.args[0]).split())  # a message, such as a catalog's
    return None


def call(program: str, function: Callable[..., Any], *arguments: Any, mistake: int = 2) -> int:
    """Calls what a program does; its exit status. Errors are told, see :func:`explain`.

    ``function`` returns an exit status, or None for 0; a mistake of the user gives ``mistake``.
    """
    open_streams()
    try:
        return function(*arguments) or 0
    except BrokenPipeError:  # what reads our output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:
        if _in_a_program and hasattr(end, "leave"):  # a run's that a signal has stopped
            end.leave()
        raise
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        return mistake if tell(program, error) else 1


def tell(program: str, error: BaseException) -> bool:
    """Writes what is told of an error to standard error; whether it is a mistake of the user."""
    text = explain(error)
    _told.append(error)
    mistake = text is not None
    if not mistake or os.environ.get(TRACE, "") not in ("", "0"):
        trace = getattr(error, "trace", None)  # of another process
        print(trace or "".join(traceback.format_exception(error)).rstrip(), file=sys.stderr)
    if text is None:
        text = (
            f"this is a bug ({type(error).__name__}): please report it with the lines above, the "
            "command and the versions that the log begins with"
        )
    with suppress(OSError):  # of a full disk, for example: the exit status is left to tell it
        print(f"{program}: {text}", file=sys.stderr, flush=True)
    return mistake


def legible(text: str) -> str:
    """A text in which names of others may be, without what a terminal would obey."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """What is written here lies at ``path``: an OSError that names no file, of a full disk for
    example, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno and not _lacks_shared_memory(error):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def _folder_is_gone() -> bool:
    try:
        return not os.getcwd()
    except FileNotFoundError:
        return True


def lacks_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, of the machine or of a GPU."""
    of_torch = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or of_torch or type(error).__name__ == "OutOfMemoryError"


def _lacks_shared_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):  # of a lock or a queue, which are files there
        full = error.errno == errno.ENOSPC and error.filename is None
        return full and "multiprocessing.synchronize" in map(_module, _frames(error))
    return isinstance(error, RuntimeError) and bool(_SHARED_MEMORY.search(str(error)))


def _worker_ended(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, EOFError)):  # it had something to hand over
        return _LOADER in map(_module, _frames(error))
    return isinstance(error, RuntimeError) and bool(_WORKER_ENDED.fullmatch(str(error)))


def _ends_of_workers(error: BaseException) -> str:
    """How processes of the loader that an error came through have ended.

    The error itself may be one of the connection to them, or PyTorch's, which has no reason: who
    is first to see that a process has ended, is chance.
    """
    workers = {
        worker.pid: worker
        for frame in _frames(error)
        if _module(frame) == _LOADER
        for worker in getattr(frame.f_locals.get("self"), "_workers", ())
    }
    # A process closes its files, which is what others see of it, a moment before it has ended.
    ended = multiprocessing.connection.wait([one.sentinel for one in workers.values()], 1)
    found = []
    for number, worker in workers.items():
        if worker.sentinel in ended:
            worker.join(1)
        if status := worker.exitcode:
            how = f"has ended with status {status}"
            if status < 0:
                how = f"is killed by signal: {signal.strsignal(-status)}"
            found.append(f"DataLoader worker (pid {number}) {how}")
    return ", ".join(found)


def _frames(error: BaseException) -> list[FrameType]:
    """Those that an error came through, the last one last."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def open_streams() -> None:
    """What is closed of standard input, output and errors becomes empty: a file that is opened
    must not get its number, and with it what libraries print."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # the lowest free number
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def leave_on_signals() -> None:
    """SIGTERM, Ctrl-C and SIGHUP end a program without a trace, until a run takes them to save."""
    global _in_a_program
    open_streams()
    _in_a_program = True
    _take_signals(leave_at_once, "SIGTERM", "SIGINT", "SIGHUP")


def end_on_signals() -> None:
    """The same of a program that has no run and has imported what it needs: no half file stays."""

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        with suppress(OSError):
            os.write(2, f"Stopped by {signal.Signals(number).name}.\n".encode())
        raise SystemExit(128 + number)

    _take_signals(end, "SIGTERM", "SIGHUP")
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def signals_wait() -> Iterator[None]:
    """For what is whole only together: a signal that would raise waits for the end, a second does
    not. One that ends the process by itself, and other threads, are left alone; within itself it
    changes nothing."""
    came: list[int] = []

    def hold(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            put_back()
            signal.raise_signal(number)

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    names = {getattr(handler, "__qualname__", "") for handler in before.values()}
    if (
        hold.__qualname__ in names
        or not before
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    try:
        for number in before:
            signal.signal(number, hold)
        yield
    finally:
        put_back()
        if len(came) == 1:
            signal.raise_signal(came[0])


def _take_signals(handler: Callable[[int, Any], None], *names: str) -> None:
    for name in names:
        number = getattr(signal, name, None)
        if number and (name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN):
            signal.signal(number, handler)


def leave_at_once(number: int, frame: Any) -> None:
    if not _told:  # else it is ending already
        name = signal.Signals(number).name
        os.write(2, f"Stopped by {name} while there was nothing to save.\n".encode())
    os._exit(128 + number)


def _from_elsewhere(error: BaseException) -> bool:
    """Whether the last frame of an error is of another package, whose words may need a trace."""
    frames = _frames(error)
    return not frames or not _module(frames[-1]).startswith(__package__ or "")
