"""Queries that skip a stage are recollected for training: later stages see earlier queries.

SQR (Chen et al., "Enhanced Training of Query-Based Object Detection via Selective Query
Recollection", CVPR 2023, section 3.3). Stage i starts in training not only from what stage i - 1
puts out, but from what stage i - 2 put out too, so that late stages learn to mend what an early one
left. The number of sets of queries grows as 1, 2, 3, 5, 8, 13; detection has the first set alone,
and costs what it costs without. A set's path is the stages that its queries went through, and the
first set of each stage is the one that has skipped none.

``model.decoder.parts.cascade`` and ``model.criterion`` go together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...d2.structures import Instances
from ...ops import Pyramid
from ..criterion import Criterion
from ..decoder import Decoder
from ..geometry import full_precision
from ..matcher import Targets
from ..mixing import CascadeMixing, Filters
from ..stage import DecoderStage, StageOutput
from .query_groups import as_targets, groups_as_images, repeated

Path = tuple[int, ...]  # stages, 0-based, the last one last


def paths_to(stage: int) -> list[Path]:
    """Of each set of queries that a stage puts out, the path."""
    if stage < 0:
        return [()]
    before = paths_to(stage - 1) + (paths_to(stage - 2) if stage else [])
    return [(*path, stage) for path in before]


class RecollectingDecoder(Decoder):
    """:class:`Decoder` that sends recollected queries through each stage as well, in training.

    Recollected queries carry the filters that their own stages stored for them. In the place of the
    stage that they skip stands what this stage generates from them: the gates of each stored filter
    keep their meaning. Sets do not see each other.

    Args:
        stages, exit_stage: as of :class:`Decoder`; their mixing is :class:`CascadeMixing`.
    """

    def __init__(self, stages: Sequence[DecoderStage], exit_stage: int | None = None):
        super().__init__(stages, exit_stage)
        if not all(isinstance(stage.mixing, CascadeMixing) for stage in stages):
            raise ValueError("RecollectingDecoder takes stages whose mixing is a CascadeMixing")

    def forward(
        self, features: Pyramid | Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> list[StageOutput]:
        """As :class:`Decoder`; in training the outputs of stage i are those of all its sets, one
        behind the other on the axis of queries, in the order of :func:`paths_to`."""
        if not self.training:
            return super().forward(features, content, xyzr)
        pyramid = features if isinstance(features, Pyramid) else Pyramid(features)
        stages: Any = self.stages
        # Of each path: content and positions with which it goes on, and its stored filters.
        sets: dict[Path, tuple[Tensor, Tensor, tuple[Filters, ...]]] = {(): (content, xyzr, ())}
        outputs: list[StageOutput] = []
        for index, stage in enumerate(stages):
            of_sets: list[StageOutput] = []
            for path in paths_to(index):
                content, xyzr, stored = sets[path[:-1]]
                if len(stored) < index:
                    stored = (*stored, stages[index - 1].mixing.generate(content))
                output, filters = stage(pyramid, content, xyzr, stored)
                sets[path] = output.content, output.xyzr.detach(), (*stored, filters)
                of_sets.append(output)
            outputs.append(StageOutput(*(torch.cat(field, 1) for field in zip(*of_sets))))
        return outputs


class RecollectingCriterion(Criterion):
    """The losses of a stage are summed over its sets, as SQR does.

    Each set is matched with the objects by itself. Labels across stages come along the path of a
    set: from the stages that its queries went through, and from those behind it as they go on
    without another skip.

    What is evaluated has one set, and the losses of :class:`Criterion`.
    """

    def sums(
        self, outputs: Sequence[StageOutput], objects: Targets | Sequence[Instances]
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`Criterion.sums`: sums over the sets, and counts that are means of them."""
        if not self.training:
            return super().sums(outputs, objects)
        with torch.autocast(outputs[0].logits.device.type, enabled=False):
            return self._sums_of_sets(outputs, objects)

    def _sums_of_sets(
        self, outputs: Sequence[StageOutput], objects: Targets | Sequence[Instances]
    ) -> tuple[Tensor, Tensor]:
        paths = [paths_to(stage) for stage in range(len(outputs))]
        first, last = (outputs[stage].logits.shape[1] for stage in (0, -1))
        if last != first * len(paths[-1]):
            raise ValueError(
                "the decoder recollects no queries: set model.decoder.parts.cascade to "
                "RecollectingDecoder"
            )
        sets = [groups_as_images(o, len(of_stage)) for o, of_stage in zip(outputs, paths)]
        logits = [full_precision(output.logits)[None] for output in sets]  # (1, B * S, N, C)
        boxes = [full_precision(output.boxes)[None] for output in sets]
        targets = as_targets(objects, boxes[0]).to(boxes[0].dtype)
        of_sets = [repeated(targets, len(of_stage)) for of_stage in paths]
        matched = [
            self.matcher(z.detach(), b.detach(), many) for z, b, many in zip(logits, boxes, of_sets)
        ]
        labels = self._labels_along_paths(matched, boxes, targets, paths)
        sums, counts = [], []
        for stage, many in enumerate(of_sets):
            losses = self.losses(logits[stage], boxes[stage], many, matched[stage], labels[stage])
            sums.append(torch.cat(losses))
            found = labels[stage].sum().to(boxes[0].dtype), (matched[stage] >= 0).sum()
            counts.append(torch.stack([count / len(paths[stage]) for count in found]))
        return torch.stack(sums, 1), torch.stack(counts, 1)

    def _labels_along_paths(
        self,
        matched: Sequence[Tensor],
        boxes: Sequence[Tensor],
        targets: Targets,
        paths: Sequence[Sequence[Path]],
    ) -> list[Tensor]:
        """Of each stage the labels of all its sets, (1, B * S, N, C)."""

        def of_set(values: Tensor, stage: int, path: Path) -> Tensor:  # (B, N, ...)
            return values[0].unflatten(0, (-1, len(paths[stage])))[:, paths[stage].index(path)]

        labels: dict[Path, Tensor] = {}
        last = len(paths) - 1
        for whole in paths[last]:
            nodes = [tuple(stage for stage in whole if stage <= end) for end in range(last + 1)]
            along = [
                (of_set(matched[stage], stage, node), of_set(boxes[stage], stage, node).detach())
                if stage in whole
                else None
                for stage, node in enumerate(nodes)
            ]
            # A stage that is skipped has matched nothing; its boxes are not looked at.
            nothing = next((-torch.ones_like(m), b) for m, b in filter(None, along))
            chain = [nothing if found is None else found for found in along]
            found = self.assigner(
                *(torch.stack(values) for values in zip(*chain)), targets, self.num_classes
            )
            for stage in whole:  # what lies before its last skip is another path's
                labels.setdefault(nodes[stage], found[stage])
        return [
            torch.stack([labels[path] for path in of_stage], 1).flatten(0, 1)[None]
            for of_stage in paths
        ]
