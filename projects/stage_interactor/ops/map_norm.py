"""Group norm of maps in channels_last, computed in float32 at least and given in their precision.

PyTorch's on CUDA takes maps row by row, so that each is laid out anew before and after it, and in
the backward pass again. Here sums over pixels, what follows from them and the scaled map are a
kernel each, in ``map_norm_triton.py``.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import runs_kernels
from .fallback import launch_or

# Of maps that a CPU norms as they are, in channels_last.
_SMALLEST_WIDTH = 128


def group_norm(maps: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """:func:`torch.group_norm` of maps (B, C, H, W), whatever autocast says.

    Returns:
        (B, C, H, W), in float32 at least; from the kernels in the precision of the maps.
    """
    if torch.compiler.is_compiling() or not runs_kernels(maps):
        with torch.autocast(maps.device.type, enabled=False):
            return _plain(maps, groups, weight, bias, eps)
    return _GroupNorm.apply(maps, weight, bias, groups, eps)


def _plain(maps: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    exact = torch.promote_types(maps.dtype, torch.float32)
    # On a CPU loops in channels_last are as short as a group, and the samplers of few channels
    # want maps row by row.
    row_by_row = maps.device.type == "cpu" and maps.shape[1] < _SMALLEST_WIDTH
    layout = torch.contiguous_format if row_by_row else torch.preserve_format
    inputs = maps.to(exact, memory_format=layout), groups, weight.to(exact), bias.to(exact)
    # torch.nn.functional's refuses one pixel of one channel a group, unless there are more images.
    return torch.group_norm(*inputs, eps)


def _plain_forward(
    maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What is normed, in the layout of the maps, and (B, groups, 2), mean and 1 / deviation."""
    exact = torch.promote_types(maps.dtype, torch.float32)
    inputs = maps.to(exact).contiguous(), weight.to(exact), bias.to(exact)
    normed, *statistics = torch.native_group_norm(*inputs, *_sizes(maps), groups, eps)
    return torch.empty_like(maps).copy_(normed), torch.stack(statistics, -1)


def _sizes(maps: Tensor) -> tuple[int, int, int]:
    """Images, channels and pixels, as PyTorch's group norm is told them."""
    return maps.shape[0], maps.shape[1], maps.shape[2] * maps.shape[3]


def _plain_backward(
    grad: Tensor, maps: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the maps, and (2, C) of bias and weight."""
    exact, groups = statistics.dtype, statistics.shape[1]
    grad, inputs = (tensor.to(exact).contiguous() for tensor in (grad, maps))
    mean, rstd = (part.contiguous() for part in statistics.unbind(-1))
    of_maps, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
        grad, inputs, mean, rstd, weight.to(exact), *_sizes(maps), groups, [True, True, True]
    )
    return torch.empty_like(maps).copy_(of_maps), torch.stack((of_bias, of_weight))


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float):
        from . import map_norm_triton

        inputs = maps, weight, bias, groups, eps
        normed, statistics = launch_or(
            lambda: ("group_norm", maps.dtype, maps.shape[1], groups),
            lambda: map_norm_triton.forward(*inputs),
            lambda: _plain_forward(*inputs),
        )
        ctx.save_for_backward(maps, weight, statistics)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from . import map_norm_triton

        maps, weight, statistics = ctx.saved_tensors
        of_maps, (of_bias, of_weight) = launch_or(
            lambda: ("group_norm_backward", maps.dtype, maps.shape[1], statistics.shape[1]),
            lambda: map_norm_triton.backward(grad, maps, weight, statistics),
            lambda: _plain_backward(grad, maps, weight, statistics),
        )
        return of_maps, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None
