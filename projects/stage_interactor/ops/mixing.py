"""Dynamic mixing: one small matrix product, layer norm and ReLU for each (query, group).

Every operation takes filters that may be blended with filters of an earlier stage on the way:
``M~ = M + (rows columns^T) * (stored - M)``, a linear interpolation gated per element. Neither the
blended filters nor what is normalised are kept for the backward pass: it computes them again, a few
pairs at a time, so that they never leave the cache (CPU) or the registers (CUDA, in
``mixing_triton.py``).

"pairs" below are the leading axes, (query, group) pairs in the decoder.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef

from . import reference
from .backend import is_narrow, runs_reference
from .fallback import launch_or

# The pairs of a chunk work on about so many bytes: what stays in the caches; on CUDA, where
# this stands in for kernels that cannot start, enough to keep the device busy.
_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}
# Queries whose mixed points are there at a time: enough for a matrix product to be at its best.
_QUERIES = 100

_SixTensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def mix_channels(
    points: Tensor,
    own: Tensor,
    bias: Tensor | None = None,
    stored: Tensor | None = None,
    gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``ReLU(LN2(U M~ + b))``: the channels of every point are mixed.

    Args:
        points: U, (..., P, Dc).
        own: M, (..., Dc, Dc).
        bias: b, (..., Dc), or None.
        stored: filters (..., Dc, Dc) that M is blended with; None leaves M as it is.
        gates: of ``stored``: rows (..., Dc) and columns (..., Dc), 0 to 1.

    Returns:
        (..., P, Dc), in the precision of ``own``.
    """
    if _runs_reference(points, own):
        return reference.mix_channels(points, own, bias, stored, gates)
    ops = mix_channels_op, _mix_narrow_channels
    return _mix(ops, points, own, bias, stored, gates)


