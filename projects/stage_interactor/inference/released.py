"""The names and layouts of the authors' released checkpoints.

Their code (StageInteractor and AdaMixer, both on mmdetection 2) stores each stage's layers under
``roi_head.bbox_head.<i>``. Every tensor of ours is a choice of rows (output features) or columns of
one of theirs, so a map from our key to :class:`Source` serves both directions.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modeling import (
    CascadeMixing,
    Decoder,
    DecoderStage,
    StageInteractor,
    TwoStageSampler,
)

# Part of a stage here: its name there. The same in both projects.
_COMMON = {
    "attention.qkv.": "attention.attn.in_proj_",
    "attention.proj.": "attention.attn.out_proj.",
    "attention.norm.": "attention_norm.",
    "feedforward.layers.0.": "ffn.layers.0.0.",
    "feedforward.layers.2.": "ffn.layers.1.",
    "feedforward.norm.": "ffn_norm.",
    "head.cls_branch.0.": "cls_fcs.0.",
    "head.cls_branch.1.": "cls_fcs.1.",
    "head.cls_out.": "fc_cls.",
    "head.box_branch.0.": "reg_fcs.0.",
    "head.box_branch.1.": "reg_fcs.1.",
    "head.box_out.": "fc_reg.",
}
_STAGE_INTERACTOR = {
    "sampler.outer.": "feat_extractor.gen_one_d.0.",
    "sampler.inner.": "feat_extractor.gen_double_d.0.",
    "mixing.generator.": "dynamic_conv.parameter_generator.",
    "mixing.bias_generator.": "dynamic_conv.mix_bias.",
    "mixing.out.": "dynamic_conv.Wv.",
    "mixing.norm.": "dynamic_conv.Wv_layer_norm.",
    "mixing.spatial_reuse.row_gates.": "dynamic_conv.S_score_list.",
    "mixing.spatial_reuse.point_gates.": "dynamic_conv.S_score_list2.",
}
_ADAMIXER = {
    "sampler.offsets.": "sampling_n_mixing.sampling_offset_generator.0.",
    "mixing.generator.": "sampling_n_mixing.adaptive_mixing.parameter_generator.0.",
    "mixing.out.": "sampling_n_mixing.adaptive_mixing.out_proj.",
    "mixing.norm.": "sampling_n_mixing.norm.",
}
_SWIN = {  # parts of a key here to parts of a key there, within the backbone
    "patch_embed.proj.": "patch_embed.projection.",
    "attn.": "attn.w_msa.",
    "mlp.fc1.": "ffn.layers.0.0.",
    "mlp.fc2.": "ffn.layers.1.",
}
DROPPED = {
    "subbox_score_list": "a softmax over a single element: it is always 1",
    "iou_snyc_statistics": "statistics that are collected but never used",
    "init_proposal_bboxes": "always the whole image, and not trained",
    "relative_position_index": "follows from the window's size",
}
"""Parts of released keys that have no place in the model, each with the reason."""


class Source(NamedTuple):
    """Where a tensor comes from: rows (axis 0) or columns (1) of a released one, or all of it."""

    key: str
    rows: Tensor | None = None
    axis: int = 0

    @property
    def part(self) -> tuple:
        """What to index the released tensor with."""
        return () if self.rows is None else (slice(None),) * self.axis + (self.rows,)


def _stage_sources(stage: DecoderStage) -> dict[str, Source]:
    """Our keys within a stage to released keys within ``bbox_head.<i>``.

    Raises:
        ValueError: for a mixing of one's own, or another variant.
    """
    sampler, mixing = stage.sampler, stage.mixing
    if not isinstance(mixing, CascadeMixing):
        raise ValueError(f"released checkpoints have no mixing such as {type(mixing).__name__}")
    shared = not isinstance(sampler, TwoStageSampler) or (
        sampler.inner.out_features == sampler.points_per_group * 3
    )
    if not shared or (mixing.channel_reuse and mixing.residual != "carried"):
        raise ValueError(
            "released checkpoints of StageInteractor have other sampling offsets and residuals "
            "than the supplement's variant: the config needs model.decoder.variant=release, as "
            "those of configs/released/ have"
        )
    two_stage = isinstance(sampler, TwoStageSampler)
    names = _COMMON | (_STAGE_INTERACTOR if two_stage else _ADAMIXER)
    sources = {"attention.tau": Source("iof_tau")}
    present = stage.state_dict()
    for part, name in names.items():
        for kind in ("weight", "bias"):
            if part + kind in present:
                sources[part + kind] = Source(name + kind)

    # The release computes the gates and biases of all reuse steps J in one layer each, with the
    # output features ordered (G, Dc, [v, u], J) and (G, J, Dc).
    steps = mixing.channel_reuse
    groups, width = mixing.num_groups, mixing.channel_shape[0]
    gate_rows = torch.arange(groups * width * 2 * len(steps)).view(groups, width, 2, len(steps))
    bias_rows = torch.arange(groups * len(steps) * width).view(groups, len(steps), width)
    for index in range(len(steps)):
        prefix = f"mixing.channel_reuse.{index}"
        gates = gate_rows[..., index].flip(-1).transpose(1, 2).flatten()  # (G, [u, v], Dc)
        for kind in ("weight", "bias"):
            sources |= {
                f"{prefix}.gates.{kind}": Source(f"dynamic_conv.M_score_list.{kind}", gates),
                f"{prefix}.bias.{kind}": Source(
                    f"dynamic_conv.M_score_list_mix_bias.{kind}", bias_rows[:, index].flatten()
                ),
                f"{prefix}.static.within.{kind}": Source(
                    f"dynamic_conv.subbox_local_list.{index}.{kind}"
                ),
                f"{prefix}.static.across.{kind}": Source(
                    f"dynamic_conv.axis_atten_list.{index}.{kind}"
                ),
            }
    return sources


def decoder_sources(decoder: Decoder) -> dict[str, Source]:
    """Every key of ``decoder.state_dict()`` to its place in a released checkpoint.

    The decoder must have the released structure: ``variant="release"``, or AdaMixer's.

    Raises:
        ValueError: if the decoder has a part that no released checkpoint has, or another variant.
    """
    sources = {
        f"stages.{index}.{key}": source._replace(key=f"roi_head.bbox_head.{index}.{source.key}")
        for index, stage in enumerate(decoder.stages)
        if isinstance(stage, DecoderStage)
        for key, source in _stage_sources(stage).items()
    }
    missing = sorted(set(decoder.state_dict()) - set(sources))
    if missing:
        raise ValueError(f"released checkpoints have no such parts: {missing[:5]}")
    return sources


def query_sources() -> dict[str, Source]:
    """Keys of ``InitialQueries`` to their place in a released checkpoint."""
    return {"content": Source("rpn_head.init_content_features.weight")}


def backbone_sources(backbone: nn.Module) -> dict[str, Source]:
    """Every key of a backbone to its place in a released checkpoint, ResNet, ResNeXt or Swin."""
    sources = {}
    for key, value in backbone.state_dict().items():
        if key.startswith("norms."):  # one for each map: norm0 .. norm3
            _, index, kind = key.split(".")
            sources[key] = Source(f"backbone.norm{index}.{kind}")
            continue
        name = key.removeprefix("network.")
        if not name.startswith(("layers_", "patch_embed.")):  # residual networks: equal names
            sources[key] = Source(f"backbone.{name}")
            continue
        for ours, theirs in _SWIN.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"^layers_(\d)", r"stages.\1", name)
        if ".downsample." not in name:
            sources[key] = Source(f"backbone.{name}")
            continue
        # Patch merging stands at the start of a stage here, at the end of the one before there, and
        # takes the four patches' channels in the order (x, y, channel) here, (channel, y, x) there.
        name = re.sub(r"^stages\.(\d)", lambda match: f"stages.{int(match[1]) - 1}", name)
        merged = torch.arange(value.shape[-1]).view(-1, 2, 2).permute(2, 1, 0).flatten()
        sources[key] = Source(f"backbone.{name}", merged, axis=value.ndim - 1)
    return sources


def neck_sources(neck: nn.Module) -> dict[str, Source]:
    """Every key of the neck to its place in a released checkpoint."""
    sources = {}
    for key in neck.state_dict():
        part, *rest = key.split(".")
        there = "gn_out" if part == "norm" else f"lateral_convs.{rest.pop(0)}.conv"
        sources[key] = Source(f"neck.{there}.{rest[0]}")
    return sources


def model_sources(model: StageInteractor) -> dict[str, Source]:
    """Every key of ``model.state_dict()`` to its place in a released checkpoint.

    Raises:
        ValueError: if the model has a part that no released checkpoint has.
    """
    parts = {
        "backbone": backbone_sources(model.backbone),
        "neck": neck_sources(model.neck),
        "queries": query_sources(),
        "decoder": decoder_sources(model.decoder),
    }
    sources = {
        f"{part}.{key}": source for part, found in parts.items() for key, source in found.items()
    }
    missing = sorted(set(model.state_dict()) - set(sources))
    if missing:
        raise ValueError(f"released checkpoints have no such parts: {missing[:5]}")
    return sources


def from_released(
    released: Mapping[str, Tensor], sources: Mapping[str, Source]
) -> dict[str, Tensor]:
    """Our state dict from a released one.

    Raises:
        KeyError: if the released state lacks a key, naming the first few.
    """
    missing = sorted({source.key for source in sources.values()} - set(released))
    if missing:
        raise KeyError(
            f"not a checkpoint of this model: {len(missing)} keys are missing, such as "
            f"{missing[:3]}"
        )
    return {key: released[source.key][source.part] for key, source in sources.items()}


def to_released(state: Mapping[str, Tensor], sources: Mapping[str, Source]) -> dict[str, Tensor]:
    """A released state dict from ours, without the :data:`DROPPED` keys.

    Raises:
        KeyError: if our state lacks a key.
    """
    missing = sorted(set(sources) - set(state))
    if missing:
        raise KeyError(f"{len(missing)} keys of the model are missing, such as {missing[:3]}")
    # Several of ours make up one of theirs where they select parts of it.
    sizes: dict[str, int] = {}
    for source in sources.values():
        if source.rows is not None:
            sizes[source.key] = max(sizes.get(source.key, 0), int(source.rows.max()) + 1)
    released: dict[str, Tensor] = {}
    for key, source in sources.items():
        value = state[key]
        if source.key not in released:
            shape = list(value.shape)
            if source.rows is not None:
                shape[source.axis] = sizes[source.key]
            released[source.key] = value.new_empty(shape)
        released[source.key][source.part] = value
    return released


def unused_keys(released: Mapping[str, Tensor], sources: Mapping[str, Source]) -> list[str]:
    """Released keys that nothing consumes and that are not known to be :data:`DROPPED`."""
    consumed = {source.key for source in sources.values()}
    return [
        key for key in released if key not in consumed and not any(part in key for part in DROPPED)
    ]
