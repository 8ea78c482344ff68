"""Dynamic mixing on CUDA: a program takes one (query, group) pair through the whole chain.

Filters are blended, multiplied, shifted, normalised and rectified in registers; of all that only
the result is written. The backward kernels compute the chain again from the same inputs. Sums and
norms are float32; products take their factors in the precision of the inputs, float32 ones as
``torch.set_float32_matmul_precision`` says ("highest", the default: exact; otherwise TF32).

A program goes through the rows of the filters in steps, and loads again what more than one step
needs: what is live at a time fits into the registers, and more programs run beside each other.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def supports(points: Tensor, own: Tensor) -> bool:
    """Whether the kernels can take these shapes and this precision on the tensors' device.

    Matrix sides must be powers of two from 16, and the matrices fit into registers and shared
    memory: those of the paper have at most 128 x 64 elements.
    """
    if own.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    capability, shared = _limits(own.device)
    if own.dtype == torch.bfloat16 and capability < (8, 0):
        return False  # no products of it
    num_points, width = points.shape[-2:]
    rows, columns = own.shape[-2:]
    for side in (num_points, width, rows, columns):
        if side < 16 or side & (side - 1):
            return False
    if max(num_points * width, rows * columns, rows * width) > 128 * 64:
        return False
    return shared_bytes(own.dtype, capability, num_points, width, rows) <= shared


@triton.jit
def _total(matrix):
    return tl.sum(tl.sum(matrix, axis=1), axis=0)


@triton.jit
def _filters(arrays, row, column, COLUMNS: tl.constexpr, BLENDS: tl.constexpr):
    """A block of the filters, blended if asked for, in the precision of the inputs.

    Rows and columns lie along two axes, either way round. Products take it transposed: otherwise
    the compiler would blend it in each of the warps that multiply it.
    """
    _, own, _, stored, gate_rows, gate_columns = arrays
    block = tl.load(own + row * COLUMNS + column)
    if BLENDS:
        other = tl.load(stored + row * COLUMNS + column).to(tl.float32)
        by_row = tl.load(gate_rows + row).to(tl.float32)
        by_column = tl.load(gate_columns + column).to(tl.float32)
        exact = block.to(tl.float32)
        block = (exact + by_row * by_column * (other - exact)).to(block.dtype)
    return block


@triton.jit
def _store_filter_gradients(
    grad,  # of the blend
    above,  # of the same rows where they stand above it, not blended; or 0
    arrays,
    grad_own,
    grad_stored,
    row,
    column,
    COLUMNS: tl.constexpr,
    REUSES: tl.constexpr,
):
    """Stores the gradients of a block; gives those of both gates, yet to be added up."""
    like: tl.constexpr = grad_own.dtype.element_ty
    offsets = row * COLUMNS + column
    by_gate = grad
    if REUSES:
        _, own, _, stored, gate_rows, gate_columns = arrays
        by_row = tl.load(gate_rows + row).to(tl.float32)
        by_column = tl.load(gate_columns + column).to(tl.float32)
        share = grad * (by_row * by_column)
        tl.store(grad_stored + offsets, share.to(like))
        tl.store(grad_own + offsets, (above + grad - share).to(like))
        by_gate *= tl.load(stored + offsets).to(tl.float32) - tl.load(own + offsets).to(tl.float32)
        return by_gate * by_column, by_gate * by_row
    else:
        tl.store(grad_own + offsets, grad.to(like))
        return by_gate, by_gate


@triton.jit
def _of_pair(
    points,
    own,
    bias,
    stored,
    gate_rows,
    gate_columns,
    points_stride,
    own_stride,
    bias_stride,
    stored_stride,
    rows_stride,
    columns_stride,
):
    """The number of this program's pair, and where its inputs start."""
    pair = tl.program_id(0).to(tl.int64)
    return pair, (
        points + pair * points_stride,
        own + pair * own_stride,
        bias + pair * bias_stride,
        stored + pair * stored_stride,
        gate_rows + pair * rows_stride,
        gate_columns + pair * columns_stride,
    )


