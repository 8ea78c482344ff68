"""Dynamic mixing on CUDA: a program takes one (query, group) pair through the whole chain.

Filters are blended, multiplied, shifted, normalised and rectified in registers; of all that only
the result is written. The backward kernels compute the chain again from the same inputs. Sums and
norms are float32; products take their factors in the precision of the inputs, float32 ones as
``torch.set_float32_matmul_precision`` says ("highest", the default: exact; otherwise TF32).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def supports(points: Tensor, own: Tensor) -> bool:
    """Whether the kernels can take these shapes.

    Matrix sides must be powers of two from 16, and the matrices fit into registers and shared
    memory: those of the paper have at most 128 x 64 elements.
    """
    if own.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    num_points, width = points.shape[-2:]
    rows, columns = own.shape[-2:]
    for side in (num_points, width, rows, columns):
        if side < 16 or side & (side - 1):
            return False
    return max(num_points * width, rows * columns, rows * width) <= 128 * 64


@triton.jit
def _matrix(pointer, rows, columns):
    """A contiguous matrix of float32 values, from any precision."""
    return tl.load(pointer + rows[:, None] * columns.shape[0] + columns).to(tl.float32)


@triton.jit
def _dot(left, right, LIKE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(left.to(LIKE), right.to(LIKE), input_precision=PRECISION)


@triton.jit
def _total(matrix):
    return tl.sum(tl.sum(matrix, axis=1), axis=0)


@triton.jit
def _mix_channels_kernel(
    points,  # (pairs, P, W)
    own,  # (pairs, W, W) with a stride between pairs
    bias,  # (pairs, W) with a stride
    stored,  # as own
    gate_rows,  # (pairs, W) with a stride
    gate_columns,  # (pairs, W) with a stride
    out,  # (pairs, P, W)
    own_stride,
    bias_stride,
    stored_stride,
    rows_stride,
    columns_stride,
    P: tl.constexpr,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REUSES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    point = tl.arange(0, P)
    channel = tl.arange(0, W)
    like: tl.constexpr = own.dtype.element_ty
    filters = _matrix(own + pair * own_stride, channel, channel)
    if REUSES:
        other = _matrix(stored + pair * stored_stride, channel, channel)
        by_row = tl.load(gate_rows + pair * rows_stride + channel).to(tl.float32)
        by_column = tl.load(gate_columns + pair * columns_stride + channel).to(tl.float32)
        filters += by_row[:, None] * by_column[None, :] * (other - filters)
    mixed = _dot(_matrix(points + pair * P * W, point, channel), filters, like, PRECISION)
    if HAS_BIAS:
        mixed += tl.load(bias + pair * bias_stride + channel).to(tl.float32)[None, :]
    mean = _total(mixed) / (P * W)
    mixed -= mean
    mixed *= 1.0 / tl.sqrt(_total(mixed * mixed) / (P * W) + 1e-5)
    result = tl.maximum(mixed, 0.0)
    tl.store(out + pair * P * W + point[:, None] * W + channel, result.to(like))


@triton.jit
def _mix_channels_backward_kernel(
    grad,
    points,
    own,
    bias,
    stored,
    gate_rows,
    gate_columns,
    grad_points,  # the gradients are contiguous
    grad_own,
    grad_bias,
    grad_stored,
    grad_rows,
    grad_columns,
    own_stride,
    bias_stride,
    stored_stride,
    rows_stride,
    columns_stride,
    P: tl.constexpr,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REUSES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    point = tl.arange(0, P)
    channel = tl.arange(0, W)
    like: tl.constexpr = own.dtype.element_ty
    square = channel[:, None] * W + channel
    filters = _matrix(own + pair * own_stride, channel, channel)
    if REUSES:
        other = _matrix(stored + pair * stored_stride, channel, channel)
        by_row = tl.load(gate_rows + pair * rows_stride + channel).to(tl.float32)
        by_column = tl.load(gate_columns + pair * columns_stride + channel).to(tl.float32)
        gate = by_row[:, None] * by_column[None, :]
        difference = other - filters
        filters += gate * difference
    inputs = _matrix(points + pair * P * W, point, channel)
    mixed = _dot(inputs, filters, like, PRECISION)
    if HAS_BIAS:
        mixed += tl.load(bias + pair * bias_stride + channel).to(tl.float32)[None, :]
    mean = _total(mixed) / (P * W)
    mixed -= mean
    rstd = 1.0 / tl.sqrt(_total(mixed * mixed) / (P * W) + 1e-5)
    mixed *= rstd
    upstream = tl.where(mixed > 0, _matrix(grad + pair * P * W, point, channel), 0.0)
    upstream = rstd * (
        upstream - _total(upstream) / (P * W) - mixed * (_total(upstream * mixed) / (P * W))
    )
    if HAS_BIAS:
        tl.store(grad_bias + pair * W + channel, tl.sum(upstream, axis=0).to(like))
    result = _dot(upstream, tl.trans(filters), like, PRECISION)
    tl.store(grad_points + pair * P * W + point[:, None] * W + channel, result.to(like))
    grad_filters = _dot(tl.trans(inputs), upstream, like, PRECISION)
    if REUSES:
        share = grad_filters * gate
        tl.store(grad_stored + pair * W * W + square, share.to(like))
        by_gate = grad_filters * difference
        along_rows = tl.sum(by_gate * by_column[None, :], axis=1)
        along_columns = tl.sum(by_gate * by_row[:, None], axis=0)
        tl.store(grad_rows + pair * W + channel, along_rows.to(like))
        tl.store(grad_columns + pair * W + channel, along_columns.to(like))
        grad_filters -= share
    tl.store(grad_own + pair * W * W + square, grad_filters.to(like))


@triton.jit
def _mix_points_kernel(
    points,  # (pairs, P, W)
    own,  # (pairs, R, P) with a stride
    bias,  # (pairs, R or 2R) with a stride
    stored,  # as own
    gate_rows,  # (pairs, R) with a stride
    gate_columns,  # (pairs, P) with a stride
    out,  # (pairs, R or 2R, W)
    own_stride,
    bias_stride,
    stored_stride,
    rows_stride,
    columns_stride,
    P: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REUSES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    point = tl.arange(0, P)
    channel = tl.arange(0, W)
    row = tl.arange(0, R)
    like: tl.constexpr = own.dtype.element_ty
    out_rows: tl.constexpr = 2 * R if REUSES else R
    offsets = pair * out_rows * W + row[:, None] * W + channel
    inputs = _matrix(points + pair * P * W, point, channel)
    filters = _matrix(own + pair * own_stride, row, point)
    upper = _dot(filters, inputs, like, PRECISION)
    if HAS_BIAS:
        upper += tl.load(bias + pair * bias_stride + row).to(tl.float32)[:, None]
    total = _total(upper)
    if REUSES:
        other = _matrix(stored + pair * stored_stride, row, point)
        by_row = tl.load(gate_rows + pair * rows_stride + row).to(tl.float32)
        by_column = tl.load(gate_columns + pair * columns_stride + point).to(tl.float32)
        blend = filters + by_row[:, None] * by_column[None, :] * (other - filters)
        lower = _dot(blend, inputs, like, PRECISION)
        if HAS_BIAS:
            lower += tl.load(bias + pair * bias_stride + R + row).to(tl.float32)[:, None]
        total += _total(lower)
    mean = total / (out_rows * W)
    upper -= mean
    squares = _total(upper * upper)
    if REUSES:
        lower -= mean
        squares += _total(lower * lower)
    rstd = 1.0 / tl.sqrt(squares / (out_rows * W) + 1e-5)
    tl.store(out + offsets, tl.maximum(upper * rstd, 0.0).to(like))
    if REUSES:
        tl.store(out + offsets + R * W, tl.maximum(lower * rstd, 0.0).to(like))


@triton.jit
def _mix_points_backward_kernel(
    grad,
    points,
    own,
    bias,
    stored,
    gate_rows,
    gate_columns,
    grad_points,  # the gradients are contiguous
    grad_own,
    grad_bias,
    grad_stored,
    grad_rows,
    grad_columns,
    own_stride,
    bias_stride,
    stored_stride,
    rows_stride,
    columns_stride,
    P: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REUSES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    point = tl.arange(0, P)
    channel = tl.arange(0, W)
    row = tl.arange(0, R)
    like: tl.constexpr = own.dtype.element_ty
    out_rows: tl.constexpr = 2 * R if REUSES else R
    count: tl.constexpr = out_rows * W
    filter_offsets = pair * R * P + row[:, None] * P + point
    inputs = _matrix(points + pair * P * W, point, channel)
    filters = _matrix(own + pair * own_stride, row, point)

    # The chain again, up to the normalised result.
    upper = _dot(filters, inputs, like, PRECISION)
    if HAS_BIAS:
        upper += tl.load(bias + pair * bias_stride + row).to(tl.float32)[:, None]
    total = _total(upper)
    if REUSES:
        other = _matrix(stored + pair * stored_stride, row, point)
        by_row = tl.load(gate_rows + pair * rows_stride + row).to(tl.float32)
        by_column = tl.load(gate_columns + pair * columns_stride + point).to(tl.float32)
        gate = by_row[:, None] * by_column[None, :]
        blend = filters + gate * (other - filters)
        lower = _dot(blend, inputs, like, PRECISION)
        if HAS_BIAS:
            lower += tl.load(bias + pair * bias_stride + R + row).to(tl.float32)[:, None]
        total += _total(lower)
    mean = total / count
    upper -= mean
    squares = _total(upper * upper)
    if REUSES:
        lower -= mean
        squares += _total(lower * lower)
    rstd = 1.0 / tl.sqrt(squares / count + 1e-5)
    upper *= rstd

    # Through ReLU and norm.
    grad_upper = _matrix(grad + pair * count, row, channel)
    grad_upper = tl.where(upper > 0, grad_upper, 0.0)
    total = _total(grad_upper)
    product = _total(grad_upper * upper)
    if REUSES:
        lower *= rstd
        grad_lower = _matrix(grad + pair * count + R * W, row, channel)
        grad_lower = tl.where(lower > 0, grad_lower, 0.0)
        total += _total(grad_lower)
        product += _total(grad_lower * lower)
    grad_upper = rstd * (grad_upper - total / count - upper * (product / count))
    if HAS_BIAS:
        sums = tl.sum(grad_upper, axis=1)
        tl.store(grad_bias + pair * out_rows + row, sums.to(like))
    grad_inputs = _dot(tl.trans(filters), grad_upper, like, PRECISION)
    grad_filters = _dot(grad_upper, tl.trans(inputs), like, PRECISION)
    if REUSES:
        grad_lower = rstd * (grad_lower - total / count - lower * (product / count))
        if HAS_BIAS:
            sums = tl.sum(grad_lower, axis=1)
            tl.store(grad_bias + pair * out_rows + R + row, sums.to(like))
        grad_inputs += _dot(tl.trans(blend), grad_lower, like, PRECISION)
        grad_blend = _dot(grad_lower, tl.trans(inputs), like, PRECISION)
        share = grad_blend * gate
        tl.store(grad_stored + filter_offsets, share.to(like))
        by_gate = grad_blend * (other - filters)
        along_rows = tl.sum(by_gate * by_column[None, :], axis=1)
        along_columns = tl.sum(by_gate * by_row[:, None], axis=0)
        tl.store(grad_rows + pair * R + row, along_rows.to(like))
        tl.store(grad_columns + pair * P + point, along_columns.to(like))
        grad_filters += grad_blend - share
    tl.store(grad_own + filter_offsets, grad_filters.to(like))
    tl.store(grad_points + pair * P * W + point[:, None] * W + channel, grad_inputs.to(like))


def _packed(tensor: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """The tensor with contiguous pairs, and the stride between pairs; a stand-in for None."""
    if tensor is None:
        return like, 0
    if tensor[:1].is_contiguous():
        return tensor, tensor.stride(0)
    return tensor.contiguous(), tensor[0].numel()


def _launch(kernel, grads, inputs, outputs, **sizes) -> None:
    """Inputs are points, own, bias, stored, rows, columns; before them come gradients, if any."""
    points, own, bias, stored, *_ = inputs
    if not len(points):
        return
    packed = [_packed(tensor, own) for tensor in inputs[1:]]
    exact = torch.get_float32_matmul_precision() == "highest"
    with torch.cuda.device_of(own):
        kernel[(len(points),)](
            *grads,
            points.contiguous(),
            *(tensor for tensor, _ in packed),
            *outputs,
            *(stride for _, stride in packed),
            P=points.shape[1],
            W=points.shape[2],
            HAS_BIAS=bias is not None,
            REUSES=stored is not None,
            # Three products of TF32 parts are as good as one of float32, and use the tensor cores.
            PRECISION="tf32x3" if exact else "tf32",
            num_warps=4,
            **sizes,
        )


def mix_channels(points, own, bias, stored, rows, columns) -> Tensor:
    """See ``mix_channels_op`` in ``mixing.py``."""
    out = own.new_empty(points.shape)
    _launch(_mix_channels_kernel, (), (points, own, bias, stored, rows, columns), (out,))
    return out


def mix_points(points, own, bias, stored, rows, columns) -> Tensor:
    """See ``mix_points_op`` in ``mixing.py``."""
    out_rows = own.shape[1] * (1 if stored is None else 2)
    out = own.new_empty(len(own), out_rows, points.shape[2])
    inputs = points, own, bias, stored, rows, columns
    _launch(_mix_points_kernel, (), inputs, (out,), R=own.shape[1])
    return out


def _gradients(kernel, grad, inputs, **sizes) -> tuple[Tensor, ...]:
    grads = [grad.new_empty(0 if tensor is None else tensor.shape) for tensor in inputs]
    _launch(kernel, (grad.contiguous(),), inputs, grads, **sizes)
    return tuple(grads)


def mix_channels_backward(grad, *inputs) -> tuple[Tensor, ...]:
    return _gradients(_mix_channels_backward_kernel, grad, inputs)


def mix_points_backward(grad, *inputs) -> tuple[Tensor, ...]:
    return _gradients(_mix_points_backward_kernel, grad, inputs, R=inputs[1].shape[1])
