"""A second set of queries in training, which is matched with each object several times.

H-DETR (Jia et al., "DETRs with Hybrid Matching", CVPR 2023, section 3.2, the hybrid branch scheme):
beside the N queries that detect, M more go through the same decoder without being seen, and their
one-to-one matching is with K copies of each object: one object has K queries to teach. Their losses
have names of their own, ``o2m_loss_class`` and so on, and a weight. Detection costs what it costs
without.

The three parts go together: ``model.queries``, ``model.decoder.parts.cascade`` and
``model.criterion``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...d2.structures import Instances
from ...ops import Pyramid
from ..criterion import Criterion
from ..decoder import Decoder
from ..matcher import Targets
from ..queries import InitialQueries
from ..stage import DecoderStage, StageOutput
from ..transfer import to_device
from .query_groups import as_targets, each_by_itself, require_whole


class HybridQueries(InitialQueries):
    """N queries that detect, and in training M more behind them.

    Args:
        num_queries: N.
        embed_dim: D.
        one_to_many_queries: M (1500 beside 300 in H-DETR).
    """

    def __init__(self, *, num_queries: int = 100, embed_dim: int = 256, one_to_many_queries: int):
        require_whole(one_to_many_queries=one_to_many_queries)
        super().__init__(num_queries=num_queries + one_to_many_queries, embed_dim=embed_dim)
        self.num_queries = num_queries

    def forward(self, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`InitialQueries`; N + M queries in training."""
        content, xyzr = super().forward(image_sizes)  # xyzr (B, N, 4)
        if self.training:
            return content, xyzr[:, :1].expand(-1, content.shape[1], -1)
        return content[:, : self.num_queries], xyzr


class HybridDecoder(Decoder):
    """Sends the two sets of queries through the cascade by themselves; at inference there is one.

    Args:
        stages, exit_stage: as of :class:`Decoder`.
        num_queries: N, those of the first set.
    """

    def __init__(
        self, stages: Sequence[DecoderStage], exit_stage: int | None = None, *, num_queries: int
    ):
        require_whole(num_queries=num_queries)
        super().__init__(stages, exit_stage)
        self.num_queries = num_queries

    def forward(
        self, features: Pyramid | Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> list[StageOutput]:
        """As :class:`Decoder`; in training the outputs are of N + M queries.

        Raises:
            ValueError: in training, there is one set of queries alone.
        """
        if not self.training:
            return super().forward(features, content, xyzr)
        more = content.shape[1] - self.num_queries
        if more < 1:
            raise ValueError(
                f"{content.shape[1]} queries are not more than num_queries={self.num_queries}: set "
                "model.queries to HybridQueries"
            )
        return each_by_itself(self, features, content, xyzr, [self.num_queries, more])


class HybridCriterion(Criterion):
    """The losses of the queries that detect, and those of the others with copies of the objects.

    What is evaluated has one set of queries, and the losses of :class:`Criterion`.

    Args:
        num_queries: N, those of the first set.
        num_copies: K (6 in H-DETR's paper).
        loss_one_to_many_weight: of the second set's losses, beside their own (1 in H-DETR).
        others: as of :class:`Criterion`.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        num_copies: int = 6,
        loss_one_to_many_weight: float = 1.0,
        **others,
    ):
        require_whole(num_queries=num_queries, num_copies=num_copies)
        super().__init__(**others)
        self.num_queries, self.num_copies = num_queries, num_copies
        self.one_to_many_weight = loss_one_to_many_weight

    def sums(
        self, outputs: Sequence[StageOutput], objects: Targets | Sequence[Instances]
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`Criterion.sums`; in training of both sets, (2, 3, L) and (2, 2, L)."""
        if not self.training:
            return super().sums(outputs, objects)
        targets = as_targets(objects, outputs[0].boxes)
        sets = slice(self.num_queries), slice(self.num_queries, None)
        of_sets = [
            super(HybridCriterion, self).sums(
                [StageOutput(*(field[:, part] for field in output)) for output in outputs], found
            )
            for part, found in zip(sets, (targets, copied(targets, self.num_copies)))
        ]
        sums, counts = (torch.stack(items) for items in zip(*of_sets))
        return sums, counts

    def named(self, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """As :meth:`Criterion.named`, with the names of the second set if there is one."""
        if sums.dim() == 2:
            return super().named(sums, counts)
        one, many = (super(HybridCriterion, self).named(*each) for each in zip(sums, counts))
        return one | {f"o2m_{name}": self.one_to_many_weight * loss for name, loss in many.items()}


def copied(targets: Targets, count: int) -> Targets:
    """Each object of an image ``count`` times: all of them once, then again."""
    boxes, classes, counts, sizes = targets
    objects = torch.zeros(len(counts), count * max(1, *counts), dtype=torch.long)
    for of_image, number in zip(objects, counts):
        of_image[: count * number] = torch.arange(number).repeat(count)
    objects = to_device(objects, boxes.device)
    image = torch.arange(len(counts), device=boxes.device)[:, None]
    many = tuple(count * number for number in counts)
    return Targets(boxes[image, objects], classes[image, objects], many, sizes)
