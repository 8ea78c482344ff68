"""Boxes, positional vectors and the position embedding.

A query's position is ``xyzr = (x, y, z, r)``: the centre in pixels, the scale
``z = log2 sqrt(w h)`` and the aspect ratio ``r = log2(h / w)`` (AdaMixer; supplement, section B).
Everything here works on the last axis, in the precision of its input.
"""

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """Half-precision values as float32; float32 and float64 as they are.

    Coordinates need it: between 1024 and 2048 pixels bfloat16 has steps of 8.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def box_size(xyzr: Tensor) -> Tensor:
    """Width 2^(z - r/2) and height 2^(z + r/2) in pixels, (..., 2), of positions (..., 4)."""
    z, r = xyzr[..., 2], xyzr[..., 3]
    return torch.stack((z - 0.5 * r, z + 0.5 * r), dim=-1).exp2()


def xyzr_to_boxes(xyzr: Tensor) -> Tensor:
    """Positions (..., 4) to boxes xyxy in pixels, (..., 4)."""
    half = 0.5 * box_size(xyzr)
    return torch.cat((xyzr[..., :2] - half, xyzr[..., :2] + half), dim=-1)


def boxes_to_xyzr(boxes: Tensor) -> Tensor:
    """Boxes xyxy in pixels (..., 4), of positive width and height, to positions (..., 4)."""
    size = boxes[..., 2:] - boxes[..., :2]
    z = 0.5 * size.log2().sum(-1, keepdim=True)
    r = (size[..., 1:] / size[..., :1]).log2()
    return torch.cat((0.5 * (boxes[..., :2] + boxes[..., 2:]), z, r), dim=-1)


def position_embedding(xyzr: Tensor, embed_dim: int) -> Tensor:
    """Sine-cosine embedding of positions, as AdaMixer defines it.

    Args:
        xyzr: (..., 4); x and y in pixels are divided by 1000 first.
        embed_dim: D, a multiple of 8. Each coordinate gets D/4 features, in (sin, cos) pairs.

    Returns:
        (..., D): the features of x, y, z and r, one after the other. No gradient flows through it.
    """
    coordinates = torch.cat((xyzr[..., :2] / 1000.0, xyzr[..., 2:]), -1).detach()
    pair = torch.arange(embed_dim // 8, dtype=torch.float64, device=xyzr.device)
    frequency = 10000.0 ** (-8.0 * pair / embed_dim)  # (D/8,)
    angle = coordinates[..., None] * frequency.to(coordinates)  # (..., 4, D/8)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-3)  # (..., 4 * D/8 * 2)


def _coordinates(boxes: Tensor) -> tuple[Tensor, ...]:
    """Left, top, right and bottom, (...) each, of boxes (..., 4)."""
    # Long rows of single numbers are what processors are fast at, not every fourth of them.
    return boxes.movedim(-1, 0).contiguous().unbind(0)


def box_area(boxes: Tensor) -> Tensor:
    """Areas (...) of boxes xyxy (..., 4)."""
    left, top, right, bottom = boxes.unbind(-1)
    return (right - left).clamp(min=0) * (bottom - top).clamp(min=0)


def intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """Areas shared by boxes and others, xyxy; the shapes before the last axis broadcast."""
    left, top, right, bottom = _coordinates(boxes)
    other_left, other_top, other_right, other_bottom = _coordinates(others)
    width = torch.minimum(right, other_right) - torch.maximum(left, other_left)
    height = torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)
    return width.clamp(min=0) * height.clamp(min=0)


def hull_area(boxes: Tensor, others: Tensor) -> Tensor:
    """Areas of the smallest boxes around boxes and others, xyxy, which broadcast."""
    left, top, right, bottom = _coordinates(boxes)
    other_left, other_top, other_right, other_bottom = _coordinates(others)
    width = torch.maximum(right, other_right) - torch.minimum(left, other_left)
    height = torch.maximum(bottom, other_bottom) - torch.minimum(top, other_top)
    return width.clamp(min=0) * height.clamp(min=0)


def intersection_over_foreground(boxes: Tensor, eps: float = 1e-6) -> Tensor:
    """IoF of every pair: how much of box a lies inside box b, (B, N, 4) to (B, N a, N b)."""
    shared = intersection(boxes[:, :, None], boxes[:, None])
    return shared / box_area(boxes).clamp(min=eps)[:, :, None]


def _iou_and_union(boxes: Tensor, others: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    shared = intersection(boxes, others)
    union = (box_area(boxes) + box_area(others) - shared).clamp(min=eps)
    return shared / union, union


def box_iou(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> Tensor:
    """IoU (...) of boxes xyxy (..., 4) whose leading axes broadcast, as :func:`iou_and_giou`."""
    return _iou_and_union(boxes, others, eps)[0]


def iou_and_giou(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU, (...) each, of boxes xyxy (..., 4) whose leading axes broadcast.

    Use ``boxes[:, None], others[None]`` for all pairs, equal shapes for element by element.
    """
    iou, union = _iou_and_union(boxes, others, eps)
    hull = hull_area(boxes, others).clamp(min=eps)
    return iou, iou - (hull - union) / hull
