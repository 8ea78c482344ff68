"""Labels of other stages that come in while the training goes on."""

import torch
from torch import Tensor

from ...d2.events import get_event_storage
from ..assigner import CrossStageAssigner


class ScheduledAssigner(CrossStageAssigner):
    """:class:`CrossStageAssigner` whose scope grows with the iterations. An idea of this project.

    Early in a training stages match at random, and what one of them gives the others is noise. Here
    a stage gathers from itself alone until the share ``start`` of the training, then from stages
    that are one apart, two apart, and so on, and from ``end`` on from its whole scope. In an
    evaluation and on a page it is the whole scope.

    ``model.criterion.assigner=L(ScheduledAssigner)(max_iter="${train.max_iter}")`` in a config.

    Args:
        scope, iou_threshold: as of :class:`CrossStageAssigner`.
        start, end: shares of the training, 0 to 1.
        max_iter: iterations of the training.
    """

    def __init__(self, *, start: float = 0.0, end: float = 0.5, max_iter: int, **others):
        super().__init__(**others)
        if not 0.0 <= start < end <= 1.0:
            raise ValueError(f"start and end must fulfil 0 <= start < end <= 1, got {start}, {end}")
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter}")
        self.first, self.last = start, end
        self.max_iter = max_iter

    def in_scope(self, num_stages: int) -> Tensor:
        """As :meth:`CrossStageAssigner.in_scope`; in training at this iteration."""
        whole = super().in_scope(num_stages)
        if not self.training:
            return whole
        share = (_iteration(self.max_iter) / self.max_iter - self.first) / (self.last - self.first)
        stage = torch.arange(num_stages)
        return whole & ((stage[:, None] - stage).abs() <= share * (num_stages - 1)) | torch.eye(
            num_stages, dtype=torch.bool
        )


def _iteration(otherwise: int) -> int:
    """Of the training that is going on."""
    try:
        return get_event_storage().iter
    except (RuntimeError, AssertionError):  # there is none: ours says the one, detectron2 the other
        return otherwise
