"""One stage of the cascade (supplement, section J)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import Pyramid
from .geometry import box_size, full_precision, position_embedding, xyzr_to_boxes
from .layers import ExactLinear, xavier_linear
from .mixing import Filters


class StageOutput(NamedTuple):
    """What one stage hands to the losses and to the next stage."""

    logits: Tensor  # (B, N, C)
    boxes: Tensor  # (B, N, 4), xyxy in pixels of the resized image
    content: Tensor  # (B, N, D)
    xyzr: Tensor  # (B, N, 4); x and y in pixels of the resized image


class FeedForward(nn.Module):
    """Two linear layers with ReLU, residual and LayerNorm."""

    def __init__(self, *, embed_dim: int = 256, hidden_dim: int = 2048):
        super().__init__()
        self.layers = nn.Sequential(
            xavier_linear(embed_dim, hidden_dim), nn.ReLU(), xavier_linear(hidden_dim, embed_dim)
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, content: Tensor) -> Tensor:
        return self.norm(content + self.layers(content))


class PredictionHead(nn.Module):
    """Classification and box refinement of one stage.

    Args:
        embed_dim: D.
        num_classes: C.
        refinement: unit of a box's move: ``"box_size"``, its width and height, or ``"scale"``,
            2^z on both axes (AdaMixer).
        prior: foreground probability that every class starts with.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_classes: int = 80,
        refinement: str = "box_size",
        prior: float = 0.01,
    ):
        super().__init__()
        if refinement not in ("box_size", "scale"):
            raise ValueError(f"refinement must be 'box_size' or 'scale', got {refinement!r}")
        self.refinement = refinement
        self.cls_branch = self._branch(embed_dim)
        self.box_branch = self._branch(embed_dim)
        self.cls_out = xavier_linear(embed_dim, num_classes)
        self.box_out = ExactLinear(embed_dim, 4)
        nn.init.zeros_(self.box_out.weight)
        nn.init.zeros_(self.box_out.bias)
        nn.init.constant_(self.cls_out.bias, -math.log((1 - prior) / prior))

    @staticmethod
    def _branch(embed_dim: int) -> nn.Sequential:
        return nn.Sequential(
            xavier_linear(embed_dim, embed_dim), nn.LayerNorm(embed_dim), nn.ReLU()
        )

    def forward(self, content: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        """Content (B, N, D) and positions (B, N, 4) to logits (B, N, C) and new positions."""
        logits = self.cls_out(self.cls_branch(content))
        features = self.box_branch(content)
        with torch.autocast(content.device.type, enabled=False):  # boxes: full precision
            delta = self.box_out(full_precision(features))
            unit = box_size(xyzr) if self.refinement == "box_size" else xyzr[..., 2:3].exp2()
            xyzr = torch.cat(
                (xyzr[..., :2] + unit * delta[..., :2], xyzr[..., 2:] + delta[..., 2:]), -1
            )
        return full_precision(logits), xyzr


class DecoderStage(nn.Module):
    """Attention among queries, sampling, mixing, feed-forward, predictions: in this order.

    A part of one's own takes and gives what is written here; residuals and norms are the parts'.

    Args:
        attention: content with position embedding (B, N, D) and xyzr (B, N, 4) to content
            (B, N, D), as :class:`OverlapAttention`.
        sampler: a :class:`Pyramid` of levels (B, D, H_l, W_l), content and xyzr to features
            (B, N, G, P, D/G), as :class:`PointSampler`, whose subclasses ``stage-interactor
            stages`` can draw.
        mixing: features, content and what the mixing of every earlier stage stored, oldest first,
            to content and what it stores itself, as :class:`CascadeMixing`.
        feedforward: content to content, as :class:`FeedForward`.
        head: content and xyzr to logits (B, N, C) and new xyzr, as :class:`PredictionHead`.
        recompute_mixing: whether the backward pass computes the mixing again instead of keeping
            what it needs of it: less memory, more time, same results.
    """

    def __init__(
        self,
        *,
        attention: nn.Module,
        sampler: nn.Module,
        mixing: nn.Module,
        feedforward: nn.Module,
        head: nn.Module,
        recompute_mixing: bool = False,
    ):
        super().__init__()
        self.recompute_mixing = recompute_mixing
        self.attention = attention
        self.sampler = sampler
        self.mixing = mixing
        self.feedforward = feedforward
        self.head = head

    def forward(
        self,
        features: Pyramid,
        content: Tensor,
        xyzr: Tensor,
        stored: Sequence[Filters] = (),
    ) -> tuple[StageOutput, Filters]:
        """
        Args:
            features: of levels (B, D, H_l, W_l).
            content: (B, N, D).
            xyzr: (B, N, 4), detached from earlier stages.
            stored: filters of earlier stages, oldest first.

        Returns:
            predictions with the new queries, and the filters that this stage generated.
        """
        content = content + position_embedding(xyzr, content.shape[-1])
        content = self.attention(content, xyzr)
        sampled = self.sampler(features, content, xyzr)
        if self.recompute_mixing and torch.is_grad_enabled():
            content, filters = checkpoint(
                self.mixing, sampled, content, stored, use_reentrant=False
            )
        else:
            content, filters = self.mixing(sampled, content, stored)
        content = self.feedforward(content)
        logits, xyzr = self.head(content, xyzr)
        return StageOutput(logits, xyzr_to_boxes(xyzr), content, xyzr), filters
