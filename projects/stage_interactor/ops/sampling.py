"""Sampling points from a feature pyramid: all levels, groups and points in one operation.

A point reads four pixels on each level; with L levels that is one weighted sum over 4 L rows of a
table whose rows are (pixel, group) pairs, the weight of a row being bilinear weight times level
weight. Forward and backward are two custom operators, with one implementation in PyTorch's own
operations, here, and one for CUDA in ``sampling_triton.py``. The latter adds up the gradient of the
features in the order in which its programs come: where results must be the same each time
(``torch.use_deterministic_algorithms``) that sum is made here on CUDA too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .backend import is_narrow, runs_reference
from .fallback import launch_or

# So many samples are gathered at a time in the backward pass: their rows stay in the cache, or are
# enough to keep a GPU busy.
_CHUNK = {"cpu": 2048, "cuda": 2**15}


class Pyramid:
    """Feature levels, and the form that sampling reads them in, made once for all stages.

    Args:
        features: per level (B, D, H_l, W_l).
    """

    def __init__(self, features: Sequence[Tensor]):
        self.maps = tuple(features)
        self.map_sizes: Tensor | None = None
        self.gradient = FeatureGradient()
        self._value: Tensor | None = None
        self._planes: list[Tensor] | None = None
        self._token: Tensor | None = None

    @classmethod
    def in_buffer(cls, value: Tensor, map_sizes: Tensor) -> "Pyramid":
        """Of levels of sizes that only the device knows; on CUDA, for a recording.

        Args:
            value: (B, S, D), the pixels of all levels one after the other; S may be larger than
                their number.
            map_sizes: (levels, 2), int32, height and width of each level.
        """
        pyramid = cls(())
        pyramid._value, pyramid.map_sizes = value, map_sizes
        return pyramid

    def __len__(self) -> int:
        return len(self.maps) if self.map_sizes is None else len(self.map_sizes)

    @property
    def value(self) -> Tensor:
        """All levels one after the other, channels last: (B, sum of H_l W_l, D).

        Under autocast in its precision: the norm that ends the neck gives float32 on CUDA.
        """
        if self._value is None:
            rows = [level.flatten(2).transpose(1, 2) for level in self.maps]
            device = rows[0].device.type
            if torch.is_autocast_enabled(device) and rows[0].dtype == torch.float32:
                dtype = torch.get_autocast_dtype(device)
                rows = [level.to(dtype) for level in rows]
            self._value = torch.cat(rows, 1).contiguous()
        return self._value

    def planes(self, dtype: torch.dtype) -> list[Tensor]:
        """The levels in a precision, row by row, as the reference reads them."""
        if self._planes is None or self._planes[0].dtype != dtype:
            self._planes = [level.to(dtype).contiguous() for level in self.maps]
        return self._planes

    @property
    def token(self) -> Tensor:
        """What stands for the value in the stages' graphs; see :class:`FeatureGradient`."""
        if self._token is None:
            self._token = _CollectGradient.apply(self.value, self.gradient)
        return self._token


