"""A cascade that ends, at inference, once the boxes of an image have settled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import Pyramid
from ..decoder import Decoder
from ..geometry import box_iou
from ..stage import DecoderStage, StageOutput


class SettledDecoder(Decoder):
    """Ends the cascade of an image after the first stage that hardly moves what it has found.

    That is measured by the IoU of each query's box with its box of the stage before, as a mean that
    the queries' best scores weigh: boxes that nobody will see do not keep the cascade going. An
    idea of this project. Weights and training are those of :class:`Decoder`.

    Each image goes through the cascade by itself: what is found in it does not depend on others.

    ``model.decoder.parts.cascade=L(SettledDecoder)(exit_iou=0.95)`` in a config.

    Args:
        stages, exit_stage: as of :class:`Decoder`; the cascade ends there at the latest.
        exit_iou: from which mean IoU on the boxes have settled, above 0 and at most 1.

    Attributes:
        num_stages: that were computed, of each image of the last call that detected.
    """

    num_stages: tuple[int, ...] = ()

    def __init__(
        self, stages: Sequence[DecoderStage], exit_stage: int | None = None, *, exit_iou: float
    ):
        super().__init__(stages, exit_stage)
        if not 0 < exit_iou <= 1:
            raise ValueError(f"exit_iou must be an IoU above 0 and at most 1, got {exit_iou}")
        self.exit_iou = exit_iou

    def forward(
        self, features: Pyramid | Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> list[StageOutput]:
        """As :class:`Decoder`; the last output of an image stands for all that it did not need.

        Raises:
            ValueError: it is compiled or exported, to a graph that is the same for all images.
        """
        if self.training:
            return super().forward(features, content, xyzr)
        if torch.compiler.is_compiling():
            raise ValueError(
                "SettledDecoder ends a cascade by what is found, which no graph can: set "
                "model.decoder.parts.cascade to null, and model.decoder.exit_stage where all end"
            )
        maps = features.maps if isinstance(features, Pyramid) else features
        cascades = [
            super(SettledDecoder, self).forward([level[index, None] for level in maps], *query)
            for index, query in enumerate(zip(content[:, None], xyzr[:, None]))
        ]
        self.num_stages = tuple(map(len, cascades))
        padded = [
            [outputs[min(stage, len(outputs) - 1)] for outputs in cascades]
            for stage in range(self.exit_stage or len(self.stages))
        ]
        return [StageOutput(*map(torch.cat, zip(*outputs))) for outputs in padded]

    def is_enough(self, outputs: Sequence[StageOutput]) -> bool:
        if super().is_enough(outputs) or len(outputs) < 2:
            return super().is_enough(outputs)
        before, now = outputs[-2:]
        weights = now.logits.amax(-1).sigmoid()
        settled = (weights * box_iou(now.boxes, before.boxes)).sum() / weights.sum()
        return bool(settled >= self.exit_iou)  # never of what is NaN
