"""The cascade of stages, and one stage of it (supplement, section J)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import Pyramid
from .attention import OverlapAttention
from .geometry import box_size, full_precision, position_embedding, xyzr_to_boxes
from .layers import xavier_linear, zero_linear
from .mixing import CascadeMixing, Filters
from .sampling import PointSampler, TwoStageSampler, VanillaSampler


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
        self.box_out = zero_linear(embed_dim, 4)
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

    Args:
        attention, sampler, mixing, feedforward, head: see there.
        recompute_mixing: whether the backward pass computes the mixing again instead of keeping
            what it needs of it: less memory, more time, same results.
    """

    def __init__(
        self,
        *,
        attention: OverlapAttention,
        sampler: PointSampler,
        mixing: CascadeMixing,
        feedforward: FeedForward,
        head: PredictionHead,
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


class Decoder(nn.Module):
    """The cascade: each stage refines the queries and may reuse the filters of earlier ones."""

    def __init__(self, stages: Sequence[DecoderStage]):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(
        self, features: Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> list[StageOutput]:
        """
        Args:
            features: per level (B, D, H_l, W_l).
            content, xyzr: initial queries, (B, N, D) and (B, N, 4).

        Returns:
            the output of every stage.
        """
        outputs: list[StageOutput] = []
        stored: list[Filters] = []
        pyramid = Pyramid(features)  # the form that sampling reads, once for all stages
        for stage in self.stages:
            output, filters = stage(pyramid, content, xyzr, tuple(stored))
            stored.append(filters)
            outputs.append(output)
            # Boxes are trained stage by stage; content carries gradient through the cascade.
            content, xyzr = output.content, output.xyzr.detach()
        return outputs


def build_decoder(
    *,
    num_classes: int = 80,
    embed_dim: int = 256,
    num_groups: int = 4,
    num_heads: int = 8,
    feedforward_dim: int = 2048,
    num_points: Sequence[int] = (64, 32, 32, 32, 32, 32),
    out_points: int = 128,
    strides: Sequence[int] = (4, 8, 16, 32),
    level_shift: float = 1.0,
    sampler: str = "two_stage",
    static_mixing: str = "channel_spatial",
    dynamic_reuse: bool = True,
    first_reusing_stage: int | None = 2,
    max_reused_filters: int | None = None,
    mixing_bias: bool = True,
    zero_mixing_output: bool = True,
    refinement: str = "box_size",
    initial_dz: float = 0.0,
    recompute_mixing: bool = False,
    variant: str = "supplement",
) -> Decoder:
    """Builds a cascade from its sizes. The defaults are the paper's model (section J).

    Args:
        num_classes, embed_dim, num_groups, num_heads, feedforward_dim: C, D, G, heads, FFN width.
        num_points: P of every stage; its length is the number of stages L.
        out_points: P_out.
        strides, level_shift: see :class:`PointSampler`.
        sampler: ``"two_stage"``, ``"vanilla"`` or ``"group_init"`` (Table 3, "ours", "vanilla",
            "group-init.").
        static_mixing: ``"none"``, ``"channel"``, ``"spatial"``, ``"channel_spatial"`` (Table 2).
        dynamic_reuse: whether filters of earlier stages are reused (Table 1).
        first_reusing_stage: 0-based; this stage and all later ones reuse: stage i mixes with the
            filters of the stages first_reusing_stage - 1 .. i - 1 (2 in the paper, so that stage 5
            reuses those of 1 to 4). None: no stage reuses, and there is no static mixing
            either, whatever ``static_mixing`` and ``dynamic_reuse`` say (AdaMixer).
        max_reused_filters: at most so many of the latest filters; None for all of them.
        mixing_bias, zero_mixing_output: see :class:`CascadeMixing`.
        refinement, initial_dz: see :class:`PredictionHead`, :class:`VanillaSampler`.
        recompute_mixing: see :class:`DecoderStage`.
        variant: ``"supplement"``, or ``"release"`` as the released checkpoints were trained: inner
            offsets shared by all groups, and static mixing with a carried residual.

    Raises:
        ValueError: for sizes that do not fit together, naming the argument.
    """
    num_points = tuple(num_points)
    if not num_points:
        raise ValueError("num_points must name the sampling points of at least one stage")
    if embed_dim % num_groups or embed_dim % num_heads or embed_dim % 8:
        raise ValueError(
            f"embed_dim {embed_dim} must be divisible by num_groups {num_groups}, by num_heads "
            f"{num_heads} and by 8 (position embedding)"
        )
    if variant not in ("supplement", "release"):
        raise ValueError(f"variant must be 'supplement' or 'release', got {variant!r}")
    reuse_from = len(num_points) if first_reusing_stage is None else first_reusing_stage
    if reuse_from < 1:
        raise ValueError(
            f"first_reusing_stage must be at least 1, got {reuse_from}: stage 0 has no earlier "
            "stage whose filters it could reuse"
        )
    if max_reused_filters is not None and max_reused_filters < 1:
        raise ValueError(
            f"max_reused_filters must be at least 1, got {max_reused_filters}; to reuse none, set "
            "dynamic_reuse=False or first_reusing_stage=None"
        )
    reusing_points = set(num_points[reuse_from - 1 :]) if reuse_from < len(num_points) else set()
    if dynamic_reuse and len(reusing_points) > 1:
        raise ValueError(
            f"num_points {num_points} must be equal from stage {reuse_from - 1} on (the first "
            "whose spatial filter is reused): a filter over P points only fits P points"
        )

    sizes = dict(embed_dim=embed_dim, num_groups=num_groups)

    def build_sampler(points: int) -> PointSampler:
        common = dict(**sizes, num_points=points, strides=strides, level_shift=level_shift)
        if sampler == "two_stage":
            inner_offsets = "per_group" if variant == "supplement" else "shared"
            return TwoStageSampler(**common, inner_offsets=inner_offsets)
        if sampler == "vanilla":
            return VanillaSampler(**common, initial_dz=initial_dz)
        if sampler == "group_init":
            return VanillaSampler(**common, init="grouped", initial_dz=initial_dz)
        raise ValueError(f"sampler must be 'two_stage', 'vanilla' or 'group_init', got {sampler!r}")

    def build_stage(index: int, points: int) -> DecoderStage:
        num_reused = max(index - reuse_from + 1, 0)
        if max_reused_filters is not None:
            num_reused = min(num_reused, max_reused_filters)
        return DecoderStage(
            attention=OverlapAttention(embed_dim=embed_dim, num_heads=num_heads),
            sampler=build_sampler(points),
            mixing=CascadeMixing(
                **sizes,
                num_points=points,
                out_points=out_points,
                num_reused=num_reused,
                static_mixing=static_mixing,
                dynamic_reuse=dynamic_reuse,
                residual="current" if variant == "supplement" else "carried",
                bias=mixing_bias,
                zero_output=zero_mixing_output,
            ),
            feedforward=FeedForward(embed_dim=embed_dim, hidden_dim=feedforward_dim),
            head=PredictionHead(
                embed_dim=embed_dim, num_classes=num_classes, refinement=refinement
            ),
            recompute_mixing=recompute_mixing,
        )

    stages = [build_stage(index, points) for index, points in enumerate(num_points)]
    return Decoder(stages)
