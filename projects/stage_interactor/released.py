"""The names and layouts of the authors' released checkpoints.

Their code (StageInteractor and AdaMixer, both on mmdetection 2) stores each stage's layers under
``roi_head.bbox_head.<i>``. Every tensor of ours is a choice of rows (output features) of one of
theirs, so a map from our key to :class:`Source` serves both directions.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .modeling import Decoder, DecoderStage, TwoStageSampler

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
DROPPED = {
    "subbox_score_list": "a softmax over a single element: it is always 1",
    "iou_snyc_statistics": "statistics that are collected but never used",
    "init_proposal_bboxes": "always the whole image, and not trained",
}
"""Parts of released keys that have no place in the model, each with the reason."""


class Source(NamedTuple):
    """Where a tensor comes from: rows of a released one, or all of it."""

    key: str
    rows: Tensor | None = None


def _stage_sources(stage: DecoderStage) -> dict[str, Source]:
    """Our keys within a stage to released keys within ``bbox_head.<i>``."""
    stage_interactor = isinstance(stage.sampler, TwoStageSampler)
    names = _COMMON | (_STAGE_INTERACTOR if stage_interactor else _ADAMIXER)
    sources = {"attention.tau": Source("iof_tau")}
    present = stage.state_dict()
    for part, name in names.items():
        for kind in ("weight", "bias"):
            if part + kind in present:
                sources[part + kind] = Source(name + kind)

    # The release computes the gates and biases of all reuse steps J in one layer each, with the
    # output features ordered (G, Dc, [v, u], J) and (G, J, Dc).
    steps = stage.mixing.channel_reuse
    groups, width = stage.mixing.num_groups, stage.mixing.channel_shape[0]
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
        ValueError: if the decoder has a part that no released checkpoint has.
    """
    sources = {
        f"stages.{index}.{key}": Source(f"roi_head.bbox_head.{index}.{source.key}", source.rows)
        for index, stage in enumerate(decoder.stages)
        for key, source in _stage_sources(stage).items()
    }
    missing = sorted(set(decoder.state_dict()) - set(sources))
    if missing:
        raise ValueError(f"released checkpoints have no such parts: {missing[:5]}")
    return sources


def query_sources() -> dict[str, Source]:
    """Keys of ``InitialQueries`` to their place in a released checkpoint."""
    return {"content": Source("rpn_head.init_content_features.weight")}


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
    return {
        key: released[source.key] if source.rows is None else released[source.key][source.rows]
        for key, source in sources.items()
    }


def unused_keys(released: Mapping[str, Tensor], sources: Mapping[str, Source]) -> list[str]:
    """Released keys that nothing consumes and that are not known to be :data:`DROPPED`."""
    consumed = {source.key for source in sources.values()}
    return [
        key for key in released if key not in consumed and not any(part in key for part in DROPPED)
    ]
