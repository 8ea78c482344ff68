"""Sampling on CUDA: one kernel forward, one backward, both gathering straight from the pyramid.

A program takes a block of samples with all their channels. Positions, bilinear weights and sums
are computed in the precision of the coordinates, at least float32, whatever the features have.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 16  # samples of a program: with more, the backward pass has no registers left
SPLIT = dict(BLOCK=_BLOCK, num_warps=4)


# Sizes of maps are plain numbers, not specialised on, since images come in all sizes; or a tensor
# on the device, which a recorded CUDA graph reads again each time.
_MAX_LEVELS = 6
STRIDES = [f"s{level}" for level in range(_MAX_LEVELS)]
_NUMBERS = [f"{name}{level}" for name in "hw" for level in range(_MAX_LEVELS)] + STRIDES
_NUMBERS += ["num_samples", "samples_per_image", "pixels_per_image"]


@triton.jit
def _of_level(level: tl.constexpr, v0, v1, v2, v3, v4, v5):
    return (
        v0 if level == 0
        else v1 if level == 1
        else v2 if level == 2
        else v3 if level == 3
        else v4 if level == 4
        else v5
    )  # fmt: skip


@triton.jit
def _axis(coordinate, inverse_stride, extent):
    """The first of two pixels along one axis, and how far the point lies beyond it (0 to 1)."""
    position = coordinate * inverse_stride - 0.5
    low = tl.floor(position)
    fraction = position - low
    # Clamped before the conversion: far outside, an integer would overflow.
    low = tl.minimum(tl.maximum(low, -2.0), extent.to(low.dtype))
    return low.to(tl.int32), fraction


@triton.jit(do_not_specialize=_NUMBERS)
def _forward_kernel(
    value,  # (B, S, G, Dc)
    xy,  # (samples, 2)
    level_weights,  # (samples, levels)
    out,  # (samples, Dc)
    map_sizes,  # (levels, 2), height and width; None: the numbers below
    num_samples,
    samples_per_image,
    pixels_per_image,
    num_points,
    num_groups,
    group_dim,
    h0,
    h1,
    h2,
    h3,
    h4,
    h5,  # height of each level
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,  # width
    s0,
    s1,
    s2,
    s3,
    s4,
    s5,  # 1 / stride
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = sample < num_samples
    channel = tl.arange(0, BLOCK_DIM)
    is_channel = channel < group_dim
    first = (sample // samples_per_image).to(tl.int64) * pixels_per_image
    group = (sample // num_points) % num_groups
    x = tl.load(xy + 2 * sample, mask=alive, other=0.0)
    y = tl.load(xy + 2 * sample + 1, mask=alive, other=0.0)
    total = tl.zeros((BLOCK, BLOCK_DIM), dtype=x.dtype)
    for level in tl.static_range(LEVELS):
        if map_sizes is None:
            height = _of_level(level, h0, h1, h2, h3, h4, h5)
            width = _of_level(level, w0, w1, w2, w3, w4, w5)
        else:
            height = tl.load(map_sizes + 2 * level)
            width = tl.load(map_sizes + 2 * level + 1)
        inverse_stride = _of_level(level, s0, s1, s2, s3, s4, s5)
        level_weight = tl.load(level_weights + sample * LEVELS + level, mask=alive, other=0.0)
        left, fraction_x = _axis(x, inverse_stride, width)
        top, fraction_y = _axis(y, inverse_stride, height)
        for corner in tl.static_range(4):
            column = left + corner % 2
            row = top + corner // 2
            inside = alive & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight_x = fraction_x if corner % 2 else 1 - fraction_x
            weight_y = fraction_y if corner // 2 else 1 - fraction_y
            pixel = (first + row * width + column) * num_groups + group
            read = tl.load(
                value + pixel[:, None] * group_dim + channel,
                mask=inside[:, None] & is_channel,
                other=0.0,
            ).to(x.dtype)
            total += (level_weight * weight_x * weight_y)[:, None] * read
        first += height * width
    tl.store(
        out + sample[:, None].to(tl.int64) * group_dim + channel,
        total.to(out.dtype.element_ty),
        mask=alive[:, None] & is_channel,
    )


@triton.jit(do_not_specialize=_NUMBERS)
def _backward_kernel(
    grad,  # (samples, Dc)
    value,
    xy,
    level_weights,
    grad_value,  # (B, S, G, Dc), added to
    grad_xy,  # (samples, 2)
    grad_level_weights,  # (samples, levels)
    map_sizes,  # (levels, 2) or None
    num_samples,
    samples_per_image,
    pixels_per_image,
    num_points,
    num_groups,
    group_dim,
    h0,
    h1,
    h2,
    h3,
    h4,
    h5,
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    s0,
    s1,
    s2,
    s3,
    s4,
    s5,
    NEEDS_VALUE: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = sample < num_samples
    channel = tl.arange(0, BLOCK_DIM)
    is_channel = channel < group_dim
    first = (sample // samples_per_image).to(tl.int64) * pixels_per_image
    group = (sample // num_points) % num_groups
    x = tl.load(xy + 2 * sample, mask=alive, other=0.0)
    y = tl.load(xy + 2 * sample + 1, mask=alive, other=0.0)
    grad_out = tl.load(
        grad + sample[:, None].to(tl.int64) * group_dim + channel,
        mask=alive[:, None] & is_channel,
        other=0.0,
    ).to(x.dtype)
    grad_x = tl.zeros((BLOCK,), dtype=x.dtype)
    grad_y = tl.zeros((BLOCK,), dtype=x.dtype)
    for level in tl.static_range(LEVELS):
        if map_sizes is None:
            height = _of_level(level, h0, h1, h2, h3, h4, h5)
            width = _of_level(level, w0, w1, w2, w3, w4, w5)
        else:
            height = tl.load(map_sizes + 2 * level)
            width = tl.load(map_sizes + 2 * level + 1)
        inverse_stride = _of_level(level, s0, s1, s2, s3, s4, s5)
        level_weight = tl.load(level_weights + sample * LEVELS + level, mask=alive, other=0.0)
        left, fraction_x = _axis(x, inverse_stride, width)
        top, fraction_y = _axis(y, inverse_stride, height)
        grad_level = tl.zeros((BLOCK,), dtype=x.dtype)
        slope_x = tl.zeros((BLOCK,), dtype=x.dtype)
        slope_y = tl.zeros((BLOCK,), dtype=x.dtype)
        for corner in tl.static_range(4):
            column = left + corner % 2
            row = top + corner // 2
            inside = alive & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight_x = fraction_x if corner % 2 else 1 - fraction_x
            weight_y = fraction_y if corner // 2 else 1 - fraction_y
            pixel = (first + row * width + column) * num_groups + group
            offsets = pixel[:, None] * group_dim + channel
            mask = inside[:, None] & is_channel
            read = tl.load(value + offsets, mask=mask, other=0.0).to(x.dtype)
            product = tl.sum(read * grad_out, axis=1)
            grad_level += product * weight_x * weight_y
            slope_x += product * weight_y * (1.0 if corner % 2 else -1.0)
            slope_y += product * weight_x * (1.0 if corner // 2 else -1.0)
            if NEEDS_VALUE:
                share = (level_weight * weight_x * weight_y)[:, None] * grad_out
                tl.atomic_add(
                    grad_value + offsets,
                    share.to(grad_value.dtype.element_ty),
                    mask=mask,
                    sem="relaxed",
                )
        grad_x += level_weight * slope_x * inverse_stride
        grad_y += level_weight * slope_y * inverse_stride
        tl.store(grad_level_weights + sample * LEVELS + level, grad_level, mask=alive)
        first += height * width
    tl.store(grad_xy + 2 * sample, grad_x, mask=alive)
    tl.store(grad_xy + 2 * sample + 1, grad_y, mask=alive)


def _arguments(value, xy, sizes, strides, map_sizes):
    """What both kernels take after their tensors, by position and by name, and the programs."""
    batch, num_queries, groups, points, _ = xy.shape
    group_dim = value.shape[-1] // groups
    samples, levels = batch * num_queries * groups * points, len(strides)
    if levels > _MAX_LEVELS:
        raise ValueError(f"at most {_MAX_LEVELS} feature levels can be sampled, got {levels}")
    if samples * max(levels, 2) >= 2**31:
        raise ValueError(f"{samples} samples at once are too many; use a smaller batch")
    if map_sizes is not None:
        if map_sizes.shape != (levels, 2) or map_sizes.dtype != torch.int32:
            raise ValueError(
                f"map_sizes must be int32 of ({levels}, 2), height and width of each level, got "
                f"{map_sizes.dtype} of {tuple(map_sizes.shape)}"
            )
        map_sizes, sizes = map_sizes.contiguous(), [0] * (2 * levels)
    numbers = [samples, num_queries * groups * points, value.shape[1], points, groups, group_dim]
    for each_level in (sizes[0::2], sizes[1::2], [1.0 / stride for stride in strides]):
        numbers += [*each_level, *each_level[-1:] * (_MAX_LEVELS - levels)]
    blocks = dict(LEVELS=levels, BLOCK_DIM=triton.next_power_of_2(group_dim), **SPLIT)
    return [map_sizes, *numbers], blocks, (triton.cdiv(samples, _BLOCK),)


def sample_forward(
    value: Tensor,
    xy: Tensor,
    level_weights: Tensor,
    sizes: Sequence[int],
    strides: Sequence[float],
    map_sizes: Tensor | None = None,
) -> Tensor:
    """See ``sample_op`` in ``sampling.py``.

    Args:
        map_sizes: int32 (L, 2) on the device, height and width of each level, read there by the
            kernel in place of ``sizes``. The value may then be longer than the maps: what lies
            behind them is neither read nor given a gradient.

    Raises:
        ValueError: for more levels or samples than the kernels count, or other ``map_sizes``.
    """
    numbers, blocks, programs = _arguments(value, xy, sizes, strides, map_sizes)
    out = value.new_empty(*xy.shape[:-1], value.shape[-1] // xy.shape[2])
    if out.numel():
        with torch.cuda.device_of(value):
            _forward_kernel[programs](value, xy, level_weights, out, *numbers, **blocks)
    return out


def sample_backward(
    grad: Tensor,
    value: Tensor,
    xy: Tensor,
    level_weights: Tensor,
    sizes: Sequence[int],
    strides: Sequence[float],
    grad_value: Tensor | None,
    map_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of xy and level_weights; adds the value's to ``grad_value``, if there is one.

    ``map_sizes`` and errors as for :func:`sample_forward`; ValueError also where a gradient of the
    value must be the same each time, which with ``map_sizes`` it cannot.
    """
    in_order = torch.are_deterministic_algorithms_enabled() and grad_value is not None
    if in_order and map_sizes is not None:
        raise ValueError(
            "the gradient of the features is not the same each time where the sizes of maps are "
            "read on the device: with torch.use_deterministic_algorithms pass them as numbers"
        )
    numbers, blocks, programs = _arguments(value, xy, sizes, strides, map_sizes)
    grad_xy, grad_weights = torch.empty_like(xy), torch.empty_like(level_weights)
    target = value if grad_value is None else grad_value
    if grad.numel():
        with torch.cuda.device_of(value):
            _backward_kernel[programs](
                grad.contiguous(),
                value,
                xy,
                level_weights,
                target,
                grad_xy,
                grad_weights,
                *numbers,
                NEEDS_VALUE=grad_value is not None,
                **blocks,
            )
    return grad_xy, grad_weights
