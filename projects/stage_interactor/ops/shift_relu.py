"""ReLU of a map whose channels are shifted, to which another map may be added.

What is left of a BatchNorm with fixed statistics once its scale is in the convolution before it,
with what follows it. PyTorch's own operations read and write the map once each; on CUDA it is one
kernel forward and one backward, in ``shift_relu_triton.py``, for maps in channels_last.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import runs_kernels
from .fallback import launch_or


def shift_relu(
    maps: Tensor,
    shift: Tensor | None,
    residual: Any = None,
    add: Callable[[Any, Any], Any] = operator.add,
) -> Tensor:
    """``ReLU(maps + shift + residual)``, written over ``maps``.

    Args:
        maps: (B, C, H, W), which nothing else needs, such as a convolution's result.
        shift: (C,), or None.
        residual: (B, C, H, W), or None; or whatever can be added.
        add: how what is of another shape or precision is.
    """
    if residual is not None and not is_alike(residual, maps):
        return add(maps if shift is None else maps + shift[:, None, None], residual).relu_()
    if shift is not None and runs_kernels(maps):
        return _ShiftReLU.apply(maps, shift, residual)
    return _plain(maps, shift, residual)


def is_alike(residual: Any, maps: Tensor) -> bool:
    """Whether it is a tensor of this shape and precision."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == maps.shape
        and residual.dtype == maps.dtype
    )


def _plain(maps: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    if shift is not None:
        maps = maps.add_(shift[:, None, None])
    return (maps if residual is None else maps.add_(residual)).relu_()


def _plain_backward(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    grad = torch.where(out <= 0, 0, grad)
    return grad, grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32))


class _ShiftReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        from . import shift_relu_triton

        launch_or(
            lambda: ("shift_relu", maps.dtype, residual is None),
            lambda: shift_relu_triton.forward(maps, shift, residual),
            lambda: _plain(maps, shift, residual),
        )
        ctx.mark_dirty(maps)
        ctx.save_for_backward(maps)
        ctx.adds = residual is not None
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from . import shift_relu_triton

        (out,) = ctx.saved_tensors
        of_maps, of_shift = launch_or(
            lambda: ("shift_relu_backward", out.dtype),
            lambda: shift_relu_triton.backward(grad, out),
            lambda: _plain_backward(grad, out),
        )
        return of_maps, of_shift, of_maps if ctx.adds else None
