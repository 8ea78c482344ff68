"""The element-wise part of dynamic mixing: blending filters, normalising what they produce."""

import torch
import torch.nn.functional as F
from torch import Tensor


def blend_filters(own: Tensor, stored: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``own + (rows columns^T) * (stored - own)``: a linear interpolation, gated per element.

    Args:
        own, stored: (..., R, C) filters.
        rows: (..., R) gate of each row, 0 to 1.
        columns: (..., C) gate of each column, 0 to 1.
    """
    return torch.lerp(own, stored, rows[..., :, None] * columns[..., None, :])


def norm_relu(features: Tensor) -> Tensor:
    """ReLU of a layer norm, without affine, over the last *two* axes (points and channels)."""
    return F.relu(F.layer_norm(features, features.shape[-2:]))
