"""The decoder's forward and backward pass as CUDA graphs: in training Python is what is slow.

A pass launches thousands of small kernels, each in less time than Python needs to ask for it.
Recorded once, they are replayed by one call. Images may have any size: the pyramid lies in a buffer
that is as long as the longest so far, and the sizes of its maps are read on the device. What a
recording fixes are the number of images and of queries, and the precision.
"""

import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..modeling import Decoder
from ..modeling.extensions.denoising import MaskedOverlapAttention
from ..modeling.extensions.fixed_point import FixedPointDecoder
from ..modeling.extensions.hybrid_matching import HybridDecoder
from ..modeling.extensions.query_groups import GroupedDecoder
from ..modeling.extensions.recollection import RecollectingDecoder
from ..modeling.stage import StageOutput
from ..modeling.transfer import to_device
from ..ops import Pyramid
from ..ops.backend import runs_reference
from ..ops.cuda_graph import is_watched, record, warm_up

logger = logging.getLogger("stage_interactor.engine")

_MOST = 4  # recordings: numbers of images, where a batch is split into parts that are not equal
_GROWTH = 1.25  # of a buffer that has become too short


class DecoderGraph:
    """Computes what a decoder computes, by replaying it where that is possible.

    Args:
        decoder: on CUDA, in training. Weights, hooks and state stay its own.
        required: record parts of one's own too, and raise where that cannot be, instead of going
            on without.

    Attributes:
        reason: why nothing is recorded any more, once that is so.
    """

    def __init__(self, decoder: Decoder, required: bool = False):
        self._decoder = decoder
        self._required = required
        self._recordings: dict[tuple, _Recording] = {}
        self.reason: str | None = None
        if any(stage.recompute_mixing for stage in decoder.stages):
            self._go_without("model.decoder.recompute_mixing asks for random states on the way")
        elif isinstance(decoder, FixedPointDecoder):
            self._go_without("FixedPointDecoder draws for each step whether it gets noise")
        elif isinstance(decoder, (GroupedDecoder, HybridDecoder, RecollectingDecoder)):
            self._go_without(f"{type(decoder).__name__} takes several sets of queries in turn")
        elif any(isinstance(stage.attention, MaskedOverlapAttention) for stage in decoder.stages):
            self._go_without("MaskedOverlapAttention has another mask for each batch")
        elif not required and (foreign := _parts_of_ones_own(decoder)):
            self._go_without(
                f"{', '.join(foreign)} may do what a recording does not see; train.cuda_graph=true "
                "replays it all the same"
            )

    def forget(self) -> None:
        """Gives the memory of what is recorded back."""
        self._recordings.clear()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside of the ``with`` the decoder's calls are replayed."""
        decoder: Any = self._decoder
        decoder.forward = self  # of this object alone, and no part of its state
        try:
            yield
        finally:
            del decoder.forward

    def __call__(
        self, features: Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> list[StageOutput]:
        """See :meth:`Decoder.forward`."""
        recording = self._recording(features, content, xyzr)
        if recording is None:
            return type(self._decoder).forward(self._decoder, features, content, xyzr)
        inputs = *features, content, xyzr
        if torch.is_grad_enabled():
            fields = _Replay.apply(recording, len(features), *inputs, *recording.parameters)
        else:
            fields = recording.forward(features, content, xyzr)
        return [StageOutput(*stage) for stage in zip(*(field.unbind() for field in fields))]

    def _recording(
        self, maps: Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> "_Recording | None":
        """What can be replayed for these inputs, made if need be."""
        if self.reason is not None or not self._can_be_replayed(maps):
            return None
        device, dtype = maps[0].device.type, maps[0].dtype
        autocast = torch.is_autocast_enabled(device)
        if autocast and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device)
        precision = autocast and torch.get_autocast_dtype(device)
        shape = len(maps), *maps[0].shape[:2], *content.shape[1:]
        key = *shape, dtype, content.dtype, precision, torch.get_float32_matmul_precision()
        pixels = sum(level.shape[2] * level.shape[3] for level in maps)
        found = self._recordings.get(key)
        if found is not None and found.is_of(self._decoder) and found.pixels >= pixels:
            return None if found.is_pending() else found
        if not torch.is_grad_enabled() or (found is None and len(self._recordings) >= _MOST):
            return None
        if found is not None:
            pixels = max(pixels, int(_GROWTH * found.pixels))
            del self._recordings[key], found  # its memory serves the next one
        start = time.perf_counter()
        try:
            made = _Recording(self._decoder, pixels, dtype, maps, content, xyzr)
        except Exception as error:  # whatever a part of one's own does that cannot be recorded
            if self._required:
                raise
            self._recordings.clear()
            self._go_without(str(error).partition("\n")[0])
            return None
        self._recordings[key] = made
        logger.info(
            f"The decoder is replayed from here on (train.cuda_graph), recorded for {shape[1]} "
            f"images of up to {pixels} pixels of all levels in {time.perf_counter() - start:.1f} s"
        )
        return made

    def _can_be_replayed(self, maps: Sequence[Tensor]) -> bool:
        """Whether these inputs can, as things are now."""
        return (
            maps[0].device.type == "cuda"
            and not runs_reference(maps[0].device)
            and not torch.are_deterministic_algorithms_enabled()
            and len({level.dtype for level in maps}) == 1
            and not is_watched(self._decoder)
        )

    def _go_without(self, reason: str) -> None:
        self.reason = reason
        logger.warning(f"The decoder is not replayed (train.cuda_graph): {reason}")


class _Recording:
    """Both passes for one number of images, and up to a number of pixels of all levels."""

    def __init__(
        self,
        decoder: Decoder,
        pixels: int,
        dtype: torch.dtype,
        maps: Sequence[Tensor],
        content: Tensor,
        xyzr: Tensor,
    ):
        device = content.device
        batch, width = maps[0].shape[:2]
        self.pixels = pixels
        self.parameters = [p for p in decoder.parameters() if p.requires_grad]
        self._addresses = _addresses(decoder)
        self._pending: weakref.ref | None = None
        self._value = torch.zeros(batch, pixels, width, dtype=dtype, device=device)
        self._content = content.detach().clone()
        self._xyzr = xyzr.detach().clone()
        self._map_sizes = torch.ones(len(maps), 2, dtype=torch.int32, device=device)
        self._load(maps, content, xyzr)
        inputs = self._value.requires_grad_(), self._content.requires_grad_()
        enabled = torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type)

        def forward() -> list[Tensor]:
            # Weights are cast in it, in every replay: they change.
            with torch.autocast(device.type, precision, enabled=enabled, cache_enabled=False):
                pyramid = Pyramid.in_buffer(self._value, self._map_sizes)
                outputs = type(decoder).forward(decoder, pyramid, self._content, self._xyzr)
                return [torch.stack(field) for field in zip(*outputs)]

        def backward() -> tuple[Tensor | None, ...]:
            pairs = [pair for pair in zip(self._outputs, self._grads) if pair[0].requires_grad]
            outputs, grads = zip(*pairs)
            leaves = [*inputs, *self.parameters]
            return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

        def both() -> None:
            self._outputs = forward()
            self._grads = [torch.zeros_like(output) for output in self._outputs]
            backward()

        # The backward pass is outside of autocast, as everywhere.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            warm_up(both, device)
            self._outputs.clear()
            pool = torch.cuda.graph_pool_handle()
            self._forward, self._outputs = record(forward, device, pool)
            self._grads = [torch.zeros_like(output) for output in self._outputs]
            self._backward, found = record(backward, device, pool)
        value, content_, *self.parameter_grads = found
        # None where nothing reads what the stages' parts were given.
        self.value_grad = torch.zeros_like(self._value) if value is None else value
        self.content_grad = torch.zeros_like(self._content) if content_ is None else content_
        self._outputs = [output.detach() for output in self._outputs]

    def is_of(self, decoder: Decoder) -> bool:
        """Whether the weights are where they were, and the same of them are trained."""
        return self._addresses == _addresses(decoder)

    def is_pending(self) -> bool:
        """Whether autograd may still ask for the backward pass of the last forward pass."""
        return self._pending is not None and self._pending() is not None

    def expect_backward(self, token: "_Token | None") -> None:
        """From now on, for as long as the token lives."""
        self._pending = None if token is None else weakref.ref(token)

    @torch.no_grad()
    def _load(self, maps: Sequence[Tensor], content: Tensor, xyzr: Tensor) -> None:
        sizes = torch.tensor([level.shape[-2:] for level in maps], dtype=torch.int32)
        self._map_sizes.copy_(to_device(sizes, self._map_sizes.device))
        ends = 0
        for level in maps:
            start, ends = ends, ends + level.shape[2] * level.shape[3]
            self._value[:, start:ends].copy_(level.flatten(2).transpose(1, 2))
        self._content.copy_(content)
        self._xyzr.copy_(xyzr)

    def forward(self, maps: Sequence[Tensor], content: Tensor, xyzr: Tensor) -> list[Tensor]:
        """Each field of the stages' outputs, stacked over the stages; for the caller to keep."""
        self._load(maps, content, xyzr)
        self._forward.replay()
        return [output.clone() for output in self._outputs]

    def backward(self, grads: Sequence[Tensor | None]) -> None:
        """Fills the gradients of the value, of the content and of the parameters."""
        for place, grad in zip(self._grads, grads):
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad)
        # What an earlier replay has given may still be a parameter's gradient, to be added to.
        for parameter, grad in zip(self.parameters, self.parameter_grads):
            kept = parameter.grad
            if kept is not None and grad is not None and kept.data_ptr() == grad.data_ptr():
                parameter.grad = kept.clone()
        self._backward.replay()


