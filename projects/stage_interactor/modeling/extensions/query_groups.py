"""Several groups of queries in training, of which one detects.

Group DETR (Chen et al., ICCV 2023, section 3.2): K groups of N queries go through the same decoder
without seeing each other, and each is matched with the objects by itself. An object so has K
queries to learn from, and detection costs what it costs with one group.

The three parts go together: ``model.queries``, ``model.decoder.parts.cascade`` and
``model.criterion``, with one ``num_groups``.
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


class GroupedQueries(InitialQueries):
    """N queries of each group in training, one behind the other, and those of the first otherwise.

    Args:
        num_queries: N.
        embed_dim: D.
        num_groups: K (11 in Group DETR).
    """

    def __init__(self, *, num_queries: int = 100, embed_dim: int = 256, num_groups: int):
        require_whole(num_groups=num_groups)
        super().__init__(num_queries=num_groups * num_queries, embed_dim=embed_dim)
        self.num_queries, self.num_groups = num_queries, num_groups

    def forward(self, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`InitialQueries`; K * N queries in training."""
        content, xyzr = super().forward(image_sizes)  # xyzr (B, N, 4)
        if self.training:
            return content, xyzr.repeat(1, self.num_groups, 1)
        return content[:, : self.num_queries], xyzr


class GroupedDecoder(Decoder):
    """Sends each group through the cascade by itself; at inference there is one.

    Args:
        stages, exit_stage: as of :class:`Decoder`.
        num_groups: K.
    """

    def __init__(
        self, stages: Sequence[DecoderStage], exit_stage: int | None = None, *, num_groups: int
    ):
        require_whole(num_groups=num_groups)
        super().__init__(stages, exit_stage)
        self.num_groups = num_groups

    def forward(
        self, features: Pyramid | Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> list[StageOutput]:
        """As :class:`Decoder`; in training the outputs are of K * N queries.

        Raises:
            ValueError: in training, the queries are no K groups.
        """
        if not self.training:
            return super().forward(features, content, xyzr)
        if content.shape[1] % self.num_groups:
            raise ValueError(
                f"{content.shape[1]} queries are no {self.num_groups} groups: set model.queries to "
                "GroupedQueries with the same num_groups"
            )
        sizes = [content.shape[1] // self.num_groups] * self.num_groups
        return each_by_itself(self, features, content, xyzr, sizes)


class GroupedCriterion(Criterion):
    """Matches and labels each group by itself: the losses are the mean over the groups.

    What is evaluated has one group, and the losses of :class:`Criterion`.

    Args:
        num_groups: K.
        others: as of :class:`Criterion`.
    """

    def __init__(self, *, num_groups: int, **others):
        require_whole(num_groups=num_groups)
        super().__init__(**others)
        self.num_groups = num_groups

    def sums(
        self, outputs: Sequence[StageOutput], objects: Targets | Sequence[Instances]
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`Criterion.sums`, over the groups too."""
        if not self.training:
            return super().sums(outputs, objects)
        targets = repeated(as_targets(objects, outputs[0].boxes), self.num_groups)
        return super().sums([groups_as_images(o, self.num_groups) for o in outputs], targets)


def each_by_itself(
    decoder: Decoder,
    features: Pyramid | Sequence[Tensor],
    content: Tensor,
    xyzr: Tensor,
    sizes: Sequence[int],
) -> list[StageOutput]:
    """The outputs of :meth:`Decoder.forward` for sets of so many queries, which lie one behind the
    other on the second axis, as do the outputs; no set sees another."""
    pyramid = features if isinstance(features, Pyramid) else Pyramid(features)
    sets = zip(content.split(sizes, 1), xyzr.split(sizes, 1))
    outputs = [Decoder.forward(decoder, pyramid, *queries) for queries in sets]
    return [StageOutput(*(torch.cat(f, 1) for f in zip(*of_sets))) for of_sets in zip(*outputs)]


def groups_as_images(output: StageOutput, count: int) -> StageOutput:
    """(B, K * N, ...) as (B * K, N, ...): the groups of an image one behind the other."""
    return StageOutput(*(field.unflatten(1, (count, -1)).flatten(0, 1) for field in output))


def as_targets(objects: Targets | Sequence[Instances], boxes: Tensor) -> Targets:
    """Objects as the criterion takes them, in the precision of boxes and where these are."""
    if isinstance(objects, Targets):
        return objects
    return Targets.from_instances(objects, boxes.dtype, boxes.device)


def repeated(targets: Targets, count: int) -> Targets:
    """The objects of each image for each of its groups."""
    boxes, classes, counts, sizes = targets
    boxes, classes, sizes = (t.repeat_interleave(count, 0) for t in (boxes, classes, sizes))
    return Targets(boxes, classes, tuple(n for n in counts for _ in range(count)), sizes)


def require_whole(**numbers: int) -> None:
    """Raises a ValueError unless each is a number of something, by its name."""
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {number!r}")
