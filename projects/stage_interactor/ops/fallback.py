"""A kernel that cannot start on a machine: the same in plain PyTorch takes its place."""

import logging
import subprocess
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Kernels, with the shapes they were launched for, that could not start; not tried again.
_failed: set[Hashable] = set()

# In the words of Triton and of CUDA's driver. What else goes wrong on a GPU (no memory, an assert
# or an illegal address in a kernel) is not the launch's, and is told.
_CANNOT_START = (
    "too many resources requested", "out of resource", "no kernel image", "image is invalid",
    "invalid device function", "unsupported toolchain", "unsupported ptx", "ptxas", "ptx jit",
    "passmanager", "c compiler", "active drivers", "libcuda",
)  # fmt: skip


def launch_or(
    key: Callable[[], Hashable], launch: Callable[[], Result], plain: Callable[[], Result]
) -> Result:
    """What ``launch`` gives; if its kernel cannot start here, what ``plain`` gives.

    That is told once for each key, and the kernel is not tried again. Other errors pass through.

    Args:
        key: gives the kernel's name and what it was compiled for; called only after a failure.
        launch, plain: compute the same.
    """
    if not _failed or key() not in _failed:
        try:
            return launch()
        except Exception as error:
            if not _cannot_start(error):
                raise
            _failed.add(key())
            first = next(iter(str(error).strip().splitlines()), "")
            logger.warning(
                "The CUDA kernel of %s cannot start on this machine (%s: %s). PyTorch's own "
                "operations take its place, which is slower; results are the same but for rounding",
                key(), type(error).__name__, first[:200],
            )  # fmt: skip
    with torch.autocast("cuda", enabled=False):
        return plain()


def _cannot_start(error: Exception) -> bool:
    from triton.errors import TritonError

    if isinstance(error, (TritonError, subprocess.SubprocessError, OSError, ImportError)):
        return True  # not compiled: limits, no compiler, no place for what it writes
    words = str(error).lower()
    told = isinstance(error, (RuntimeError, AssertionError))
    return told and any(phrase in words for phrase in _CANNOT_START)
