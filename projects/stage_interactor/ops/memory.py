"""Memory that is freed stays with the process, which needs it again in the next step.

glibc returns large blocks to the system as soon as they are free, and the next step waits until the
system has cleared the same pages again: a tenth of a training's time on a CPU, and much more where
memory is short.
"""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "STAGE_INTERACTOR_KEEP_MEMORY"
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt
_MOST_MAPPED = 2**16  # blocks; glibc's own choice
_LARGEST = 2**25  # block that glibc, by itself, learns to keep
_OTHERS = re.compile(rb"/[^/\n]*(jemalloc|tcmalloc|mimalloc|hoard|scalable|snmalloc)[^/\n]*$", re.M)


@contextmanager
def kept_memory() -> Iterator[bool]:
    """Inside of it freed memory is kept; behind it, what is free is returned.

    Nothing is done where glibc does not allocate, where its environment variables (``MALLOC_...``,
    ``GLIBC_TUNABLES``) or another allocator say that somebody has chosen, and with
    ``STAGE_INTERACTOR_KEEP_MEMORY=0``. Gives whether it is kept.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    libc = _glibc() if _is_wanted() else None
    if libc is None:
        yield False
        return
    # A block with a mapping of its own is returned at once. Older versions take no threshold beyond
    # 32 MiB, and the gradient of a stage's last layer alone is that large.
    kept = bool(libc.mallopt(_MMAP_MAX, 0))
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield kept
    finally:  # as far as glibc goes by itself
        libc.mallopt(_MMAP_MAX, _MOST_MAPPED)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        libc.malloc_trim(0)


def _is_wanted() -> bool:
    wanted = os.environ.get(_VARIABLE) or "1"
    if wanted not in ("0", "1"):
        raise ValueError(
            f"the environment variable {_VARIABLE} must be 0, freed memory goes back to the "
            f"system, or 1, it is kept; got {wanted!r}"
        )
    return wanted == "1"


def _glibc() -> ctypes.CDLL | None:
    """The library, if it allocates and nobody has told it how."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return None
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return None
        with open("/proc/self/maps", "rb") as file:
            if _OTHERS.search(file.read()):
                return None
        libc = ctypes.CDLL(None)
        libc.mallopt, libc.malloc_trim  # noqa: B018
        return libc
    except (AttributeError, OSError, ValueError):  # other systems
        return None
