"""Sampling points from a feature pyramid."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def sample_pyramid(
    features: Sequence[Tensor], xy: Tensor, level_weights: Tensor, strides: Sequence[int]
) -> Tensor:
    """Bilinear features at the points, summed over levels with weights.

    Group g reads channels ``g * Dc .. (g + 1) * Dc`` of every level; points outside a map read
    zeros (``align_corners=False``).

    Args:
        features: per level (B, G * Dc, H_l, W_l).
        xy: (B, N, G, P, 2), pixels from the upper left corner, in full precision.
        level_weights: (B, N, G, P, levels).
        strides: image pixels per feature pixel of each level.

    Returns:
        (B, N, G, P, Dc), in the precision of ``xy``.
    """
    batch, num_queries, groups, points, _ = xy.shape
    xy = xy.transpose(1, 2).flatten(0, 1)  # (B * G, N, P, 2)
    weights = level_weights.transpose(1, 2).flatten(0, 1)  # (B * G, N, P, levels)
    sampled = 0.0
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        height, width = feature.shape[-2:]
        grid = xy * xy.new_tensor((2.0 / (stride * width), 2.0 / (stride * height))) - 1.0
        values = feature.to(xy.dtype).reshape(batch * groups, -1, height, width)
        values = F.grid_sample(values, grid, align_corners=False)  # (B * G, Dc, N, P)
        sampled = sampled + values * weights[..., level][:, None]
    return sampled.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)
