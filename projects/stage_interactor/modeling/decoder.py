"""The cascade of stages, and how it is built: of ready-made parts, or of one's own."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..ops import Pyramid
from .attention import OverlapAttention
from .mixing import CascadeMixing, Filters
from .sampling import TwoStageSampler, VanillaSampler
from .stage import DecoderStage, FeedForward, PredictionHead, StageOutput


class Decoder(nn.Module):
    """The cascade: each stage refines the queries and may reuse the filters of earlier ones.

    Args:
        stages: in their order.
        exit_stage: how many of them detect, the rest is for training alone; None for all.
    """

    def __init__(self, stages: Sequence[DecoderStage], exit_stage: int | None = None):
        super().__init__()
        if exit_stage is not None and not 1 <= exit_stage <= len(stages):
            raise ValueError(f"exit_stage must be one of {len(stages)} stages, got {exit_stage}")
        self.stages = nn.ModuleList(stages)
        self.exit_stage = exit_stage

    def forward(
        self, features: Pyramid | Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> list[StageOutput]:
        """
        Args:
            features: per level (B, D, H_l, W_l), or a :class:`Pyramid` of them.
            content, xyzr: initial queries, (B, N, D) and (B, N, 4).

        Returns:
            the output of every stage that was computed.
        """
        outputs: list[StageOutput] = []
        stored: list[Filters] = []
        # The form that sampling reads, once for all stages.
        pyramid = features if isinstance(features, Pyramid) else Pyramid(features)
        for stage in self.stages:
            output, filters = stage(pyramid, content, xyzr, tuple(stored))
            stored.append(filters)
            outputs.append(output)
            if not self.training and self.is_enough(outputs):
                break
            # Boxes are trained stage by stage; content carries gradient through the cascade.
            content, xyzr = output.content, output.xyzr.detach()
        return outputs

    def is_enough(self, outputs: Sequence[StageOutput]) -> bool:
        """Whether detection ends with these stages."""
        return len(outputs) == self.exit_stage


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
    exit_stage: int | None = None,
    variant: str = "supplement",
    parts: Mapping[str, Any] | None = None,
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
        exit_stage: see :class:`Decoder`.
        variant: ``"supplement"``, or ``"release"`` as the released checkpoints were trained: inner
            offsets shared by all groups, and static mixing with a carried residual.
        parts: of one's own in place of the ready-made, each a LazyCall or, in Python, a class or
            function. For every stage it is called with its own options and with those of its sizes
            that it names, or all of them if it takes ``**kwargs``. ``attention``: embed_dim,
            num_heads. ``sampler``: embed_dim, num_groups, num_points, strides, level_shift.
            ``mixing``: all of :class:`CascadeMixing`. ``feedforward``: embed_dim, hidden_dim.
            ``head``: embed_dim, num_classes, refinement. :class:`DecoderStage` says what a part
            takes and gives. ``cascade``, called once with stages and exit_stage: :class:`Decoder`.

    Raises:
        ValueError: for sizes that do not fit together and for ``parts`` that are none, naming the
            argument.
    """
    from ..config import build_part  # not loaded with a detector that is there already

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

    released = variant == "release"
    samplers: dict[str, Callable[..., nn.Module]] = {
        "two_stage": partial(TwoStageSampler, inner_offsets="shared" if released else "per_group"),
        "vanilla": partial(VanillaSampler, initial_dz=initial_dz),
        "group_init": partial(VanillaSampler, init="grouped", initial_dz=initial_dz),
    }
    if sampler not in list(samplers):
        raise ValueError(
            f"sampler must be 'two_stage', 'vanilla' or 'group_init', got {sampler!r}; one of your "
            "own goes into model.decoder.parts.sampler"
        )
    ready: dict[str, Any] = dict(
        attention=OverlapAttention,
        sampler=samplers[sampler],
        mixing=CascadeMixing,
        feedforward=FeedForward,
        head=PredictionHead,
        cascade=Decoder,
    )
    own = {} if parts is None else parts
    if not isinstance(own, Mapping) or not set(own) <= set(ready):
        raise ValueError(f"model.decoder.parts must map some of {list(ready)}, got {own!r}")
    chosen = ready | {name: part for name, part in own.items() if part is not None}

    def build_stage(index: int, points: int) -> DecoderStage:
        num_reused = max(index - reuse_from + 1, 0)
        if max_reused_filters is not None:
            num_reused = min(num_reused, max_reused_filters)
        grid = dict(embed_dim=embed_dim, num_groups=num_groups, num_points=points)
        sizes: dict[str, dict[str, Any]] = dict(
            attention=dict(embed_dim=embed_dim, num_heads=num_heads),
            sampler=dict(grid, strides=tuple(strides), level_shift=level_shift),
            mixing=dict(
                grid,
                out_points=out_points,
                num_reused=num_reused,
                static_mixing=static_mixing,
                dynamic_reuse=dynamic_reuse,
                residual="carried" if released else "current",
                bias=mixing_bias,
                zero_output=zero_mixing_output,
            ),
            feedforward=dict(embed_dim=embed_dim, hidden_dim=feedforward_dim),
            head=dict(embed_dim=embed_dim, num_classes=num_classes, refinement=refinement),
        )
        built = {name: build_part(name, chosen[name], sizes[name]) for name in sizes}
        return DecoderStage(**built, recompute_mixing=recompute_mixing)

    stages = [build_stage(index, points) for index, points in enumerate(num_points)]
    cascade = build_part("cascade", chosen["cascade"], dict(stages=stages, exit_stage=exit_stage))
    if not isinstance(cascade, Decoder):
        raise ValueError(f"model.decoder.parts.cascade must make a Decoder, got {type(cascade)}")
    return cascade
