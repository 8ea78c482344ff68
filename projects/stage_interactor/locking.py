"""One run, or job, at a time writes into an output folder."""

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import UserError, naming
from .writing import is_at

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("stage_interactor.engine")

NAME = "train.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# Held by this process, which a system's lock does not keep from itself: open files by their paths.
_here: dict[str, int] = {}


class FolderInUseError(UserError):
    """Another run writes into the output folder."""


@contextmanager
def folder_lock(
    folder: str, wait: float, name: str = NAME, setting: str = "train.output_dir"
) -> Iterator[None]:
    """Holds a folder, which is made if need be, for the run of this process and those it starts.

    The system lets go of the lock when the process ends, however that is; the file of the lock,
    which says whose it is, may then stay, and is no obstacle. Where the file system has no locks,
    the file counts as long as the process lives that it names, if that can be known.

    Args:
        folder: of the run.
        wait: for another run to end, in seconds.
        name: of the file.
        setting: that another folder is named with.

    Raises:
        FolderInUseError: it has not ended by then.
        OSError: nothing can be written there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from error
    path = _path(folder, name)
    deadline, told = time.monotonic() + wait, False
    while (file := _acquire(path)) is None:
        holder = _described(path)
        if time.monotonic() >= deadline:
            raise FolderInUseError(
                f"{folder} is in use by another run, {holder} ({path}), still after {wait:g} s: "
                f"end it, wait for it, or name another {setting}"
            )
        if not told:
            logger.warning(f"{folder} is in use by another run, {holder}: waiting for its end")
            told = True
        time.sleep(0.2)
    _here[path] = file
    try:
        yield
    finally:
        file = _here.pop(path)
        with contextlib.suppress(OSError):
            # Before it is let go: nobody gets a file that is not there any more.
            if is_at(os.fstat(file), path):  # not another's
                os.unlink(path)
        os.close(file)


def keep_lock(folder: str) -> None:
    """To be called before something is written there: somebody may have emptied the folder.

    Raises:
        FolderInUseError: and begun another run in it.
        FileNotFoundError: or removed it.
    """
    path = _path(folder)
    if path not in _here or is_at(os.fstat(_here[path]), path):
        return
    held = _here.pop(path)
    try:
        file = _acquire(path)
        if file is None:
            raise FolderInUseError(
                f"{path} was removed, and {folder} is in use by another run now, "
                f"{_described(path)}: this one ends"
            )
        _here[path] = file
    except FileNotFoundError as error:
        told = "the folder was removed while the run writes to it"
        raise FileNotFoundError(errno.ENOENT, told, folder) from error
    finally:
        _here.setdefault(path, held)
    os.close(held)
    logger.warning(f"{path} was removed while the run needs it: made anew")


def _path(folder: str, name: str = NAME) -> str:
    return os.path.join(os.path.realpath(folder), name)


def _acquire(path: str) -> int | None:
    """The open file if the lock is ours; None if it is another's."""
    if path in _here:
        return None
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    file = os.open(path, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, and no file: remove it", path)
        if not _lock(file):
            if _lives(_record(path)):
                os.close(file)
                return None
            logger.warning(
                f"{path}: the file system has no locks; a second run of another machine in this "
                "folder would not be noticed"
            )
        if not is_at(os.fstat(file), path):  # it was removed in between
            os.close(file)
            return None
        with naming(path):
            os.ftruncate(file, 0)
            os.write(file, json.dumps(_ourselves()).encode())
        return file
    except BlockingIOError:
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def _lock(file: int) -> bool:
    """Whether the file system has locks; raises BlockingIOError if this one is another's."""
    if fcntl is None:
        return False
    try:
        # Not flock, which forked loaders would share, and hold on to.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, "locked") from error
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _ourselves() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> str | None:
    """Tells a process from another one that later has the same number, also after a reboot."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            return f"{boot.read().strip()} {stat.read().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


def _record(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            record = json.loads(file.read(10_000))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _lives(record: dict[str, Any]) -> bool:
    """Whether the process that a lock names is there; of another machine's that is not known."""
    pid = record.get("pid")
    if not isinstance(pid, int) or pid < 1 or record.get("host") != socket.gethostname():
        return False
    if record.get("started"):
        return _started(pid) == record["started"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _described(path: str) -> str:
    if path in _here:  # to read the file, and close it, would give the lock away
        return "of this process"
    record = _record(path)
    if not record:
        return "of which nothing is known"
    return f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')}"
