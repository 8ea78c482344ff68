"""Recording what a GPU does, to have it done again without Python.

A recording holds addresses and sizes: it reads its inputs where they were and leaves its results
where they were. Whatever the host would have to decide, wait for or send cannot be in it.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .backend import current_ops

logger = logging.getLogger(__name__)

_WARM_UPS = 2  # kernels are compiled, libraries choose theirs
_Result = TypeVar("_Result")


# By device: what is recorded in two parts, such as a backward pass, is on one stream.
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def warm_up(work: Callable[[], object], device: torch.device) -> None:
    """Calls ``work`` on the stream that it is recorded on."""
    with torch.cuda.device(device):
        stream, current = _stream(device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(stream)


def record(
    work: Callable[[], _Result], device: torch.device, pool: Any
) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """Records what ``work`` launches on the device.

    Args:
        work: from tensors that stay where they are; warmed up.
        device: that of the tensors, whichever the process's current one is.
        pool: of memory (``torch.cuda.graph_pool_handle()``): shared by recordings of which none
            needs what another has computed.

    Returns:
        the graph, and what ``work`` gave: tensors that every replay fills anew.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those that fetch data, may do what a recording forbids.
    mode = "thread_local"
    with torch.cuda.device(device):
        with torch.cuda.graph(graph, pool, _stream(device), capture_error_mode=mode):
            result = work()
    return graph, result


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks see, or change, what passes through it: a replay calls none."""
    return torch.nn.modules.module._has_any_global_hook() or any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        for part in module.modules()
    )


class Replayed:
    """A function of tensors whose calls are replayed from the third of the same shapes on.

    On CUDA, that is; elsewhere it is called. A copy has recorded nothing.
    Calls from several threads are in turn; those on another stream than the first are computed.

    Args:
        function: without gradient, from tensors to tensors. It may not wait for the device, and
            what it does may depend on shapes and on the module's weights alone.
        module: whose weights they are; where they have moved, or it has hooks, nothing recorded is
            replayed.
        most: so many shapes are recorded; others are computed as before.

    Attributes:
        refused: why nothing is recorded any more, if so.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], module: nn.Module, most: int = 64
    ):
        self._function = function
        self._module = module
        self._most = most
        self._seen: dict[tuple, int] = {}
        self._recorded: dict[tuple, tuple] = {}
        self._lock = threading.Lock()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self.refused: str | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if inputs[0].device.type != "cuda" or is_watched(self._module):
            return self._function(*inputs)
        shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs]
        weights = chain(self._module.parameters(), self._module.buffers())
        addresses = hash(tuple(weight.data_ptr() for weight in weights))
        precision = torch.get_float32_matmul_precision()
        key = (*shapes, addresses, precision, current_ops(), *_autocast())
        stream = torch.cuda.current_stream(inputs[0].device)
        with self._lock:
            if key not in self._recorded:
                self._seen[key] = self._seen.get(key, 0) + 1
                if self._seen[key] > 2 and not self.refused and len(self._recorded) < self._most:
                    self._try_to_record(key, inputs, stream)
            if key in self._recorded and stream == self._stream:
                graph, static, results = self._recorded[key]
                for place, tensor in zip(static, inputs):
                    place.copy_(tensor)
                graph.replay()
                return [result.clone() for result in results]  # the next replay fills them anew
        return self._function(*inputs)

    def __reduce__(self) -> tuple:
        return Replayed, (self._function, self._module, self._most)

    def _try_to_record(
        self, key: tuple, inputs: Sequence[Tensor], stream: torch.cuda.Stream
    ) -> None:
        if self._stream is None:
            self._stream, self._pool = stream, torch.cuda.graph_pool_handle()
        enabled, dtype = _autocast()
        static = [tensor.clone() for tensor in inputs]

        def work() -> Sequence[Tensor]:
            # Weights that autocast keeps for later uses would be gone at a replay.
            with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
                return self._function(*static)

        try:
            warm_up(work, static[0].device)
            graph, results = record(work, static[0].device, self._pool)
        except Exception as error:  # whatever a part of one's own does that cannot be recorded
            self.refused = str(error).partition("\n")[0]
            logger.info(f"The model is not replayed as a CUDA graph: {self.refused}")
        else:
            self._recorded[key] = graph, static, results


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
