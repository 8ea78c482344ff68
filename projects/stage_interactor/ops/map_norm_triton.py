"""Group norm on CUDA, of maps in channels_last: matrices of an image each, a row a pixel.

Forward and backward are three kernels each. The first sums columns: a program takes every so many
rows of an image. The second, a program a group, adds these sums up, in an order that is always the
same, to factors of the channels. The third applies them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements
_PARTS = 64  # programs an image, at most, that sum; a power of 2


@triton.jit(do_not_specialize=["num_pixels"])
def _norm_sums_kernel(
    grad,  # (B, pixels, C), or None: in the forward pass
    maps,  # (B, pixels, C)
    statistics,  # (B, G, 2), or None
    sums,  # (B, parts, 2, C)
    num_pixels,
    num_channels,
    width,  # channels of a group
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums of the gradient, and of its product with the normed map; in the forward pass of what the
    map differs by from its first pixel, and of the square of that."""
    part, image = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < num_channels
    exact = sums.dtype.element_ty
    first = image.to(tl.int64) * num_pixels * num_channels
    if grad is None:
        centre = tl.load(maps + first + channel, mask=is_channel, other=0.0).to(exact)
    else:
        of_group = image * (num_channels // width) + channel // width
        centre = tl.load(statistics + 2 * of_group, mask=is_channel, other=0.0)
        rstd = tl.load(statistics + 2 * of_group + 1, mask=is_channel, other=0.0)
    one = tl.zeros((CHANNELS,), dtype=exact)
    two = tl.zeros((CHANNELS,), dtype=exact)
    for start in range(part * ROWS, num_pixels, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        offsets = first + row[:, None].to(tl.int64) * num_channels + channel
        mask = (row < num_pixels)[:, None] & is_channel
        centred = tl.load(maps + offsets, mask=mask, other=0.0).to(exact) - centre
        if grad is None:
            centred = tl.where(mask, centred, 0.0)
            one += tl.sum(centred, axis=0)
            two += tl.sum(centred * centred, axis=0)
        else:
            given = tl.load(grad + offsets, mask=mask, other=0.0).to(exact)
            one += tl.sum(given, axis=0)
            two += tl.sum(given * (centred * rstd), axis=0)
    place = sums + (image * tl.num_programs(0) + part) * 2 * num_channels + channel
    tl.store(place, one, mask=is_channel)
    tl.store(place + num_channels, two, mask=is_channel)


@triton.jit(do_not_specialize=["num_parts", "num_pixels", "width"])
def _norm_factors_kernel(
    sums,  # (B, parts, 2, C)
    maps,  # (B, pixels, C)
    weight,  # (C,)
    bias,  # (C,), or None: in the backward pass
    statistics,  # (B, G, 2), mean and 1 / deviation: made in the forward pass
    factors,  # (B, 3, C): of the gradient, of the map, and what is added
    totals,  # (B, 2, C), sums over all parts; None in the forward pass
    num_parts,
    num_pixels,
    num_channels,
    width,
    eps,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group, image = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, PARTS)
    member = tl.arange(0, WIDTH)
    channel = group * width + member
    is_member = member < width
    exact = sums.dtype.element_ty
    place = sums + (image * num_parts + part)[:, None] * 2 * num_channels + channel
    mask = (part < num_parts)[:, None] & is_member
    one = tl.sum(tl.load(place, mask=mask, other=0.0), axis=0)
    two = tl.sum(tl.load(place + num_channels, mask=mask, other=0.0), axis=0)
    scale = tl.load(weight + channel, mask=is_member, other=0.0).to(exact)
    count = (num_pixels * width).to(exact)
    pixels = num_pixels.to(exact)
    statistics += 2 * (image * (num_channels // width) + group)
    factors += image * 3 * num_channels + channel
    if totals is None:
        first = maps + image.to(tl.int64) * num_pixels * num_channels + channel
        means = tl.load(first, mask=is_member, other=0.0).to(exact) + one / pixels
        mean = tl.sum(tl.where(is_member, means, 0.0), axis=0) / width
        between = tl.where(is_member, means - mean, 0.0)
        squares = two - one * one / pixels + pixels * between * between
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / count + eps)
        tl.store(statistics, mean)
        tl.store(statistics + 1, rstd)
        scale *= rstd
        shift = tl.load(bias + channel, mask=is_member, other=0.0).to(exact) - mean * scale
        tl.store(factors + num_channels, scale, mask=is_member)
        tl.store(factors + 2 * num_channels, shift, mask=is_member)
    else:
        totals += image * 2 * num_channels + channel
        tl.store(totals, one, mask=is_member)
        tl.store(totals + num_channels, two, mask=is_member)
        mean, rstd = tl.load(statistics), tl.load(statistics + 1)
        level = tl.sum(scale * one, axis=0) / count
        slope = tl.sum(scale * two, axis=0) / count * rstd
        tl.store(factors, scale * rstd, mask=is_member)
        same = tl.zeros((WIDTH,), dtype=exact)
        tl.store(factors + num_channels, same - rstd * slope, mask=is_member)
        tl.store(factors + 2 * num_channels, same + rstd * (mean * slope - level), mask=is_member)


@triton.jit(do_not_specialize=["num_pixels"])
def _norm_apply_kernel(
    grad,  # (B, pixels, C), or None: in the forward pass
    maps,  # (B, pixels, C)
    factors,  # (B, 3, C)
    out,  # (B, pixels, C)
    num_pixels,
    num_channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < num_channels
    offsets = (image.to(tl.int64) * num_pixels + row[:, None]) * num_channels + channel
    mask = (row < num_pixels)[:, None] & is_channel
    factors += image * 3 * num_channels + channel
    of_maps = tl.load(factors + num_channels, mask=is_channel, other=0.0)
    total = tl.load(factors + 2 * num_channels, mask=is_channel, other=0.0)
    total += tl.load(maps + offsets, mask=mask, other=0.0).to(of_maps.dtype) * of_maps
    if grad is not None:
        of_grad = tl.load(factors, mask=is_channel, other=0.0)
        total += tl.load(grad + offsets, mask=mask, other=0.0).to(of_maps.dtype) * of_grad
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


def tile(num_channels: int) -> dict[str, int]:
    """Constants of the kernels that go through maps."""
    channels = triton.next_power_of_2(num_channels)
    return dict(ROWS=max(_TILE // channels, 1), CHANNELS=channels, num_warps=8)


def forward(
    maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What is normed, as the maps, and (B, groups, 2), mean and 1 / deviation, float32 at least."""
    exact = torch.promote_types(maps.dtype, torch.float32)
    statistics = torch.empty(len(maps), groups, 2, dtype=exact, device=maps.device)
    out = torch.empty_like(maps)
    _launch(None, maps, weight, bias, statistics, out, None, eps)
    return out, statistics


def backward(
    grad: Tensor, maps: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the maps, and (2, C) of bias and weight, in the precision of the statistics."""
    grad = grad.to(maps.dtype).contiguous(memory_format=torch.channels_last)
    of_maps = torch.empty_like(maps)
    size = len(maps), 2, maps.shape[1]
    totals = statistics.new_empty(size) if maps.numel() else statistics.new_zeros(size)
    _launch(grad, maps, weight, None, statistics, of_maps, totals, 0.0)
    return of_maps, totals.sum(0)


def _launch(
    grad: Tensor | None,
    maps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    out: Tensor,
    totals: Tensor | None,
    eps: float,
) -> None:
    batch, num_channels, height, width = maps.shape
    pixels, groups = height * width, statistics.shape[1]
    if not maps.numel():
        return
    blocks, members = tile(num_channels), num_channels // groups
    tiles = triton.cdiv(pixels, blocks["ROWS"])
    parts = min(tiles, _PARTS)
    sums = statistics.new_empty(batch, parts, 2, num_channels)
    factors = statistics.new_empty(batch, 3, num_channels)
    with torch.cuda.device_of(maps):
        _norm_sums_kernel[parts, batch](
            grad, maps, statistics, sums, pixels, num_channels, members, **blocks
        )
        _norm_factors_kernel[groups, batch](
            sums, maps, weight, bias, statistics, factors, totals, parts, pixels, num_channels,
            members, eps, PARTS=_PARTS, WIDTH=triton.next_power_of_2(members), num_warps=4,
        )  # fmt: skip
        _norm_apply_kernel[tiles, batch](grad, maps, factors, out, pixels, num_channels, **blocks)
