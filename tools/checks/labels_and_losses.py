"""Labels and losses as the authors' code computes them: yardstick of the benchmark, and oracle."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss


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