@triton.jit
def _normed_channels(
    arrays,
    P: tl.constexpr,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REUSES: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    """What the norm gives, (P, W), and 1 / the standard deviation before it."""
    point = tl.arange(0, P)
    channel = tl.arange(0, W)
    mixed = tl.zeros((P, W), dtype=tl.float32)
    for start in range(0, W, STEP):
        row = start + tl.arange(0, STEP)
        filters = _filters(arrays, row[:, None], channel[None, :], W, REUSES)
        inputs = tl.load(arrays[0] + point[:, None] * W + row)
        mixed = tl.dot(inputs, filters, mixed, input_precision=PRECISION)
    if HAS_BIAS:
        mixed += tl.load(arrays[2] + channel).to(tl.float32)[None, :]
    mixed -= _total(mixed) / (P * W)
    rstd = 1.0 / tl.sqrt(_total(mixed * mixed) / (P * W) + 1e-5)
    return mixed * rstd, rstd


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
    STEP: tl.constexpr,  # rows of the filters at a time, here and below
):
    pair, arrays = _of_pair(
        points, own, bias, stored, gate_rows, gate_columns,
        P * W, own_stride, bias_stride, stored_stride, rows_stride, columns_stride,
    )  # fmt: skip
    normed, _ = _normed_channels(arrays, P, W, HAS_BIAS, REUSES, PRECISION, STEP)
    offsets = tl.arange(0, P)[:, None] * W + tl.arange(0, W)
    tl.store(out + pair * P * W + offsets, tl.maximum(normed, 0.0).to(out.dtype.element_ty))


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
    STEP: tl.constexpr,
):
    pair, arrays = _of_pair(
        points, own, bias, stored, gate_rows, gate_columns,
        P * W, own_stride, bias_stride, stored_stride, rows_stride, columns_stride,
    )  # fmt: skip
    like: tl.constexpr = own.dtype.element_ty
    point = tl.arange(0, P)
    channel = tl.arange(0, W)
    normed, rstd = _normed_channels(arrays, P, W, HAS_BIAS, REUSES, PRECISION, STEP)
    upstream = tl.load(grad + pair * P * W + point[:, None] * W + channel).to(tl.float32)
    upstream = tl.where(normed > 0, upstream, 0.0)
    upstream = rstd * (
        upstream - _total(upstream) / (P * W) - normed * (_total(upstream * normed) / (P * W))
    )
    if HAS_BIAS:
        tl.store(grad_bias + pair * W + channel, tl.sum(upstream, axis=0).to(like))
    upstream = upstream.to(like)
    # Filters lie transposed, so that what all steps share is the left factor of both products.
    along_columns = tl.zeros((W,), dtype=tl.float32)
    for start in range(0, W, STEP):
        row = start + tl.arange(0, STEP)
        filters = tl.trans(_filters(arrays, row[:, None], channel[None, :], W, REUSES))
        result = tl.dot(upstream, filters, input_precision=PRECISION)
        offsets = point[:, None] * W + row
        tl.store(grad_points + pair * P * W + offsets, result.to(like))
        inputs = tl.load(arrays[0] + offsets)
        grad_filters = tl.dot(tl.trans(upstream), inputs, input_precision=PRECISION)
        by_row, by_column = _store_filter_gradients(
            grad_filters, 0.0, arrays, grad_own + pair * W * W, grad_stored + pair * W * W,
            row[None, :], channel[:, None], W, REUSES,
        )  # fmt: skip
        if REUSES:
            tl.store(grad_rows + pair * W + row, tl.sum(by_row, axis=0).to(like))
            along_columns += tl.sum(by_column, axis=1)
    if REUSES:
        tl.store(grad_columns + pair * W + channel, along_columns.to(like))


