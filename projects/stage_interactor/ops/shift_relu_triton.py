"""Shift, addition and ReLU on CUDA: each map is read and written once.

Maps in channels_last are matrices, a row a pixel. A program takes a tile of one; in the backward
pass it takes every so many tiles below one another, for it sums their columns, and what the
programs have summed is added up in an order that is always the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # elements
_PROGRAMS = 1024  # of the backward pass: enough for any GPU


@triton.jit(do_not_specialize=["num_rows"])
def _shift_relu_kernel(
    maps,  # (rows, channels), written over
    shift,  # (channels,)
    residual,  # (rows, channels) or None
    num_rows,
    num_channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offsets = row[:, None].to(tl.int64) * num_channels + channel
    mask = (row < num_rows)[:, None] & (channel < num_channels)
    shifts = tl.load(shift + channel, mask=channel < num_channels, other=0.0)
    if shifts.dtype != tl.float64:
        shifts = shifts.to(tl.float32)
    total = tl.load(maps + offsets, mask=mask, other=0.0).to(shifts.dtype) + shifts
    if residual is not None:
        total += tl.load(residual + offsets, mask=mask, other=0.0).to(shifts.dtype)
    total = tl.where(total < 0, 0.0, total)  # NaN stays
    tl.store(maps + offsets, total.to(maps.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _shift_relu_backward_kernel(
    grad,  # (rows, channels)
    out,  # (rows, channels)
    grad_maps,  # (rows, channels)
    sums,  # (parts, channels)
    num_rows,
    num_channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < num_channels
    total = tl.zeros((CHANNELS,), dtype=sums.dtype.element_ty)
    for start in range(part * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        offsets = row[:, None].to(tl.int64) * num_channels + channel
        mask = (row < num_rows)[:, None] & is_channel
        passed = tl.load(grad + offsets, mask=mask, other=0.0)
        passed = tl.where(tl.load(out + offsets, mask=mask, other=0.0) <= 0, 0.0, passed)
        tl.store(grad_maps + offsets, passed.to(grad_maps.dtype.element_ty), mask=mask)
        total += tl.sum(passed.to(total.dtype), axis=0)
    tl.store(sums + part * num_channels + channel, total, mask=is_channel)


def tile(num_channels: int) -> dict[str, int]:
    """Constants that the kernels are compiled for."""
    channels = min(triton.next_power_of_2(num_channels), 256)
    return dict(ROWS=_TILE // channels, CHANNELS=channels, num_warps=4)


def forward(maps: Tensor, shift: Tensor, residual: Tensor | None) -> None:
    """See :func:`stage_interactor.ops.shift_relu.shift_relu`; maps are in channels_last."""
    num_channels = maps.shape[1]
    num_rows = maps.numel() // max(num_channels, 1)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    blocks = tile(num_channels)
    grid = triton.cdiv(num_rows, blocks["ROWS"]), triton.cdiv(num_channels, blocks["CHANNELS"])
    if maps.numel():
        with torch.cuda.device_of(maps):
            _shift_relu_kernel[grid](maps, shift, residual, num_rows, num_channels, **blocks)


def backward(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the maps, which is the residual's too, and of the shift, in float32 at least."""
    num_channels = out.shape[1]
    num_rows = out.numel() // max(num_channels, 1)
    grad = grad.to(out.dtype).contiguous(memory_format=torch.channels_last)
    grad_maps = torch.empty_like(out)
    blocks = tile(num_channels)
    columns = triton.cdiv(num_channels, blocks["CHANNELS"])
    parts = min(triton.cdiv(num_rows, blocks["ROWS"]), max(_PROGRAMS // max(columns, 1), 1))
    exact = torch.promote_types(out.dtype, torch.float32)
    sums = torch.empty(parts, num_channels, dtype=exact, device=out.device)
    if out.numel():
        with torch.cuda.device_of(out):
            _shift_relu_backward_kernel[parts, columns](
                grad, out, grad_maps, sums, num_rows, num_channels, **blocks
            )
    return grad_maps, sums.sum(0)
