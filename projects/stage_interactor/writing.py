"""Files are written whole or not at all, and never through a link."""

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


class _File(io.BufferedRandom):
    """Remembers what went wrong: libraries that write files hide it behind errors of their own.

    The file below it is C's alone. A signal that raises between a write and the record of it, as it
    can where Python writes, would have the same bytes written twice.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        with self._remembered():
            return super().write(data)

    def flush(self) -> None:
        with self._remembered():
            super().flush()

    def seek(self, target: int, whence: int = os.SEEK_SET) -> int:
        with self._remembered():  # it writes what is in the buffer
            return super().seek(target, whence)

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            raise


def _created(path: str) -> _File:
    """A file where nothing is, with a name, which some who write into it ask for."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    return _File(io.FileIO(path, "w+b", opener=lambda name, _: os.open(name, flags, 0o666)))


@contextlib.contextmanager
def _closed(file: _File) -> Iterator[_File]:
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # what is in its buffer still cannot be written
            file.close()


@contextlib.contextmanager
def new_file(path: str | os.PathLike, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """Gives a file its name only after all of it is written; after an error nothing is left.

    A link at its place is replaced by the file: what it leads to stays as it is.

    Args:
        path: of the file; its folder is there.
        sync: wait until it is on disk, so that it survives a power failure.

    Raises:
        OSError: with ``path`` as its ``filename``: it cannot be written, or its place is taken by
            something else than a file.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    with _named(path):
        _require_file_or_nothing(path)
        # A name that nobody can guess, and that is short enough for any file system.
        temporary = os.path.join(folder, f"{name[:50]}.{secrets.token_hex(6)}.tmp")
        opened = _created(temporary)
    try:
        with _closed(opened) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        with _named(path):
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if opened.error is not None and isinstance(error, Exception):
            raise OSError(opened.error.errno, opened.error.strerror, path) from error
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, path) from error
        raise


@contextlib.contextmanager
def growing_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A new file that has its name from the start: for what grows for hours.

    After an error it stays, as far as it is written. What was at its place is gone; of a link the
    link itself.

    Raises:
        OSError: as :func:`new_file`.
    """
    path = os.fspath(path)
    with _named(path):
        _require_file_or_nothing(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        opened = _created(path)
    try:
        with _closed(opened) as file:
            yield file
            file.flush()
    except BaseException as error:
        if opened.error is not None and isinstance(error, Exception):
            raise OSError(opened.error.errno, opened.error.strerror, path) from error
        raise


def write_atomically(
    path: str | os.PathLike, write: Callable[[IO[bytes]], Any], *, sync: bool = True
) -> None:
    """The same of a function that writes; see :func:`new_file`."""
    with new_file(path, sync=sync) as file:
        write(file)


def write_text(path: str | os.PathLike, text: str, *, errors: str = "backslashreplace") -> None:
    """UTF-8; what it cannot hold, as in names of files that are no UTF-8, as ``errors`` says."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors)))


class AppendedFile:
    """A file that grows by whole records: what does not fit on the disk leaves nothing behind.

    Attributes:
        path: of the file.

    Raises:
        OSError: it names the file, which cannot be opened, see :func:`open_to_append`, or written
            to.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file = open(_to_append(self.path), "ab", buffering=0)
        self._opened = os.fstat(self._file.fileno())

    def is_there(self) -> bool:
        """Whether what is appended is found under the file's name: nobody has removed it."""
        return is_at(self._opened, self.path)

    def append(self, record: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            with _named(self.path):
                while record:
                    record = record[self._file.write(record) :]
                os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()


def is_at(opened: os.stat_result, path: str) -> bool:
    """Whether a file that was opened is the one of that name."""
    try:
        return os.path.samestat(os.stat(path), opened)
    except FileNotFoundError:
        return False


def open_to_append(path: str | os.PathLike) -> IO[str]:
    """A text file that grows, such as a log.

    Raises:
        OSError: with its ``filename``: it cannot be opened, or is a link or no file, which are not
            written to.
    """
    # By an opener the file keeps its name, which a full disk is told with.
    return open(
        os.fspath(path), "a", encoding="utf-8", errors="backslashreplace", opener=_to_append
    )


def _to_append(path: str, flags: int = 0) -> int:
    """The descriptor of a file that is written to at its end."""
    if os.path.islink(path):
        raise OSError(errno.ELOOP, f"it is a link, to {os.readlink(path)}: remove it", path)
    with _named(path):
        _require_file_or_nothing(path)
        flags |= os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        return os.open(path, flags, 0o666)


def inside(output_dir: str | os.PathLike, name: str, *, folder: bool = False) -> str:
    """The path of a file, or a folder, in one that is written to, which may be a link itself.

    Raises:
        OSError: with the path as its ``filename``: it lies elsewhere, by ``..``, as an absolute
            path or because a folder on the way is a link.
    """
    path = os.path.join(output_dir, name)
    place = os.path.realpath(path if folder else os.path.dirname(path))
    if ".." in Path(name).parts or not Path(place).is_relative_to(os.path.realpath(output_dir)):
        raise OSError(errno.ELOOP, f"it leads out of {os.fspath(output_dir)}, to {place}", path)
    return path


def refuse_links(folder: str | os.PathLike, names: tuple[str, ...]) -> None:
    """Raises an OSError if one of the files that others write into a folder is a link."""
    for name in names:
        path = os.path.join(folder, name)
        if os.path.islink(path):
            told = f"it is a link, to {os.readlink(path)}, which is not written through: remove it"
            raise OSError(errno.ELOOP, told, path)


def _require_file_or_nothing(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, and no file", path)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors are of this path, whatever other name was opened."""
    try:
        yield
    except ValueError as error:  # a NUL in it
        raise OSError(errno.EINVAL, str(error), path) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
