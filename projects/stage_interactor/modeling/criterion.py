"""The training losses of all stages: AdaMixer's, as section J says, on other labels."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..d2.structures import Instances
from ..ops import focal_loss
from .assigner import CrossStageAssigner, OneToOneAssigner
from .geometry import full_precision, iou_and_giou
from .matcher import Targets
from .stage import StageOutput


def mean_over_processes(counts: Tensor) -> Tensor:
    """The mean of counts over all processes, of which there is at least 1 altogether."""
    processes = 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        processes = dist.get_world_size()
        counts = counts / processes
        dist.all_reduce(counts)
    return counts.clamp(min=1.0 / processes)


class Criterion(nn.Module):
    """Focal, L1 and GIoU loss of every stage, all stages with weight 1.

    The class labels come from the assigner; box targets are always the stage's own one-to-one
    matches. Focal loss is divided by the larger of the number of labels and the number of matches,
    box losses by the number of matches; both are averaged over the processes, so that several of
    them compute what one would.

    Args:
        num_classes: C.
        matcher: one-to-one matching, :class:`HungarianMatcher` or :class:`DetrStyleMatcher`.
        assigner: class labels from the matches.
        loss_class_weight, loss_bbox_weight, loss_giou_weight: weights of the losses.
        alpha, gamma: of the focal loss.
        class_weights: (C,), of the focal loss of each class; 1 by default.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        num_classes: int = 80,
        matcher: nn.Module,
        assigner: CrossStageAssigner | OneToOneAssigner,
        loss_class_weight: float = 2.0,
        loss_bbox_weight: float = 5.0,
        loss_giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.assigner = assigner
        self.weights = (loss_class_weight, loss_bbox_weight, loss_giou_weight)
        self.alpha = alpha
        self.gamma = gamma
        self.weigh_classes(class_weights)

    def weigh_classes(self, weights: Sequence[float] | None) -> None:
        """Sets the weights of the classes' focal losses; None is 1 for each.

        Raises:
            ValueError: there are more or fewer of them than classes.
        """
        if weights is not None and len(weights) != self.num_classes:
            raise ValueError(
                f"class_weights has {len(weights)} weights for {self.num_classes} classes"
            )
        found = None if weights is None else torch.tensor([float(weight) for weight in weights])
        self.register_buffer("class_weights", found, persistent=False)

    def forward(
        self, outputs: Sequence[StageOutput], objects: Targets | Sequence[Instances]
    ) -> dict[str, Tensor]:
        """
        Args:
            outputs: of every stage.
            objects: of every image, or Instances with ``gt_boxes`` (xyxy in pixels of the resized
                image) and ``gt_classes`` (0-based).

        Returns:
            ``loss_class``, ``loss_bbox``, ``loss_giou`` of the last stage and ``loss_class_0`` ...
            of the earlier ones, weighted.
        """
        sums, counts = self.sums(outputs, objects)
        # First the mean, then the maximum: several processes then divide by what one would.
        return self.named(sums, mean_over_processes(counts))

    def sums(
        self, outputs: Sequence[StageOutput], objects: Targets | Sequence[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Focal, L1 and GIoU loss of each stage summed over the images, (3, L), and how many labels
        and matches there are, (2, L), which divide them."""
        with torch.autocast(outputs[0].logits.device.type, enabled=False):
            logits = full_precision(torch.stack([output.logits for output in outputs]))
            boxes = full_precision(torch.stack([output.boxes for output in outputs]))
            if isinstance(objects, Targets):
                targets = objects.to(boxes.dtype)
            else:
                targets = Targets.from_instances(objects, boxes.dtype, boxes.device)
            matched = self.matcher(logits.detach(), boxes.detach(), targets)  # (L, B, N)
            labels = self.assigner(matched, boxes.detach(), targets, self.num_classes)
            num_matches = (matched >= 0).sum((1, 2)).to(boxes.dtype)  # (L,)
            num_labels = labels.sum((1, 2, 3)).to(boxes.dtype)
            losses = self.losses(logits, boxes, targets, matched, labels)
            return torch.stack(losses), torch.stack((num_labels, num_matches))

    def named(self, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """The weighted losses by their names, of what :meth:`sums` gives; no count is 0."""
        num_labels, num_matches = counts
        normalisers = (torch.maximum(num_labels, num_matches), num_matches, num_matches)
        named = {}
        for name, loss, weight, normaliser in zip(
            ("loss_class", "loss_bbox", "loss_giou"), sums, self.weights, normalisers
        ):
            for stage, value in enumerate(weight * loss / normaliser):
                suffix = "" if stage == len(loss) - 1 else f"_{stage}"
                named[name + suffix] = value
        return named

    def losses(
        self, logits: Tensor, boxes: Tensor, targets: Targets, matched: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Focal, L1 and GIoU loss of each stage, (L,) each, summed over queries."""
        focal = focal_loss(logits, labels, self.alpha, self.gamma, self.class_weights)

        is_matched = matched >= 0  # (L, B, N)
        goals, _ = targets.of_matches(matched)  # (L, B, N, 4)
        # Unmatched queries get a box equal to the goal: no loss, no gradient, and no NaN from it.
        pairs = torch.where(is_matched[..., None], boxes, goals)
        l1 = ((pairs - goals) / targets.box_scale[:, None]).abs().sum(-1)
        _, giou = iou_and_giou(pairs, goals)
        giou_loss = (1 - giou) * is_matched
        return focal, l1.sum((1, 2)), giou_loss.sum((1, 2))
