"""The operations as the authors' code computes them, in plain PyTorch: yardstick and oracle.

One ``grid_sample`` a level with a multiplication, an addition and a permutation each; every gate
blends the whole filter in passes of its own; autograd keeps what it likes. Shapes and meanings are
those of the public functions in ``sampling.py`` and ``mixing.py``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_pyramid(
    maps: Sequence[Tensor], xy: Tensor, level_weights: Tensor, strides: Sequence[float]
) -> Tensor:
    batch, num_queries, groups, points, _ = xy.shape
    group_dim = maps[0].shape[1] // groups
    sampled = xy.new_zeros(batch, num_queries, groups, points, group_dim)
    for level, (feature, stride) in enumerate(zip(maps, strides, strict=True)):
        height, width = feature.shape[-2:]
        scale = 2.0 / (stride * width), 2.0 / (stride * height)  # sizes stay symbols in an export
        grid = torch.stack([xy[..., axis] * scale[axis] - 1.0 for axis in (0, 1)], dim=-1)
        grid = grid.transpose(1, 2).flatten(0, 1)  # (B * G, N, P, 2)
        weights = level_weights[..., level].transpose(1, 2).flatten(0, 1)  # (B * G, N, P)
        values = feature.to(xy.dtype).reshape(batch * groups, -1, height, width)
        values = F.grid_sample(values, grid, align_corners=False)  # (B * G, Dc, N, P)
        values = values * weights[:, None]
        sampled = sampled + values.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)
    return sampled


def norm_relu(features: Tensor) -> Tensor:
    """ReLU of a layer norm, without affine, over the last *two* axes (points and channels)."""
    return F.relu(F.layer_norm(features, features.shape[-2:]))


def blend_filters(own: Tensor, stored: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    blended = stored * columns[..., None, :] + own * (1 - columns[..., None, :])
    return blended * rows[..., :, None] + own * (1 - rows[..., :, None])


def mix_channels(
    points: Tensor,
    own: Tensor,
    bias: Tensor | None = None,
    stored: Tensor | None = None,
    gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    filters = own if stored is None else blend_filters(own, stored, *(gates or ()))
    mixed = points @ filters
    return norm_relu(mixed if bias is None else mixed + bias[..., None, :])


def mix_points(
    points: Tensor,
    own: Tensor,
    bias: Tensor | None = None,
    stored: Tensor | None = None,
    gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    filters = (
        own if stored is None else torch.cat((own, blend_filters(own, stored, *(gates or ()))), -2)
    )
    mixed = filters @ points
    return norm_relu(mixed if bias is None else mixed + bias[..., :, None])


def mix_statically(
    points: Tensor,
    residual: Tensor,
    grid: tuple[int, int],
    within: tuple[Tensor, Tensor],
    across: tuple[Tensor, Tensor],
) -> Tensor:
    folded = points.unflatten(-2, grid)  # (..., K, Q, Dc)
    inside = F.linear(folded.flatten(-2), *within).view_as(folded)
    swapped = folded.transpose(-2, -3)  # (..., Q, K, Dc)
    between = F.linear(swapped.flatten(-2), *across).view_as(swapped).transpose(-2, -3)
    return residual + (inside + between).flatten(-3, -2)
