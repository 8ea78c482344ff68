"""From the host to a device without waiting for it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class HostBatch:
    """Tensors that are filled on the host and go to a device by one transfer.

    Nothing waits for the transfer: the memory is pinned, and lies side by side.

    Args:
        device: where they go.
        specs: shape and precision of each.

    Attributes:
        tensors: to be filled.
    """

    def __init__(self, device: torch.device, *specs: tuple[Sequence[int], torch.dtype]):
        self.device = device
        self._specs = [(tuple(shape), dtype) for shape, dtype in specs]
        self._buffer: Tensor | None = None
        if device.type == "cuda":
            size = sum(_bytes(*spec) for spec in self._specs)
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.tensors = self._views(self._buffer)
        else:
            self.tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in self._specs]

    def to_device(self) -> list[Tensor]:
        """The tensors on the device."""
        if self._buffer is None:
            return [tensor.to(self.device) for tensor in self.tensors]
        return self._views(self._buffer.to(self.device, non_blocking=True))

    def _views(self, buffer: Tensor) -> list[Tensor]:
        parts = buffer.split([_bytes(*spec) for spec in self._specs])
        return [
            part[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for part, (shape, dtype) in zip(parts, self._specs)
        ]


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of a tensor, rounded up so that the next one may be of any precision."""
    return -(-math.prod(shape) * dtype.itemsize // 16) * 16


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