def mix_points(
    points: Tensor,
    own: Tensor,
    bias: Tensor | None = None,
    stored: Tensor | None = None,
    gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``ReLU(LN2(S A + b))``: the points of every channel are mixed.

    With ``stored`` the whole filter is S with its blend stacked under it, of twice as many rows.

    Args:
        points: A, (..., P, Dc).
        own: S, (..., R, P).
        bias: b, (..., R), or (..., 2R) with ``stored``; or None.
        stored: filters (..., R, P) that S is blended with.
        gates: of ``stored``: rows (..., R) and columns (..., P), 0 to 1.

    Returns:
        (..., R or 2R, Dc), in the precision of ``own``.
    """
    if _runs_reference(points, own):
        return reference.mix_points(points, own, bias, stored, gates)
    ops = mix_points_op, _mix_narrow_points
    return _mix(ops, points, own, bias, stored, gates)


def project_mixed_points(
    layer: Callable[[Tensor], Tensor],
    points: Tensor,
    own: Tensor,
    bias: Tensor | None = None,
    stored: Tensor | None = None,
    gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A linear layer over all that :func:`mix_points` gives for a query.

    The mixed points of all queries are the largest tensor of a stage. On a CPU, where no gradient
    is wanted, only those of some queries are there at a time.

    Args:
        layer: from (..., G * R * Dc) to (..., D).
        points, own, bias, stored, gates: see :func:`mix_points`; leading axes (..., N, G).

    Returns:
        (..., N, D).
    """
    rows, columns = (None, None) if stored is None or gates is None else gates
    inputs = points, own, bias, stored, rows, columns
    in_parts = own.device.type == "cpu" and not is_narrow(points.device, points.shape[-1])
    if torch.is_grad_enabled() or not in_parts or runs_reference(own.device):
        return layer(mix_points(points, own, bias, stored, gates).flatten(-3))
    queries: list[Any] = [None if tensor is None else tensor.flatten(0, -4 + axis)
               for tensor, axis in zip(inputs, (0, 0, 1, 0, 1, 1))]  # fmt: skip
    projected = []
    for start in range(0, len(queries[0]), _QUERIES):
        part: list[Any] = [None if q is None else q[start : start + _QUERIES] for q in queries]
        a, m, b, s, r, c = part
        projected.append(layer(mix_points(a, m, b, s, (r, c)).flatten(1)))
    return torch.cat(projected).unflatten(0, own.shape[:-3])


def _runs_reference(points: Tensor, own: Tensor) -> bool:
    if runs_reference(own.device):
        return True
    if own.device.type == "cpu":
        return False
    from .mixing_triton import supports

    return not supports(points, own)


def _mix(ops, points, own, bias, stored, gates) -> Tensor:
    op = ops[is_narrow(points.device, points.shape[-1])]
    rows, columns = gates if stored is not None else (None, None)
    leading, dtype = own.shape[:-2], own.dtype

    def pairs(tensor: Tensor | None, axes: int) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.to(dtype).reshape(-1, *tensor.shape[-axes:])

    mixed = op(
        pairs(points, 2),
        pairs(own, 2),
        pairs(bias, 1),
        pairs(stored, 2),
        pairs(rows, 1),
        pairs(columns, 1),
    )
    return mixed.unflatten(0, leading)


def chunks(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """The same pairs of all tensors, or None, so many at a time that they stay in the cache."""
    pairs, device = next((len(t), t.device.type) for t in tensors if t is not None)
    size = sum(t[0].numel() * t.element_size() for t in tensors if t is not None and len(t))
    step = max(_CHUNK_BYTES[device] // max(size, 1), 1)
    for start in range(0, pairs, step):
        yield [None if t is None else t[start : start + step] for t in tensors]


def _blend_backward(
    grad: Tensor, own: Tensor, stored: Tensor, rows: Tensor, columns: Tensor, gate: Tensor, out: Any
) -> None:
    """Gradients of own, stored, rows and columns from that of the blend; ``gate`` is their outer
    product."""
    grad_own, grad_stored, grad_rows, grad_columns = out
    torch.mul(grad, gate, out=grad_stored)
    torch.sub(grad, grad_stored, out=grad_own)
    by_gate = (stored - own).mul_(grad)
    torch.bmm(rows[:, None], by_gate, out=grad_columns[:, None])
    torch.sum(by_gate.mul_(columns[:, None]), -1, out=grad_rows)


def _norm_relu_backward(grad: Tensor, mixed: Tensor) -> Tensor:
    """The gradient of what was normalised, from that of the result."""
    shape = mixed.shape[-2:]
    normed, mean, rstd = torch.native_layer_norm(mixed, shape, None, None, 1e-5)
    grad = torch.ops.aten.threshold_backward(grad, normed, 0)
    return torch.ops.aten.native_layer_norm_backward(
        grad, mixed, shape, mean, rstd, None, None, [True, False, False]
    )[0]


def _empty_gradients(grad: Tensor, *inputs: Tensor | None) -> Any:
    """Contiguous; an operator cannot give None, so that no tensor is one without elements."""
    return tuple(grad.new_empty(0 if tensor is None else tensor.shape) for tensor in inputs)


def _operators(
    name: str, product: Callable[..., Tensor], axis: int, stacks: bool
) -> tuple[CustomOpDef, CustomOpDef, Callable[..., Tensor]]:
    """An operator that mixes, its backward pass, and the same for narrow pieces, by autograd.

    Args:
        name: of the operator, and of what computes it on CUDA.
        product: of points and filters; of others the same, the filters' side being the second.
        axis: of the result, that all have the same bias along.
        stacks: a blend stands under the filters instead of in their place.
    """

    def filters(m: Tensor, s: Tensor | None, gate: Any) -> Tensor:
        if s is None:
            return m
        blend = torch.lerp(m, s, gate)
        return torch.cat((m, blend), 1) if stacks else blend

    def outer(rows: Tensor | None, columns: Tensor | None) -> Any:
        if rows is None or columns is None:
            return None
        # A CPU multiplies 16 bits slowly where every few numbers have a factor of their own.
        multiply = torch.mul if rows.dtype.itemsize > 2 else torch.bmm
        return multiply(rows[:, :, None], columns[:, None, :])

    def narrow(points, own, bias, stored, rows, columns):
        whole = filters(own, stored, outer(rows, columns))
        first, second = (whole, points) if stacks else (points, whole)
        if bias is None:
            mixed = torch.bmm(first, second)
        else:
            mixed = torch.baddbmm(bias.unsqueeze(axis), first, second)
        return reference.norm_relu(mixed)

    def empty(points, own, bias, stored, rows, columns):
        if not stacks:
            return own.new_empty(points.shape)
        out_rows = own.shape[1] * (1 if stored is None else 2)
        return own.new_empty(own.shape[0], out_rows, points.shape[2])

    def mix(
        points: Tensor,
        own: Tensor,
        bias: Tensor | None,
        stored: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        inputs = points, own, bias, stored, rows, columns
        out = empty(*inputs)
        for a, m, b, s, r, c, y in chunks(*inputs, out):
            product(a, filters(m, s, outer(r, c)), out=y)
            if b is not None:
                y += b.unsqueeze(axis)
            torch.clamp_min(F.layer_norm(y, y.shape[1:]), 0, out=y)
        return out

    def mix_backward(
        grad: Tensor,
        points: Tensor,
        own: Tensor,
        bias: Tensor | None,
        stored: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> _SixTensors:
        inputs = points, own, bias, stored, rows, columns
        grads = _empty_gradients(grad, *inputs)
        for g, a, m, b, s, r, c, ga, gm, gb, gs, gr, gc in chunks(grad, *inputs, *grads):
            gate = outer(r, c)
            whole = filters(m, s, gate)
            mixed = product(a, whole)
            if b is not None:
                mixed += b.unsqueeze(axis)
            mixed = _norm_relu_backward(g, mixed)
            if b is not None:
                torch.sum(mixed, axis, out=gb)
            product(mixed, whole.mT, out=ga)
            if s is None:
                product(a.mT, mixed, out=gm)
                continue
            *above, grad_blend = product(a.mT, mixed).chunk(2 if stacks else 1, 1)
            _blend_backward(grad_blend, m, s, r, c, gate, (gm, gs, gr, gc))
            for part in above:
                gm += part
        return grads

    op, backward_op = (
        torch.library.custom_op(
            f"stage_interactor::{function}", computes, mutates_args=(), device_types="cpu"
        )
        for function, computes in ((name, mix), (f"{name}_backward", mix_backward))
    )

    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = backward_op(grad.contiguous(), *inputs)
        return tuple(None if tensor is None else g for tensor, g in zip(inputs, grads))

    op.register_autograd(backward, setup_context=_save)
    op.register_fake(empty)
    backward_op.register_fake(_empty_gradients)
    _register_on_cuda(op, name, mix)
    _register_on_cuda(backward_op, f"{name}_backward", mix_backward)
    return op, backward_op, narrow


def _register_on_cuda(op: CustomOpDef, name: str, plain: Callable[..., Any]) -> None:
    @op.register_kernel("cuda")
    def _(*inputs):
        return on_cuda(name, plain, *inputs)


def on_cuda(name: str, plain: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """What ``mixing_triton`` has under this name; where it cannot start, ``plain``."""
    from . import mixing_triton

    def key() -> tuple:
        tensors = [tensor for tensor in inputs if tensor is not None]
        shapes = (tuple(tensor.shape[1:]) for tensor in tensors)
        return name, str(tensors[0].dtype).removeprefix("torch."), *shapes

    return launch_or(key, lambda: getattr(mixing_triton, name)(*inputs), lambda: plain(*inputs))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _filters_first(points: Tensor, filters: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.bmm(filters, points, out=out)


# Called as :func:`mix_channels` and :func:`mix_points`, with one leading axis; the backward ones
# give the gradients of all inputs, without elements for those that are None.
mix_channels_op, mix_channels_backward_op, _mix_narrow_channels = _operators(
    "mix_channels", torch.bmm, axis=1, stacks=False
)
mix_points_op, mix_points_backward_op, _mix_narrow_points = _operators(
    "mix_points", _filters_first, axis=2, stacks=True
)