def sample_pyramid(
    features: Pyramid | Sequence[Tensor],
    xy: Tensor,
    level_weights: Tensor,
    strides: Sequence[float],
) -> Tensor:
    """Bilinear features at the points, summed over levels with weights.

    Group g reads channels ``g * Dc .. (g + 1) * Dc`` of every level; points outside a map read
    zeros (``align_corners=False``).

    Args:
        features: per level (B, G * Dc, H_l, W_l), or a :class:`Pyramid` of them.
        xy: (B, N, G, P, 2), pixels from the upper left corner, float32 or float64.
        level_weights: (B, N, G, P, levels), in the precision of ``xy``.
        strides: image pixels per feature pixel of each level.

    Returns:
        (B, N, G, P, Dc), in the precision of the features, or of autocast; from the reference, and
        of few channels on a CPU, in that of ``xy``.
    """
    pyramid = features if isinstance(features, Pyramid) else Pyramid(features)
    in_buffer = pyramid.map_sizes is not None
    if not in_buffer:
        by_reference = runs_reference(xy.device)
        if by_reference or is_narrow(xy.device, pyramid.maps[0].shape[1] // xy.shape[2]):
            sample = reference.sample_pyramid if by_reference else _sample_planes
            return sample(pyramid.planes(xy.dtype), xy, level_weights, strides)
    sizes = [size for level in pyramid.maps for size in level.shape[-2:]]
    sizes = sizes or [0] * (2 * len(pyramid))  # told to the device alone
    points = xy.contiguous(), level_weights.contiguous(), sizes, [float(s) for s in strides]
    collects = torch.is_grad_enabled() and pyramid.value.requires_grad
    if in_buffer or (collects and not torch.compiler.is_compiling()):
        token, value = pyramid.token, pyramid.value.detach()
        return _Sample.apply(token, pyramid.gradient, value, *points, pyramid.map_sizes)
    return sample_op(pyramid.value, *points)


def _sample_planes(
    planes: Sequence[Tensor], xy: Tensor, level_weights: Tensor, strides: Sequence[float]
) -> Tensor:
    """The reference for few channels on a CPU: levels are added up before the axes are exchanged.

    Arguments and result as those of :func:`sample_pyramid`.
    """
    leading = planes[0].shape[0], xy.shape[2]
    points = xy.transpose(1, 2).flatten(0, 1)  # (B * G, N, P, 2)
    by_level = level_weights.permute(4, 0, 2, 1, 3).flatten(1, 2).unsqueeze(2)
    sampled = None
    for plane, stride, weights in zip(planes, strides, by_level.unbind(), strict=True):
        height, width = plane.shape[-2:]
        x, y = points.unbind(-1)
        grid = torch.stack((x * (2 / (stride * width)) - 1, y * (2 / (stride * height)) - 1), -1)
        values = plane.reshape(len(points), -1, height, width)
        values = F.grid_sample(values, grid, align_corners=False)  # (B * G, Dc, N, P)
        if sampled is None:
            sampled = values * weights
        else:
            sampled = torch.addcmul(sampled, values, weights)
    assert sampled is not None
    return sampled.unflatten(0, leading).permute(0, 3, 1, 4, 2)


class _Taps(NamedTuple):
    """The pixels that points read: two rows and two columns on each of the levels.

    Points are the last axis until the end, so that every step is one long loop.
    """

    table_rows: Tensor  # (levels, 2 rows, 2 columns, points), int32
    row_weights: Tensor  # (levels, 2, 1, points), bilinear; 0 outside of the map
    column_weights: Tensor  # (levels, 1, 2, points)
    row_inside: Tensor  # (levels, 2, 1, points), 0 or 1
    column_inside: Tensor  # (levels, 1, 2, points)
    inverse_strides: Tensor  # (levels, 1)


def _taps(value: Tensor, xy: Tensor, sizes: Sequence[int], strides: Sequence[float]) -> _Taps:
    batch, num_queries, groups, points, _ = xy.shape
    heights, widths = sizes[0::2], sizes[1::2]
    starts = [0]
    for height, width in zip(heights[:-1], widths[:-1]):
        starts.append(starts[-1] + height * width)
    device = xy.device
    inverse = 1.0 / torch.tensor(strides, dtype=xy.dtype, device=device)[:, None]  # (levels, 1)

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)[:, None]

    def axis(coordinate: Tensor, extents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The two pixels along one axis, (levels, 2, points): numbers, weights, whether inside."""
        position = coordinate * inverse - 0.5
        low = position.floor()
        extent = integers(extents)
        fraction = position.sub_(low)
        # Clamped before the conversion: far outside, an integer would overflow.
        low = torch.minimum(low.clamp_(min=-2.0), extent.to(low)).to(torch.int32)
        pixel = torch.stack((low, low + 1), 1)
        inside = ((pixel >= 0) & (pixel < extent[:, None])).to(xy.dtype)
        pixel = torch.minimum(pixel.clamp_(min=0), extent[:, None] - 1)
        weights = torch.stack((1 - fraction, fraction), 1).mul_(inside)
        return pixel, weights, inside

    x, y = xy.view(-1, 2).t().contiguous()
    columns, column_weights, column_inside = axis(x, widths)
    rows, row_weights, row_inside = axis(y, heights)
    base = integers(range(batch))[..., None, None] * value.shape[1] * groups
    base = base + integers(range(groups))
    base = base.expand(batch, num_queries, groups, points).reshape(-1)
    start = integers(starts) * groups
    row_length = integers(widths)[..., None] * groups
    rows = rows.mul_(row_length).add_((base + start)[:, None])
    columns = columns.mul_(groups)
    return _Taps(
        rows[:, :, None] + columns[:, None],
        row_weights[:, :, None],
        column_weights[:, None],
        row_inside[:, :, None],
        column_inside[:, None],
        inverse,
    )


def _by_level(level_weights: Tensor) -> Tensor:
    """(..., levels) to (levels, 1, 1, points), as the weights of taps."""
    return level_weights.view(-1, level_weights.shape[-1]).t()[:, None, None]


def _by_point(per_tap: Tensor) -> Tensor:
    """(levels, 2, 2, points) to (points, 4 * levels), contiguous."""
    return per_tap.flatten(0, 2).t().contiguous()


def _table(value: Tensor, groups: int) -> Tensor:
    """(B, S, G * Dc) as rows of (pixel, group) pairs, (B * S * G, Dc)."""
    return value.reshape(value.shape[0] * value.shape[1] * groups, -1)


def _sample(
    value: Tensor,
    xy: Tensor,
    level_weights: Tensor,
    sizes: Sequence[int],
    strides: Sequence[float],
) -> Tensor:
    """value (B, S, D), xy (B, N, G, P, 2), level_weights (B, N, G, P, L), sizes H_0, W_0, H_1, ...

    to samples (B, N, G, P, D / G)."""
    taps = _taps(value, xy, sizes, strides)
    weights = taps.row_weights * _by_level(level_weights) * taps.column_weights
    sampled = F.embedding_bag(
        _by_point(taps.table_rows),
        _table(value, xy.shape[2]),
        per_sample_weights=_by_point(weights.to(value.dtype)),
        mode="sum",
    )
    return sampled.view(*xy.shape[:-1], -1)


sample_op = torch.library.custom_op(
    "stage_interactor::sample_pyramid", _sample, mutates_args=(), device_types="cpu"
)


@torch.library.custom_op(
    "stage_interactor::sample_pyramid_backward", mutates_args=(), device_types="cpu"
)
def sample_backward_op(
    grad: Tensor,
    value: Tensor,
    xy: Tensor,
    level_weights: Tensor,
    sizes: Sequence[int],
    strides: Sequence[float],
    needs_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value (empty unless asked for), xy and level_weights."""
    grad_xy, grad_weights, reads = _backward_of_points(
        grad, value, xy, level_weights, sizes, strides
    )
    grad_value = _scatter([reads], value) if needs_value else value.new_empty(0)
    return grad_value, grad_xy, grad_weights


class _Reads(NamedTuple):
    """What samples read of the table, and their gradient: all that the table's gradient needs."""

    table_rows: Tensor  # (samples, taps)
    weights: Tensor  # (samples, taps)
    grad: Tensor  # (samples, Dc)


def _backward_of_points(
    grad: Tensor,
    value: Tensor,
    xy: Tensor,
    level_weights: Tensor,
    sizes: Sequence[int],
    strides: Sequence[float],
) -> tuple[Tensor, Tensor, _Reads]:
    """Gradients of xy and level_weights, and what is left to do for the value."""
    taps = _taps(value, xy, sizes, strides)
    table = _table(value, xy.shape[2])
    grad = grad.reshape(-1, grad.shape[-1])
    index = _by_point(taps.table_rows)
    levels = _by_level(level_weights)

    # With another weight for each tap the sum over taps is a derivative of the sample: of the
    # samples of each level, or along an axis, where the pixels' weights are 1 - f and f.
    slope = (levels * taps.inverse_strides[:, None, None]) * xy.new_tensor([[-1.0], [1.0]])
    to_sum = (
        (taps.row_weights * taps.column_weights, len(strides)),
        (taps.row_weights * (taps.column_inside * slope), 1),
        (taps.row_inside * slope.transpose(1, 2) * taps.column_weights, 1),
    )
    kinds = [
        (_by_point(weights.to(value.dtype)), xy.new_empty(len(grad), sums))
        for weights, sums in to_sum
    ]
    step = _CHUNK[grad.device.type]
    for start in range(0, len(grad), step):
        part = slice(start, start + step)
        rows, grads = index[part], grad[part, None]
        for weights, result in kinds:
            sums = result.shape[1]
            derivative = F.embedding_bag(
                rows.view(len(rows) * sums, -1),
                table,
                per_sample_weights=weights[part].view(len(rows) * sums, -1),
                mode="sum",
            )
            derivative = derivative.to(xy.dtype).view(-1, sums, table.shape[1]).mul_(grads)
            torch.sum(derivative, -1, out=result[part])
    (_, grad_levels), (_, grad_x), (_, grad_y) = kinds
    grad_xy = torch.cat((grad_x, grad_y), -1).view(xy.shape)
    grad_levels = grad_levels.view(level_weights.shape)
    return grad_xy, grad_levels, _reads(grad, taps, level_weights)


def _reads(grad: Tensor, taps: _Taps, level_weights: Tensor) -> _Reads:
    weights = taps.row_weights * _by_level(level_weights) * taps.column_weights
    weights = weights.to(grad.dtype)
    return _Reads(_by_point(taps.table_rows), _by_point(weights), grad.reshape(-1, grad.shape[-1]))


def _scatter(reads: Sequence[_Reads], value: Tensor) -> Tensor:
    """The gradient of the value: each row of the table adds up the samples that read it."""
    index, weights, grad = (torch.cat(parts) for parts in zip(*reads))
    # The same sum as in the forward pass with the roles exchanged: ordered by the row they read,
    # the taps of one row are neighbours.
    read, order = index.view(-1).sort(stable=True)
    num_rows = value.numel() // grad.shape[-1]
    first = torch.searchsorted(read, torch.arange(num_rows, dtype=read.dtype, device=read.device))
    grad_value = F.embedding_bag(
        order.div(index.shape[1], rounding_mode="floor"),
        grad.to(value.dtype),
        first,
        per_sample_weights=weights.view(-1).index_select(0, order).to(value.dtype),
        mode="sum",
    )
    return grad_value.view(value.shape)


@sample_op.register_kernel("cuda")
def _(value, xy, level_weights, sizes, strides):
    from . import sampling_triton

    inputs = value, xy, level_weights, sizes, strides
    return launch_or(
        lambda: ("sampling", *_constants(value, xy, strides)),
        lambda: sampling_triton.sample_forward(*inputs),
        lambda: _sample(*inputs),
    )


@sample_backward_op.register_kernel("cuda")
def _(grad, value, xy, level_weights, sizes, strides, needs_value):
    gradient = FeatureGradient()
    inputs = grad, value, xy, level_weights, sizes, strides
    grads = gradient.backward_on_cuda(*inputs, needs_value=needs_value)
    return gradient.total(value) if needs_value else value.new_empty(0), *grads


def _constants(value: Tensor, xy: Tensor, strides: Sequence[float]) -> tuple:
    """What the kernels are compiled for."""
    return str(value.dtype).removeprefix("torch."), value.shape[-1] // xy.shape[2], len(strides)


def _zeros_to_add_to(value: Tensor) -> Tensor:
    """Sums over many samples need float32 at least."""
    return torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))