def _parts_of_ones_own(decoder: Decoder) -> list[str]:
    """Classes of modules that neither this package nor PyTorch has: what they do may depend on
    more than shapes, such as the iteration."""
    known = __name__.partition(".")[0], "torch"
    kinds = dict.fromkeys(type(module) for module in decoder.modules())
    return [k.__qualname__ for k in kinds if k.__module__.partition(".")[0] not in known]


def _addresses(decoder: Decoder) -> list[tuple[int, bool]]:
    return [(p.data_ptr(), p.requires_grad) for p in decoder.parameters()]


class _Token:
    """Of a forward pass: it lives as long as autograd's node of it."""


class _Replay(torch.autograd.Function):
    """Maps, content and positions, and the parameters, to the fields of the stages' outputs."""

    @staticmethod
    def forward(ctx, recording: _Recording, levels: int, *tensors: Tensor):
        maps, (content, xyzr) = tensors[:levels], tensors[levels : levels + 2]
        ctx.recording, ctx.token = recording, _Token()
        ctx.maps = [(level.shape, level.dtype) for level in maps]
        ctx.set_materialize_grads(False)
        recording.expect_backward(ctx.token)
        return tuple(recording.forward(maps, content, xyzr))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        recording: _Recording = ctx.recording
        recording.backward(grads)
        recording.expect_backward(None)
        of_maps, end = [], 0
        for shape, dtype in ctx.maps:
            start, end = end, end + shape[2] * shape[3]
            rows = recording.value_grad[:, start:end].transpose(1, 2)
            # Copies, for the next replay fills all of it anew; parameters see to themselves.
            of_maps.append(rows.unflatten(2, shape[2:]).to(dtype, copy=True))
        of_parameters = [g if g is None else g.detach() for g in recording.parameter_grads]
        return None, None, *of_maps, recording.content_grad.clone(), None, *of_parameters