@triton.jit
def _mixed_rows(
    arrays,
    row,
    BLENDS: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows of what the norm gets, the filters' own or those of the blend; and the inputs.

    All transposed: the channels are as many as tensor cores take at once, (W, P) by (P, STEP).
    """
    if row.shape[0] < R:
        tl.debug_barrier()  # or the compiler keeps in registers what the next step loads again
    point = tl.arange(0, P)
    filters = tl.trans(_filters(arrays, row[:, None], point[None, :], P, BLENDS))
    inputs = tl.load(arrays[0] + point[None, :] * W + tl.arange(0, W)[:, None])
    mixed = tl.dot(inputs, filters, input_precision=PRECISION)
    if HAS_BIAS:
        mixed += tl.load(arrays[2] + (R if BLENDS else 0) + row).to(tl.float32)[None, :]
    return mixed, inputs


@triton.jit
def _mean(
    arrays,
    P: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REUSES: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    """Of all that the norm gets."""
    halves: tl.constexpr = 2 if REUSES else 1
    total = tl.zeros((W, STEP), dtype=tl.float32)
    for start in range(0, R, STEP):
        row = start + tl.arange(0, STEP)
        for blends in tl.static_range(halves):
            mixed, _ = _mixed_rows(arrays, row, blends, P, W, R, HAS_BIAS, PRECISION)
            total += mixed
    return _total(total) / (halves * R * W)


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
    STEP: tl.constexpr,
):
    pair, arrays = _of_pair(
        points, own, bias, stored, gate_rows, gate_columns,
        P * W, own_stride, bias_stride, stored_stride, rows_stride, columns_stride,
    )  # fmt: skip
    halves: tl.constexpr = 2 if REUSES else 1
    count: tl.constexpr = halves * R * W
    mean = _mean(arrays, P, W, R, HAS_BIAS, REUSES, PRECISION, STEP)
    squares = tl.zeros((W, STEP), dtype=tl.float32)
    for start in range(0, R, STEP):
        row = start + tl.arange(0, STEP)
        for blends in tl.static_range(halves):
            mixed, _ = _mixed_rows(arrays, row, blends, P, W, R, HAS_BIAS, PRECISION)
            squares += (mixed - mean) * (mixed - mean)
    rstd = 1.0 / tl.sqrt(_total(squares) / count + 1e-5)
    for start in range(0, R, STEP):
        row = start + tl.arange(0, STEP)
        for blends in tl.static_range(halves):
            mixed, _ = _mixed_rows(arrays, row, blends, P, W, R, HAS_BIAS, PRECISION)
            result = tl.maximum((mixed - mean) * rstd, 0.0)
            offsets = (blends * R + row)[None, :] * W + tl.arange(0, W)[:, None]
            tl.store(out + pair * count + offsets, result.to(out.dtype.element_ty))


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
    STEP: tl.constexpr,
):
    pair, arrays = _of_pair(
        points, own, bias, stored, gate_rows, gate_columns,
        P * W, own_stride, bias_stride, stored_stride, rows_stride, columns_stride,
    )  # fmt: skip
    like: tl.constexpr = own.dtype.element_ty
    halves: tl.constexpr = 2 if REUSES else 1
    count: tl.constexpr = halves * R * W
    point = tl.arange(0, P)
    channel = tl.arange(0, W)[:, None]
    grad += pair * count

    # What norm and ReLU need of all rows.
    mean = _mean(arrays, P, W, R, HAS_BIAS, REUSES, PRECISION, STEP)
    squares = tl.zeros((W, STEP), dtype=tl.float32)
    totals = tl.zeros((W, STEP), dtype=tl.float32)
    products = tl.zeros((W, STEP), dtype=tl.float32)
    for start in range(0, R, STEP):
        row = start + tl.arange(0, STEP)
        for blends in tl.static_range(halves):
            mixed, _ = _mixed_rows(arrays, row, blends, P, W, R, HAS_BIAS, PRECISION)
            mixed -= mean
            offsets = (blends * R + row)[None, :] * W + channel
            upstream = tl.load(grad + offsets).to(tl.float32)
            upstream = tl.where(mixed > 0, upstream, 0.0)
            squares += mixed * mixed
            totals += upstream
            products += upstream * mixed
    rstd = 1.0 / tl.sqrt(_total(squares) / count + 1e-5)
    total = _total(totals) / count
    product = _total(products) * rstd / count

    grad_inputs = tl.zeros((W, P), dtype=tl.float32)
    along_columns = tl.zeros((P,), dtype=tl.float32)
    for start in range(0, R, STEP):
        row = start + tl.arange(0, STEP)
        above = 0.0
        for blends in tl.static_range(halves):
            tl.debug_barrier()  # as in _mixed_rows, of what the other half has loaded
            mixed, inputs = _mixed_rows(arrays, row, blends, P, W, R, HAS_BIAS, PRECISION)
            normed = (mixed - mean) * rstd
            offsets = (blends * R + row)[None, :] * W + channel
            upstream = tl.load(grad + offsets).to(tl.float32)
            upstream = tl.where(normed > 0, upstream, 0.0)
            upstream = rstd * (upstream - total - normed * product)
            if HAS_BIAS:
                sums = tl.sum(upstream, axis=0)
                tl.store(grad_bias + pair * (halves * R) + blends * R + row, sums.to(like))
            upstream = upstream.to(like)
            filters = _filters(arrays, row[None, :], point[:, None], P, blends)
            grad_inputs = tl.dot(
                upstream, tl.trans(filters), grad_inputs, input_precision=PRECISION
            )
            grad_filters = tl.dot(tl.trans(inputs), upstream, input_precision=PRECISION)
            if blends + 1 < halves:
                above = grad_filters
        by_row, by_column = _store_filter_gradients(
            grad_filters, above, arrays, grad_own + pair * R * P, grad_stored + pair * R * P,
            row[None, :], point[:, None], P, REUSES,
        )  # fmt: skip
        if REUSES:
            tl.store(grad_rows + pair * R + row, tl.sum(by_row, axis=0).to(like))
            along_columns += tl.sum(by_column, axis=1)
    if REUSES:
        tl.store(grad_columns + pair * P + point, along_columns.to(like))
    offsets = point[None, :] * W + channel
    tl.store(grad_points + pair * P * W + offsets, grad_inputs.to(like))


_KERNELS = (
    _mix_channels_kernel,
    _mix_channels_backward_kernel,
    _mix_points_kernel,
    _mix_points_backward_kernel,
)


def split(
    kernel: Any, dtype: torch.dtype, capability: tuple[int, int], points: int, rows: int
) -> dict[str, int]:
    """How a launch is split on a device: rows of the filters at a time, and warps.

    The fewest steps that spill nothing, as ``tools/kernels.py`` finds: steps wait for each other.

    Args:
        kernel: one of those above.
        dtype: of the filters.
        capability: of the device.
        points, rows: P, and rows of the filters.
    """
    backward = kernel in (_mix_channels_backward_kernel, _mix_points_backward_kernel)
    warps = 4
    if capability < (8, 0):
        # Triton uses no tensor cores there: both factors go to registers, spread over more warps.
        step, warps = 16, 8
    elif dtype == torch.float32:
        step = 512 // points  # each factor is there as two TF32 numbers
    else:
        # Those of 9 and 10 multiply from shared memory.
        step = {8: 1024 // points, 9: 64, 10: 16 if backward else 64}.get(capability[0], 16)
    shortest = 8 if dtype == torch.float32 else 16  # that a product takes
    registers = {}
    if backward and capability[0] > 10:
        # The assembler would sooner spill a few than run fewer programs beside each other.
        warps = 4 if dtype == torch.float32 else 8
        registers = {"maxnreg": 255}
    # The programs beside one another hide the loads; buffers for those of the next step would cost
    # shared memory, and with that programs.
    return dict(STEP=min(max(step, shortest), rows), num_warps=warps, num_stages=1, **registers)


def shared_bytes(
    dtype: torch.dtype, capability: tuple[int, int], points: int, width: int, rows: int
) -> int:
    """Shared memory that no kernel of these sizes needs more of, in bytes.

    Two forms of a whole factor, and two float32 blocks of a step's results.
    """
    side = max(points, width)
    steps = [split(kernel, dtype, capability, points, rows)["STEP"] for kernel in _KERNELS]
    size = dtype.itemsize if capability >= (8, 0) else 4  # as ordinary multipliers take them
    return 2 * size * side * width + 8 * max(steps) * side


@torch.compiler.assume_constant_result
def _limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Capability of a device and shared memory of a block, in bytes.

    On a CPU kernels run on the interpreter, which has no limits.
    """
    if device.type == "cpu":
        return (9, 0), 2**31
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 2**16)  # AMD's do not tell
    return (properties.major, properties.minor), shared


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
    shape = points.shape[1], own.shape[1]
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
            **split(kernel, own.dtype, _limits(own.device)[0], *shape),
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
