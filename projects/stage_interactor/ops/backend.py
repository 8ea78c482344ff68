"""Which implementation of the operations runs: the fast one, or the reference.

``fast`` is the default: on CUDA the Triton kernels, on a CPU PyTorch's own operations in an order
that moves less memory; other devices run the reference. ``reference`` computes as the authors' code
does; it is the yardstick of the benchmarks and the oracle of the tests. Both give the same results
but for rounding.

The environment variable ``STAGE_INTERACTOR_OPS=reference`` chooses for a whole process,
:func:`use_ops` for a part of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

BACKENDS = ("fast", "reference")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {BACKENDS}, got {name!r}")
    return name


_current = _checked(os.environ.get("STAGE_INTERACTOR_OPS") or "fast", "STAGE_INTERACTOR_OPS")


def current_ops() -> str:
    """``"fast"`` or ``"reference"``."""
    return _current


_HAS_TRITON = find_spec("triton") is not None

# With fewer channels a group, a CPU loses more by handling many small pieces than it saves.
_SMALLEST_WIDTH = 32


def runs_reference(device: torch.device) -> bool:
    """Whether operations on this device run as the reference: where that was chosen, and on devices
    that have nothing else."""
    if _current == "reference":
        return True
    return device.type != "cpu" and (device.type != "cuda" or not _HAS_TRITON)


def is_narrow(device: torch.device, group_dim: int) -> bool:
    """Whether groups have so few channels, on a CPU, that what is computed from them is kept for
    the backward pass and not computed again piece by piece."""
    return device.type == "cpu" and group_dim < _SMALLEST_WIDTH


def runs_kernels(maps: torch.Tensor) -> bool:
    """Whether what there is for maps (B, C, H, W) in channels_last on CUDA takes these."""
    return (
        maps.device.type == "cuda"
        and not runs_reference(maps.device)
        and maps.is_contiguous(memory_format=torch.channels_last)
    )


@contextmanager
def use_ops(name: str) -> Iterator[None]:
    """The operations inside of the ``with`` are the fast ones or the reference.

    A backward pass runs what its forward pass recorded, wherever it is called; with
    ``recompute_mixing`` it has to be called inside too.

    Raises:
        ValueError: for another name.
    """
    global _current
    before, _current = _current, _checked(name, "the name of the operations")
    try:
        yield
    finally:
        _current = before
