"""The operations as the authors' code computes them, in plain PyTorch: yardstick and oracle.

One ``grid_sample`` a level with a multiplication, an addition and a permutation each; every gate
blends the whole filter in passes of its own; autograd keeps what it likes. Shapes and meanings are
those of the public functions in ``sampling.py`` and ``mixing.py``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss


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


def labels_and_losses(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    """Matching, cross-stage labels and losses as the release does them: one image and stage a time.

    For one process and the paper's settings (cost and loss weights, scope from i - 1 to L,
    threshold 0.5).

    Args:
        logits, boxes: of every stage, (B, N, C) and (B, N, 4), xyxy in pixels.
        gt_boxes, gt_classes: of every image, (M, 4) and (M,).
        image_sizes: height and width of every image.

    Returns:
        the losses of ``Criterion``.
    """
    from scipy.optimize import linear_sum_assignment

    num_queries, num_classes = logits[0].shape[1:]
    scales = [
        torch.tensor([w, h, w, h], dtype=boxes[0].dtype, device=boxes[0].device)
        for h, w in image_sizes
    ]
    matches = []  # for each stage: whether a query is matched, with which class and box
    for stage_logits, stage_boxes in zip(logits, boxes):
        found = []
        for logit, box, objects, classes, scale in zip(
            stage_logits.detach(), stage_boxes.detach(), gt_boxes, gt_classes, scales
        ):
            score = logit.sigmoid()
            positive = 0.25 * (1 - score).pow(2) * -(score + 1e-12).log()
            negative = 0.75 * score.pow(2) * -(1 - score + 1e-12).log()
            cost = 2 * (positive - negative)[:, classes]
            cost = cost + 5 * torch.cdist(box / scale, objects / scale, p=1)
            cost = cost - 2 * generalized_box_iou(box, objects)
            rows, columns = linear_sum_assignment(cost.cpu())
            rows = torch.from_numpy(rows).to(box.device)
            columns = torch.from_numpy(columns).to(box.device)
            label = classes.new_full((num_queries,), num_classes)
            label[rows] = classes[columns]
            target = torch.zeros_like(box)
            target[rows] = objects[columns]
            found.append((label, target, scale.expand(num_queries, 4)))
        matches.append([torch.cat(parts) for parts in zip(*found)])

    losses = {}
    for stage, (label, target, scale) in enumerate(matches):
        box = boxes[stage].flatten(0, 1)
        wanted = box.new_zeros(len(box), num_classes)
        with torch.no_grad():
            for other_label, other_target, _ in matches[max(stage - 1, 0) :]:
                iou = _paired_ious(box, other_target)[0]
                rows = ((other_label < num_classes) & (iou >= 0.5)).nonzero().squeeze(1)
                wanted[rows, other_label[rows]] = 1.0
        rows = (label < num_classes).nonzero().squeeze(1)
        num_matches = max(len(rows), 1)
        num_labels = max(wanted.sum().item(), num_matches)
        focal = sigmoid_focal_loss(logits[stage].flatten(0, 1), wanted, 0.25, 2.0).sum()
        l1 = ((box[rows] - target[rows]) / scale[rows]).abs().sum()
        giou = (1 - _paired_ious(box[rows], target[rows])[1]).sum()
        suffix = "" if stage == len(matches) - 1 else f"_{stage}"
        losses["loss_class" + suffix] = 2 * focal / num_labels
        losses["loss_bbox" + suffix] = 5 * l1 / num_matches
        losses["loss_giou" + suffix] = 2 * giou / num_matches
    return losses


def _paired_ious(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes xyxy (n, 4), one by one."""
    low, high = torch.max(boxes[:, :2], others[:, :2]), torch.min(boxes[:, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (others[:, 2:] - others[:, :2]).prod(1)
    union = (areas - shared).clamp(min=1e-6)
    low, high = torch.min(boxes[:, :2], others[:, :2]), torch.max(boxes[:, 2:], others[:, 2:])
    hull = (high - low).clamp(min=0).prod(1).clamp(min=1e-6)
    return shared / union, shared / union - (hull - union) / hull
