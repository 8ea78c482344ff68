"""Recording what a GPU does, to have it done again without Python.

A recording holds addresses and sizes: it reads its inputs where they were and leaves its results
where they were. Whatever the host would have to decide, wait for or send cannot be in it.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_WARM_UPS = 2  # kernels are compiled, libraries choose theirs
_Result = TypeVar("_Result")


def warm_up(work: Callable[[], object]) -> None:
    """Calls ``work`` on a stream of its own, as a recording will."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    current.wait_stream(stream)


def record(
    work: Callable[[], _Result], pool: tuple[int, int]
) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """Records what ``work`` launches on the current device.

    Args:
        work: from tensors that stay where they are; warmed up.
        pool: of memory (``torch.cuda.graph_pool_handle()``): shared by recordings of which none
            needs what another has computed.

    Returns:
        the graph, and what ``work`` gave: tensors that every replay fills anew.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those that fetch data, may do what a recording forbids.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()
    return graph, result


class Replayed:
    """A function of tensors whose calls are replayed from the third of the same shapes on.

    Calls from several threads are in turn; those on another stream than the first are computed.

    Args:
        function: without gradient, from tensors to tensors. It may not wait for the device, and
            what it does may depend on shapes alone.
        most: so many shapes are recorded; others are computed as before.

    Attributes:
        refused: why nothing is recorded any more, if so.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], most: int = 64):
        self._function = function
        self._most = most
        self._seen: dict[tuple, int] = {}
        self._recorded: dict[tuple, tuple] = {}
        self._lock = threading.Lock()
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None
        self.refused: str | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs]
        key = (*shapes, torch.get_float32_matmul_precision(), *_autocast())
        stream = torch.cuda.current_stream()
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

    def _try_to_record(self, key: tuple, inputs: Sequence[Tensor], stream) -> None:
        if self._stream is None:
            self._stream, self._pool = stream, torch.cuda.graph_pool_handle()
        enabled, dtype = _autocast()
        static = [tensor.clone() for tensor in inputs]

        def work() -> Sequence[Tensor]:
            # Weights that autocast keeps for later uses would be gone at a replay.
            with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
                return self._function(*static)

        try:
            warm_up(work)
            assert self._pool is not None
            graph, results = record(work, self._pool)
        except RuntimeError as error:
            self.refused = str(error).partition("\n")[0]
        else:
            self._recorded[key] = graph, static, results


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
