"""Gates of reuse that are a layer's, where the paper has each query choose its own."""

import torch
from torch import Tensor, nn

from ..mixing import CascadeMixing


class LayerGates(nn.Module):
    """Values that are the same for all queries, learned from 0: gates that start at 1/2."""

    def __init__(self, size: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size))

    def forward(self, content: Tensor) -> Tensor:
        """From content (B, N, D) the gates' logits (B, N, size)."""
        return self.logits.to(content.dtype).expand(*content.shape[:-1], -1)


class LayerGatedMixing(CascadeMixing):
    """:class:`CascadeMixing` whose gates do not depend on the query. An idea of this project.

    How much of an earlier stage's channel and spatial filters a stage takes (supplement, section A)
    is a vector of the stage, and not a linear layer of the query's content: it asks whether reuse
    has to be chosen for each object, and saves the weights and the time of these layers.

    ``model.decoder.parts.mixing=L(LayerGatedMixing)()`` in a config.

    Args:
        sizes: as of :class:`CascadeMixing`.
    """

    def __init__(self, **sizes):
        super().__init__(**sizes)
        by_query = [(step, "gates") for step in self.channel_reuse if step.dynamic]
        if self.spatial_reuse is not None:
            by_query += [(self.spatial_reuse, name) for name in ("row_gates", "point_gates")]
        for module, name in by_query:
            setattr(module, name, LayerGates(getattr(module, name).out_features))
