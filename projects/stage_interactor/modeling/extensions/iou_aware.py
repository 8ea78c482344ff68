"""Class labels that say how well a box fits, and the losses that learn from them.

The paper's labels are yes or no: a match of a stage in the scope counts if the query's own box
overlaps the object by 0.5. Here a label is a number, 0 for none: :class:`IoUAssigner` gives it, and
:class:`IoUAwareCriterion` learns it. Training alone has it; the detector is the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..assigner import CrossStageAssigner
from ..criterion import Criterion
from ..geometry import box_iou
from ..matcher import Targets

_LEAST = 1e-6  # of a label: that of a match which does not overlap its object is one all the same
_LEAST_ALIGNED = 0.01


class IoUAssigner(CrossStageAssigner):
    """Cross-stage labels with a value: how well the query's box at this stage fits the object.

    Without a ``temperature`` the value is their IoU, which VFL and MAL learn as the score. With one
    it is how much the label counts, sigmoid((IoU - iou_threshold) / temperature): an idea of this
    project, which weighs the matches of other stages where the paper cuts them off at the
    threshold, and is the paper's cut for a temperature near 0. Where several matches in the scope
    name one class, the largest value holds.

    ``scope=("i",)`` and ``iou_threshold=0`` label a stage with its own matches alone, as detectors
    without a cascade of labels do.

    Args:
        scope: see :class:`CrossStageAssigner`.
        iou_threshold: from which IoU on a match is a label at all; with a temperature, where it
            counts one half.
        temperature: in IoU, above 0; None for the IoU itself.
    """

    def __init__(
        self,
        *,
        scope: tuple = ("i-1", "L"),
        iou_threshold: float = 0.5,
        temperature: float | None = None,
    ):
        super().__init__(scope=scope, iou_threshold=iou_threshold)
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, or None, got {temperature}")
        self.temperature = temperature
        self.middle = iou_threshold
        if temperature is not None:
            self.iou_threshold = 0.0  # nothing is cut off

    @torch.no_grad()
    def forward(self, matched: Tensor, boxes: Tensor, targets: Targets, num_classes: int) -> Tensor:
        """See :meth:`CrossStageAssigner.forward`; labels (L, B, N, C) are values from 0 to 1."""
        kept = self.kept_matches(matched, boxes, targets)  # (L, L, B, N)
        objects, classes = targets.of_matches(matched)
        value = box_iou(boxes[:, None], objects)
        if self.temperature is not None:
            value = ((value - self.middle) / self.temperature).sigmoid()
        value = torch.where(kept, value.clamp(min=_LEAST), 0)
        labels = boxes.new_zeros(*matched.shape, num_classes)
        classes = classes.movedim(0, -1).expand(*matched.shape, -1)  # (L, B, N, L)
        return labels.scatter_reduce_(-1, classes, value.movedim(1, -1), "amax")


class IoUAwareCriterion(Criterion):
    """A class loss of labels that have values; boxes are trained as :class:`Criterion` does.

    With t the value of a label, s the score sigmoid(z) of the logit z and BCE(s, t) the binary
    cross entropy, a query and class without a label cost ``negative_weight * s^gamma * BCE(s, 0)``
    (s in the weight has no gradient) and those with one:

    - ``"varifocal"``: t * BCE(s, t) (VarifocalNet, Zhang et al., CVPR 2021, equation 2; with
      negative_weight 0.75 and gamma 2 there);
    - ``"matchability"``: BCE(s, t^gamma) (MAL of DEIM, Huang et al., CVPR 2025, equation 2; with
      negative_weight 1 and gamma 1.5);
    - ``"align"``: BCE(s, u) with u = s^alpha * t^(1 - alpha), at least 0.01 and without gradient;
      here the weight s^gamma of the others has one (IA-BCE of Align-DETR, Cai et al., 2023, as
      detrex computes it, without its several labels of an object; with negative_weight 1, alpha
      0.25 and gamma 2);
    - ``"focal"``: t FL(s, 1) + (1 - t) FL(s, 0), the focal loss of a label that is meant with
      probability t, where FL has alpha and gamma and ``negative_weight`` is not used.

    The class loss is divided by the larger of the sum of labels and the number of matches.

    Args:
        class_loss: one of these.
        negative_weight: of what has no label.
        others: as of :class:`Criterion`; the assigner is an :class:`IoUAssigner`.
    """

    def __init__(self, *, class_loss: str, negative_weight: float = 1.0, **others):
        super().__init__(**others)
        if class_loss not in list(_LOSSES):
            raise ValueError(f"class_loss must be one of {list(_LOSSES)}, got {class_loss!r}")
        if not isinstance(self.assigner, IoUAssigner):
            raise ValueError(
                f"IoUAwareCriterion learns labels that have values, and {type(self.assigner)} "
                "gives none: set model.criterion.assigner to an IoUAssigner"
            )
        if (class_loss == "focal") != (self.assigner.temperature is not None):
            raise ValueError(
                f"class_loss={class_loss!r} with temperature={self.assigner.temperature}: focal "
                "loss takes labels with a temperature, the others take IoUs"
            )
        self.class_loss, self.negative_weight = class_loss, negative_weight

    def losses(
        self, logits: Tensor, boxes: Tensor, targets: Targets, matched: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :class:`Criterion`, of labels (L, B, N, C) with values."""
        _, l1, giou = super().losses(logits, boxes, targets, matched, labels > 0)
        loss = _LOSSES[self.class_loss](self, logits, labels)
        if self.class_weights is not None:
            loss = loss * self.class_weights.to(loss)
        return loss.sum((1, 2, 3)), l1, giou

    def _against(self, logits: Tensor, score: Tensor, positive: Tensor, labels: Tensor) -> Tensor:
        """``positive`` where a label is, and what its absence costs elsewhere."""
        negative = self.negative_weight * score.pow(self.gamma) * F.softplus(logits)
        return torch.where(labels > 0, positive, negative)

    def _varifocal(self, logits: Tensor, labels: Tensor) -> Tensor:
        positive = labels * _entropy(logits, labels)
        return self._against(logits, logits.detach().sigmoid(), positive, labels)

    def _matchability(self, logits: Tensor, labels: Tensor) -> Tensor:
        positive = _entropy(logits, labels.pow(self.gamma))
        return self._against(logits, logits.detach().sigmoid(), positive, labels)

    def _align(self, logits: Tensor, labels: Tensor) -> Tensor:
        score = logits.sigmoid().clamp(min=_LEAST)  # whose root has a slope
        aligned = score.detach().pow(self.alpha) * labels.pow(1 - self.alpha)
        positive = _entropy(logits, aligned.clamp(min=_LEAST_ALIGNED))
        return self._against(logits, score, positive, labels)

    def _focal(self, logits: Tensor, labels: Tensor) -> Tensor:
        score = logits.sigmoid()
        meant = self.alpha * (1 - score).pow(self.gamma) * F.softplus(-logits)
        not_meant = (1 - self.alpha) * score.pow(self.gamma) * F.softplus(logits)
        return labels * meant + (1 - labels) * not_meant


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


_LOSSES = {
    "varifocal": IoUAwareCriterion._varifocal,
    "matchability": IoUAwareCriterion._matchability,
    "align": IoUAwareCriterion._align,
    "focal": IoUAwareCriterion._focal,
}
