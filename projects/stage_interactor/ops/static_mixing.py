"""Static mixing: learned linear layers inside each point group and across the groups (Code 1)."""

import torch
from torch import Tensor

from . import reference
from .backend import is_narrow, runs_reference
from .dense import matrix_product
from .mixing import chunks


def mix_statically(
    points: Tensor,
    residual: Tensor,
    grid: tuple[int, int],
    within: tuple[Tensor, Tensor],
    across: tuple[Tensor, Tensor],
) -> Tensor:
    """``residual + I1(A) + I2(A)``: linear layers inside each point group and across the groups.

    Args:
        points: A, (..., P, Dc).
        residual: (..., P, Dc).
        grid: K and Q, K * Q = P; point (k, j) is number k * Q + j.
        within: weight (Q * Dc, Q * Dc) and bias of I1, shared by the K groups.
        across: weight (K * Dc, K * Dc) and bias of I2, shared by the Q points of a group.

    Returns:
        (..., P, Dc).
    """
    narrow = is_narrow(points.device, points.shape[-1])
    if narrow or points.device.type != "cpu" or runs_reference(points.device):
        return reference.mix_statically(points, residual, grid, within, across)
    dtype = points.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    flat = [tensor.to(dtype).reshape(-1, *points.shape[-2:]) for tensor in (points, residual)]
    weights = [tensor.to(dtype) for tensor in (*within, *across)]
    return mix_statically_op(*flat, grid[0], *weights).view(points.shape)


def _swapped(points: Tensor, num_groups: int) -> Tensor:
    """(pairs, K * Q, Dc) to (pairs * Q, K * Dc): the K groups side by side; a copy."""
    grid = points.unflatten(1, (num_groups, -1)).transpose(1, 2)  # (pairs, Q, K, Dc)
    return grid.reshape(-1, grid.shape[2] * grid.shape[3])


def _swapped_back(rows: Tensor, like: Tensor, num_groups: int) -> Tensor:
    """The inverse, a view."""
    pairs, points, width = like.shape
    grid = rows.view(pairs, points // num_groups, num_groups, width)
    return grid.transpose(1, 2)  # (pairs, K, Q, Dc)


@torch.library.custom_op("stage_interactor::mix_statically", mutates_args=(), device_types="cpu")
def mix_statically_op(
    points: Tensor,
    residual: Tensor,
    num_groups: int,
    within: Tensor,
    within_bias: Tensor,
    across: Tensor,
    across_bias: Tensor,
) -> Tensor:
    """See :func:`mix_statically`; one leading axis, num_groups is K."""
    out = torch.empty_like(points)
    product = matrix_product(points.dtype)
    for a, r, y in chunks(points, residual, out):
        inside = product(a.reshape(-1, len(within)), within, within_bias)
        torch.add(r, inside.view_as(r), out=y)
        between = product(_swapped(a, num_groups), across, across_bias)
        y.unflatten(1, (num_groups, -1)).add_(_swapped_back(between, a, num_groups))
    return out


@mix_statically_op.register_fake
def _(points, residual, num_groups, within, within_bias, across, across_bias):
    return torch.empty_like(points)


def _save_static(ctx, inputs, output):
    points, _, ctx.num_groups, within, _, across, _ = inputs
    ctx.save_for_backward(points, within, across)


def _backward_static(ctx, grad):
    points, within, across = ctx.saved_tensors
    grad, product = grad.contiguous(), matrix_product(grad.dtype)
    inside = grad.view(-1, len(within))
    between = _swapped(grad, ctx.num_groups)
    grad_points = product(inside, within.t()).view_as(points)
    back = _swapped_back(product(between, across.t()), points, ctx.num_groups)
    grad_points.unflatten(1, (ctx.num_groups, -1)).add_(back)
    grad_within = product(inside.t(), points.reshape(-1, len(within)).t())
    grad_across = product(between.t(), _swapped(points, ctx.num_groups).t())
    return grad_points, grad, None, grad_within, inside.sum(0), grad_across, between.sum(0)


mix_statically_op.register_autograd(_backward_static, setup_context=_save_static)
