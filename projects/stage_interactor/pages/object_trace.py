"""What the stages made of the objects of an image: whose queries found them, and which labels came
of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..d2.structures import Instances
from ..modeling import Criterion, CrossStageAssigner, StageOutput
from ..modeling.geometry import box_iou, full_precision
from ..modeling.matcher import Targets

OUT_OF_SCOPE, DROPPED, KEPT = -1, 0, 1


class ObjectTrace(NamedTuple):
    """Of M objects of an image on L stages, on the CPU.

    One-to-one matching gives an object at most one query a stage, so that a label which stage i
    takes from stage j is told by (i, j) and the object.
    """

    query: Tensor  # (L, M) that the stage's matching gives to the object; -1 for none
    iou: Tensor  # (L, M) of this query's box of the stage with the object; 0 without a query
    nearest: Tensor  # (L, M) the best IoU that any query's box of the stage has with the object
    score: Tensor  # (L, M) of this query on the stage, for the object's class; 0 without one
    labels: Tensor  # (L, L, M) what stage i does with the match of stage j: KEPT as a label,
    # DROPPED since the query's box of stage i does not overlap enough, or OUT_OF_SCOPE

    @property
    def queries_labelled(self) -> Tensor:
        """(L, M) how many queries of a stage carry the object's class for it."""
        counts = []
        for kept in self.labels == KEPT:  # (L, M) of a stage
            queries = torch.where(kept, self.query, -1).sort(0).values
            first = torch.ones_like(kept)  # of those that several matches name
            first[1:] = queries[1:] != queries[:-1]
            counts.append((first & (queries >= 0)).sum(0))
        return torch.stack(counts)


def trace_objects(
    criterion: Criterion, outputs: Sequence[StageOutput], objects: Sequence[Instances]
) -> list[ObjectTrace]:
    """Of every image, what the criterion's matcher and assigner make of the stages' outputs.

    Args:
        objects: of every image, with ``gt_boxes`` and ``gt_classes``.
    """
    with torch.no_grad():
        logits = full_precision(torch.stack([output.logits for output in outputs]))  # (L, B, N, C)
        boxes = full_precision(torch.stack([output.boxes for output in outputs]))
        targets = Targets.from_instances(objects, boxes.dtype, boxes.device)
        matched = criterion.matcher(logits, boxes, targets)  # (L, B, N)
        iou = box_iou(boxes, targets.of_matches(matched)[0])  # (L, B, N)
        assigner = criterion.assigner
        if isinstance(assigner, CrossStageAssigner):
            kept = assigner.kept_matches(matched, boxes, targets)  # (L, L, B, N)
            in_scope = assigner.in_scope(len(outputs))
        else:
            in_scope = torch.eye(len(outputs), dtype=torch.bool)
            kept = in_scope.to(matched.device)[..., None, None] & (matched >= 0)
    traces = []
    for image, count in enumerate(targets.counts):
        of_image = matched[:, image].cpu()
        shape = len(outputs), count
        query = torch.full(shape, -1)
        stages, queries = (of_image >= 0).nonzero(as_tuple=True)
        objects = of_image[stages, queries]
        query[stages, objects] = queries
        found = query >= 0
        overlaps, scores = torch.zeros(shape), torch.zeros(shape)
        goals = targets.boxes[image, :count]
        nearest = box_iou(boxes[:, image, :, None], goals).amax(1)  # (L, M)
        overlaps[stages, objects] = iou[:, image].cpu()[stages, queries].float()
        classes = targets.classes[image, :count].cpu()
        of_classes = logits[:, image].cpu().sigmoid()[stages, queries, classes[objects]]
        scores[stages, objects] = of_classes.float()
        labels = torch.full((len(outputs), *shape), OUT_OF_SCOPE, dtype=torch.int8)
        taken = kept[:, :, image].cpu()
        labels[:, stages, objects] = torch.where(
            in_scope[:, stages], taken[:, stages, queries].to(torch.int8), OUT_OF_SCOPE
        ).to(torch.int8)
        assert bool((labels[:, ~found] == OUT_OF_SCOPE).all())
        traces.append(ObjectTrace(query, overlaps, nearest.cpu().float(), scores, labels))
    return traces