@sample_op.register_fake
def _(value, xy, level_weights, sizes, strides):
    return value.new_empty(*xy.shape[:-1], value.shape[-1] // xy.shape[2])


@sample_backward_op.register_fake
def _(grad, value, xy, level_weights, sizes, strides, needs_value):
    grad_value = value.new_empty(value.shape if needs_value else 0)
    return grad_value, torch.empty_like(xy), torch.empty_like(level_weights)


def _save(ctx, inputs, output):
    value, xy, level_weights, ctx.sizes, ctx.strides = inputs
    ctx.save_for_backward(value, xy, level_weights)


def _backward(ctx, grad):
    needs_value = ctx.needs_input_grad[0]
    grad_value, grad_xy, grad_weights = sample_backward_op(
        grad.contiguous(), *ctx.saved_tensors, ctx.sizes, ctx.strides, needs_value
    )
    return grad_value if needs_value else None, grad_xy, grad_weights, None, None


sample_op.register_autograd(_backward, setup_context=_save)


class FeatureGradient:
    """The gradient of the features, collected over all stages of one backward pass.

    All stages read the same features. Left to autograd each would make a gradient of the whole
    pyramid, to be added to that of the others; here each leaves what it has with the pyramid, and
    the sum is made once, when the last stage (the first in the cascade) has been through. A
    *token*, a tensor without elements, takes the place of the features in autograd's graph, so
    that autograd knows when that is.
    """

    def __init__(self) -> None:
        self._backward_pass: int | None = None
        self._reads: list[_Reads] = []  # yet to be added up
        self._sum: Tensor | None = None  # of the kernel on CUDA

    def add(
        self, grad: Tensor, value: Tensor, *points: Any, map_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Takes in the gradient of one stage's samples; gives that of xy and level_weights."""
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass != self._backward_pass:  # what an unfinished one has left is void
            self._backward_pass, self._reads, self._sum = backward_pass, [], None
        if value.device.type == "cpu":
            grad_xy, grad_weights, reads = _backward_of_points(grad, value, *points)
            self._reads.append(reads)
            return grad_xy, grad_weights
        return self.backward_on_cuda(grad, value, *points, map_sizes=map_sizes)

    def backward_on_cuda(
        self,
        grad: Tensor,
        value: Tensor,
        *points: Any,
        needs_value: bool = True,
        map_sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`add`, by the kernel."""
        from . import sampling_triton

        xy, level_weights, sizes, strides = points
        inputs = grad, value, xy, level_weights, sizes, strides
        in_order = torch.are_deterministic_algorithms_enabled()
        if needs_value and not in_order and self._sum is None:
            self._sum = _zeros_to_add_to(value)
        added_to = self._sum if needs_value and not in_order else None
        collects = needs_value and in_order

        def launch() -> tuple[Tensor, Tensor]:
            grads = sampling_triton.sample_backward(*inputs, added_to, map_sizes=map_sizes)
            if collects:
                taps = _taps(value, xy, sizes, strides)
                self._reads.append(_reads(grad, taps, level_weights))
            return grads

        def plain() -> tuple[Tensor, Tensor]:
            *grads, reads = _backward_of_points(*inputs)
            if needs_value:
                self._reads.append(reads)
            return grads[0], grads[1]

        def key() -> tuple:
            kind = "sampling's backward pass", added_to is not None
            return *kind, *_constants(value, xy, strides)

        # In a recording nothing can take the kernel's place: sizes are on the device alone.
        return launch() if map_sizes is not None else launch_or(key, launch, plain)

    def total(self, value: Tensor) -> Tensor:
        """The gradient of the value; forgets it."""
        reads, total, self._reads, self._sum = self._reads, self._sum, [], None
        if total is None:
            return _scatter(reads, value)
        if reads:  # of stages whose kernel could not start
            total += _scatter(reads, value)
        return total.to(value.dtype)


class _CollectGradient(torch.autograd.Function):
    """Value to token; in the backward pass the collected gradient to the value."""

    @staticmethod
    def forward(ctx, value: Tensor, gradient: FeatureGradient) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(value)
        return value.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return ctx.gradient.total(value), None


class _Sample(torch.autograd.Function):
    """:func:`sample_op` whose gradient of the value goes to a :class:`FeatureGradient`."""

    @staticmethod
    def forward(ctx, token, gradient, value, xy, level_weights, sizes, strides, map_sizes):
        ctx.gradient, ctx.sizes, ctx.strides, ctx.map_sizes = gradient, sizes, strides, map_sizes
        ctx.save_for_backward(token, value, xy, level_weights)
        if map_sizes is None:
            return sample_op(value, xy, level_weights, sizes, strides)
        from . import sampling_triton

        return sampling_triton.sample_forward(
            value, xy, level_weights, sizes, strides, map_sizes=map_sizes
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        token, *inputs = ctx.saved_tensors
        points = *inputs, ctx.sizes, ctx.strides
        grad_xy, grad_weights = ctx.gradient.add(grad, *points, map_sizes=ctx.map_sizes)
        return torch.zeros_like(token), None, None, grad_xy, grad_weights, None, None, None
