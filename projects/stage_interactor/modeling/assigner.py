"""Which class labels a query is trained with: its own match, or other stages' matches too."""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import box_iou
from .matcher import Targets
from .transfer import to_device


class OneToOneAssigner(nn.Module):
    """Each stage's labels are its own matches (the baseline; AdaMixer)."""

    def forward(self, matched: Tensor, boxes: Tensor, targets: Targets, num_classes: int) -> Tensor:
        """See :meth:`CrossStageAssigner.forward`."""
        _, classes = targets.of_matches(matched)
        return F.one_hot(classes, num_classes).bool() & (matched >= 0)[..., None]


class CrossStageAssigner(nn.Module):
    """Cross-stage label assignment: gather matches of other stages, keep those that overlap.

    For stage i, every (query, object) pair that matching made on a stage in the scope gives the
    query the object's class, if the box that the query predicted *at stage i* overlaps the object
    with at least the threshold. So a query can carry several classes, an object several queries,
    and a stage's own match below the threshold carries none. Box targets are not touched.

    Args:
        scope: first and last stage to gather from, as in the paper (section J): ``("i-1", "L")``.
            Each end is ``"i"``, ``"i-k"``, ``"i+k"``, ``"L"`` (the last stage), ``"L-k"`` or a
            number counted from 0; one end alone stands for both. Stages that do not exist are left
            out, and i itself is always in.
        iou_threshold: 0.5 in the paper.
    """

    def __init__(self, *, scope: Sequence[str | int] = ("i-1", "L"), iou_threshold: float = 0.5):
        super().__init__()
        ends = list(scope) * 2 if len(scope) == 1 else list(scope)
        if isinstance(scope, str) or len(ends) != 2:
            raise ValueError(f'scope must name two stages, such as ("i-1", "L"), got {scope!r}')
        self.start, self.end = (self._parse(end) for end in ends)
        if not 0.0 <= iou_threshold <= 1.0:
            raise ValueError(f"iou_threshold must lie between 0 and 1, got {iou_threshold}")
        self.iou_threshold = iou_threshold

    @staticmethod
    def _parse(end: str | int) -> tuple[str, int]:
        """One end of the scope as (what it is relative to, offset)."""
        found = re.fullmatch(r"([iL])([+-]\d+)?|(\d+)", str(end).replace(" ", ""))
        if not found:
            raise ValueError(f"a scope's end must be such as 'i', 'i-1', 'L' or 0, got {end!r}")
        return found[1] or "", int(found[2] or found[3] or 0)

    def stages_in_scope(self, stage: int, num_stages: int) -> list[int]:
        """The stages (0-based) whose matches count for ``stage``."""
        base = {"i": stage, "L": num_stages - 1, "": 0}
        first, last = (base[name] + offset for name, offset in (self.start, self.end))
        return sorted({stage, *range(max(first, 0), min(last, num_stages - 1) + 1)})

    def in_scope(self, num_stages: int) -> Tensor:
        """(L, L), on the CPU: whether the matches of stage j count for stage i."""
        scopes = [self.stages_in_scope(stage, num_stages) for stage in range(num_stages)]
        return torch.tensor([[other in scope for other in range(num_stages)] for scope in scopes])

    def kept_matches(self, matched: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """(L, L, B, N): whether stage i labels query n with the match that stage j made for it.

        Stage i is on the first axis, stage j on the second. Arguments as of :meth:`forward`.
        """
        in_scope = to_device(self.in_scope(len(matched)), matched.device)
        objects, _ = targets.of_matches(matched)
        kept = box_iou(boxes[:, None], objects) >= self.iou_threshold
        return kept & in_scope[..., None, None] & (matched >= 0)

    @torch.no_grad()
    def forward(self, matched: Tensor, boxes: Tensor, targets: Targets, num_classes: int) -> Tensor:
        """
        Args:
            matched: (L, B, N) index of each query's object at each stage, -1 for none.
            boxes: (L, B, N, 4) predicted at each stage, xyxy in pixels.
            num_classes: C.

        Returns:
            labels (L, B, N, C), boolean.
        """
        kept = self.kept_matches(matched, boxes, targets)
        _, classes = targets.of_matches(matched)
        # A class is a label if any of the matches kept has it.
        labels = classes.new_zeros(*matched.shape, num_classes, dtype=torch.uint8)
        classes = classes.movedim(0, -1).expand(*matched.shape, -1)  # (L, B, N, L)
        return labels.scatter_reduce_(-1, classes, kept.movedim(1, -1).byte(), "amax").bool()
