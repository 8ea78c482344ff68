"""Pictures by address: paths of this machine, and what fsspec reads, such as ``s3://``."""

import errno
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import fsspec
import numpy as np
from fsspec.core import url_to_fs

from ...data.images import IMAGE_SUFFIXES, ImageReadError, read_image, reason_of
from ...errors import UserError
from ...untrusted.pictures import PictureTooLargeError, max_pixels, most_bytes
from ..sources import VIDEOS, find_sources, require_some

_TRIES, _PAUSE = 3, 1.0  # of a download; seconds between them, and twice as many each time
# Of disks, of networks that folders come from, and of too many open files: no picture's own fault.
_MACHINE = {
    getattr(errno, name, None)
    for name in "EIO EMFILE ENFILE ENODEV ENOMEM ENOTCONN ENXIO EREMOTEIO ESHUTDOWN ESTALE "
    "ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNRESET ECONNREFUSED".split()
} - {None}
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class UnreachableError(ImageReadError):
    """The place where a picture lies did not answer, or refused: that may be better later."""


def is_remote(address: str) -> bool:
    """Whether fsspec reads it, by the protocol that it names, and not this machine's own files."""
    return "://" in address or "::" in address and not os.path.exists(address)


def _require_harmless(address: str) -> None:
    """Raises a ValueError for what fsspec may run, in an address of others."""
    if any(part.startswith("reference:") or part == "reference" for part in address.split("::")):
        raise ValueError(
            f"{address}: what reference:// leads to can be made to run anything; name the files "
            "themselves"
        )


@contextmanager
def answering(address: str, missing: bool = False) -> Iterator[None]:
    """What a file system raises, each its own kinds, becomes an error that names the address.

    Args:
        missing: also that it is not there, which else is left to whoever looks for it.
    """
    try:
        yield
    except (ImportError, ValueError, MemoryError, UserError):  # fsspec's own, and this project's
        raise
    except Exception as error:
        left_alone = isinstance(error, FileNotFoundError) and not missing
        if left_alone or isinstance(error, OSError) and error.filename:  # which it names itself
            raise
        raise UserError(f"{address}: {reason_of(error)}") from error


def find_pictures(
    places: Iterable[str | os.PathLike],
) -> tuple[list[str], Counter[str]]:
    """The pictures that paths, addresses, folders (with all below them) and globs name.

    Returns:
        Each once, in order: paths from the root on, and whole addresses. And how many other files
        lie in the folders, videos among them, by suffix in lower case ("" where there is none).

    Raises:
        FileNotFoundError: one of them names nothing, or a folder without pictures.
        ValueError: one names a video, or no file system that fsspec knows.
        UserError: the place of one does not answer, or refuses.
    """
    found: dict[str, None] = {}
    others: Counter[str] = Counter()
    for place in (os.fspath(place) for place in places):
        if place.lower().endswith(VIDEOS) and not os.path.isdir(place):
            raise ValueError(
                f"{place}: a video is not divided among processes; predict it without --num-gpus, "
                "--ray and --output-format"
            )
        if is_remote(place):
            with answering(place):
                pictures, passed_over = _find_remote(place)
        else:
            pictures, passed_over = _find_here(place)
        if not pictures:
            raise FileNotFoundError(f"{place}: no picture in it ({' '.join(IMAGE_SUFFIXES)})")
        found.update(dict.fromkeys(pictures))
        others += passed_over
    require_some(found)
    return list(found), others


def _find_here(place: str) -> tuple[list[str], Counter[str]]:
    sources, others = find_sources([place])
    pictures = [os.path.abspath(source.path) for source in sources if not source.is_video]
    others += _suffixes(source.path for source in sources if source.is_video)
    return pictures, others


def _find_remote(place: str) -> tuple[list[str], Counter[str]]:
    _require_harmless(place)
    files, path = url_to_fs(place)
    first, chain, rest = place.partition("::")  # such as zip://folder::s3://bucket/file.zip
    protocol = first.partition("://")[0]
    if files.isdir(path):
        names = files.find(path)
    elif files.exists(path):
        return [place], Counter()
    else:
        names = [name for name in files.glob(path) if not files.isdir(name)]
        if not names:
            raise FileNotFoundError(f"{place}: there is no such file or folder")
    pictures = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    others = _suffixes(name for name in names if not name.lower().endswith(IMAGE_SUFFIXES))
    named = [
        f"{protocol}://{name}{chain}{rest}" if chain else files.unstrip_protocol(name)
        for name in sorted(pictures)
    ]
    return named, others


def _suffixes(paths: Iterable[str]) -> Counter[str]:
    return Counter(os.path.splitext(path)[1].lower() for path in paths)


def read_address(address: str) -> np.ndarray:
    """The picture of a path or an address, uint8 (H, W, 3), RGB; nothing is kept on the disk.

    Raises:
        ImageReadError: there is none, or it cannot be read; an :class:`UnreachableError` where it
            could not be fetched, in three tries, or its disk or the system failed.
        PictureTooLargeError: it has too many pixels, or bytes.
    """
    if not is_remote(address):
        try:
            return read_image(address)
        except ImageReadError as error:
            if getattr(error.__cause__, "errno", None) in _MACHINE:
                raise UnreachableError(address, error.reason) from error
            raise
    return read_image(address, content=_fetch(address))


def _fetch(address: str) -> bytes:
    _require_harmless(address)
    most = most_bytes()
    for number in range(_TRIES):
        try:
            with fsspec.open(address, "rb") as file:
                content = file.read(most + 1)  # type: ignore[attr-defined]
            break
        except _NO_FILE as error:
            raise ImageReadError(address, f"there is no such file ({error})") from error
        except MemoryError:
            raise
        except Exception as error:  # each file system has errors of its own
            if number + 1 == _TRIES:
                told = f"it could not be fetched ({reason_of(error)})"
                raise UnreachableError(address, told) from error
            time.sleep(_PAUSE * 2**number)
    if len(content) > most:
        raise PictureTooLargeError(f"its file has more than {most:,} bytes", max_pixels())
    return content
