"""What the config in a checkpoint may call: a list of names, each with what it may be given.

A config is a recipe of calls. One that the user names may call anything; one that comes in a file
calls what is listed here and nothing else: nothing that reads a file or an address, and no values
but sizes, numbers and names of variants. Names are compared, never imported; what is built is what
this list names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import timm

from .schema import (
    CHANNELS,
    CLASSES,
    FLAG,
    IMAGE_FORMAT,
    IOU,
    SIZE_DIVISIBILITY,
    SPREADS,
    Kind,
    Misfit,
    choice,
    either,
    listed,
    mapping,
    maybe,
    number,
    shown,
    text,
    whole,
)

LARGEST_SIDE = 4096  # pixels, of the shorter side that pictures may be resized to


class UnknownPartError(Misfit):
    """A call of something that is not in the list."""

    def __init__(self, where: str, target: Any):
        ValueError.__init__(
            self,
            f"{where} calls {target if isinstance(target, str) else shown(target)}, which is not "
            "known as a part of a detector",
        )
        self.where = f"{where}._target_"


def part(*names: str) -> Kind:
    """A call of one of the parts with these names, in short."""
    told = f"a call of {' or '.join(names)}"

    def take(value: Any, where: str) -> dict:
        if not isinstance(value, Mapping) or "_target_" not in value:
            raise Misfit(where, value, told)
        name = _known(value["_target_"], where)
        if _short(name) not in names:
            raise Misfit(f"{where}._target_", name, told)
        arguments, forced = PARTS[name]
        taken = {"_target_": name}
        for key, item in value.items():
            if key == "_target_":
                continue
            if key not in arguments:
                known = f"no such key: a file may give {_short(name)} {', '.join(arguments)}"
                raise Misfit(f"{where}.{key}", item, known)
            taken[key] = arguments[key].take(item, f"{where}.{key}")
        taken |= forced
        if name in _TOGETHER:
            _TOGETHER[name](taken, where)
        return taken

    return Kind(told, take)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _home(name: str) -> str:
    return next((home for home in _HOMES if name.startswith(f"{home}.")), "")


def _known(target: Any, where: str) -> str:
    """The name in the list that is meant: modules move between versions, names stay."""
    if isinstance(target, str) and target.isascii() and len(target) < 200:
        home = _home(target)
        inner = target.removeprefix(f"{home}.").split(".")
        if home and len(inner) <= 4 and all(name.isidentifier() for name in inner):
            found = _NAMES.get((_HOMES[home], inner[-1]))
            if found:
                return found
    raise UnknownPartError(where, target)


_SIZE = whole(1, 1 << 20)
_SIZES = either(_SIZE, listed(_SIZE))
_NAME = text(r"\w{1,64}", "a name of letters, digits and _")
_FEW = whole(0, 64)
_WEIGHT = number(0, 1e6)
_SHARE = number(0, 1)
_NORM = choice("", "BN", "FrozenBN", "SyncBN", "GN", "LN")
_PIXELS = whole(0, LARGEST_SIDE)


def _is_network(name: str) -> bool:
    from torchvision.models import list_models

    return timm.is_model(name.partition(".")[0]) or name in list_models()


_NETWORK = text(r"\w+(\.\w+)?", "the name of a network that timm lists", _is_network)
_TRANSFORM = part("ResizeShortestEdge", "RandomFlip", "RandomCrop")
# Of arguments, wherever they are: the same name means the same.
_ARGUMENTS: dict[str, Kind] = {
    # the detector
    "num_classes": CLASSES,
    "backbone": part(
        "TimmBackbone", "PlainBackbone", "ResNet", "SimpleFeaturePyramid", "ConvNeXt", "FocalNet",
        "TorchvisionBackbone",
    ),
    "neck": part("ChannelMapper"),
    "queries": part("InitialQueries", "GroupedQueries", "HybridQueries"),
    "decoder": part("build_decoder"),
    "criterion": maybe(
        part(
            "Criterion", "IoUAwareCriterion", "GroupedCriterion", "RecollectingCriterion",
            "HybridCriterion", "GroupedIoUAwareCriterion", "RecollectingIoUAwareCriterion",
            "HybridIoUAwareCriterion",
        )
    ),
    "denoising": part("Denoising"),
    "max_queries": whole(1, 1_000_000),
    "label_noise": _SHARE,
    "box_noise": number(0, 0.999),
    "pixel_mean": CHANNELS,
    "pixel_std": SPREADS,
    "max_detections": maybe(whole(1, 1_000_000)),
    "nms_threshold": IOU,
    "size_divisibility": SIZE_DIVISIBILITY,
    # a backbone of timm
    "name": _NETWORK,
    "pretrained": FLAG,
    "weights": maybe(text(r"[^\0]{1,4096}", "where weights come from")),
    "strides": listed(whole(1, 1024), 16, 1),
    "freeze_norm": FLAG,
    "frozen_stages": whole(-1, 64),
    "channels_last": either(FLAG, choice("auto")),
    "deformable_strides": listed(whole(1, 1024), 16),
    "output_norm": FLAG,
    "layers": listed(whole(1, 256)),
    "depths": listed(whole(1, 256)),
    "channels": listed(_SIZE),
    "dims": listed(_SIZE),
    "embed_dims": listed(_SIZE),
    "kernel_sizes": either(whole(1, 63), listed(whole(1, 63))),
    "mlp_ratio": either(number(0.01, 64), listed(number(0.01, 64))),
    "mlp_ratios": listed(number(0.01, 64)),
    "cardinality": _SIZE,
    "base_width": _SIZE,
    "stem_width": _SIZE,
    "stem_type": choice("", "deep", "deep_tiered", "patch", "overlap", "overlap_tiered"),
    "output_stride": choice(8, 16, 32),
    "avg_down": FLAG,
    "drop_rate": _SHARE,
    "drop_path_rate": _SHARE,
    "drop_block_rate": _SHARE,
    "attn_drop_rate": _SHARE,
    "proj_drop_rate": _SHARE,
    "block_reduce_first": whole(1, 16),
    "down_kernel_size": whole(1, 15),
    "replace_stem_pool": FLAG,
    "zero_init_last": FLAG,
    "act_layer": text(r"[a-z_]+", "the name of an activation that timm lists"),
    "img_size": either(whole(1, LARGEST_SIDE), listed(whole(1, LARGEST_SIDE), 2, 2)),
    "patch_size": either(whole(1, 64), listed(whole(1, 64), 2, 2)),
    "window_size": either(whole(0, 256), listed(whole(1, 256), 2, 2)),
    "strict_img_size": FLAG,
    "always_partition": FLAG,
    "qkv_bias": FLAG,
    "conv_mlp": FLAG,
    "dynamic_img_size": FLAG,
    "init_values": maybe(_SHARE),
    "num_reg_tokens": whole(0, 256),
    "ls_init_value": maybe(_SHARE),
    "in_chans": whole(1, 16),
    # neck, queries, decoder
    "in_channels": either(_SIZES, part("timm_channels")),
    "out_channels": _SIZE,
    "norm_groups": maybe(_SIZE),
    "in_features": maybe(listed(_NAME)),
    "num_queries": whole(1, 4096),
    "one_to_many_queries": whole(1, 65_536),
    "num_copies": _SIZE,
    "embed_dim": _SIZES,
    "num_groups": _SIZE,
    "num_heads": _SIZES,
    "feedforward_dim": _SIZE,
    "num_points": _SIZES,
    "out_points": _SIZE,
    "level_shift": number(-32, 32),
    "sampler": choice("two_stage", "vanilla", "group_init"),
    "static_mixing": choice("none", "channel", "spatial", "channel_spatial"),
    "dynamic_reuse": FLAG,
    "first_reusing_stage": maybe(_FEW),
    "max_reused_filters": maybe(_FEW),
    "mixing_bias": FLAG,
    "zero_mixing_output": FLAG,
    "refinement": choice("box_size", "scale"),
    "initial_dz": number(-32, 32),
    "recompute_mixing": FLAG,
    "exit_stage": maybe(_FEW),
    "exit_iou": number(1e-6, 1),
    "variant": choice("supplement", "release"),
    "steps": whole(1, 62),  # and two more are what exit_stage may name
    "supervised": listed(_FEW, 62, 1),
    "unrolled": _FEW,
    "noise_probability": _SHARE,
    "content_noise": _SHARE,
    "parts": maybe(
        mapping(
            choice("attention", "sampler", "mixing", "feedforward", "head", "cascade"),
            maybe(
                part(
                    "OverlapAttention", "TwoStageSampler", "VanillaSampler", "CascadeMixing",
                    "FeedForward", "PredictionHead", "Decoder", "SettledDecoder",
                    "LayerGatedMixing", "MaskedOverlapAttention", "GroupedDecoder",
                    "RecollectingDecoder", "FixedPointDecoder", "HybridDecoder",
                )
            ),
        )
    ),
    # a decoder's parts
    "inner_offsets": choice("per_group", "shared"),
    "init": choice("uniform", "grouped"),
    "num_reused": _FEW,
    "residual": choice("current", "carried"),
    "bias": FLAG,
    "zero_output": FLAG,
    "hidden_dim": _SIZE,
    "prior": number(1e-6, 0.999),
    # the criterion
    "matcher": part("HungarianMatcher", "DetrStyleMatcher"),
    "assigner": part("CrossStageAssigner", "OneToOneAssigner", "IoUAssigner", "ScheduledAssigner"),
    "scope": listed(either(_FEW, text(r"[iL]( ?[+-] ?\d{1,2})?", "such as 'i-1' or 'L'")), 2, 1),
    "iou_threshold": _SHARE,
    "start": _SHARE,
    "end": _SHARE,
    "max_iter": whole(1, 10**9),
    "temperature": maybe(number(1e-6, 1e3)),
    "class_loss": choice("varifocal", "matchability", "align", "focal"),
    "negative_weight": _WEIGHT,
    "loss_class_weight": _WEIGHT,
    "loss_bbox_weight": _WEIGHT,
    "loss_giou_weight": _WEIGHT,
    "loss_one_to_many_weight": _WEIGHT,
    "cost_class": _WEIGHT,
    "cost_bbox": _WEIGHT,
    "cost_giou": _WEIGHT,
    "cost_class_type": choice("ce_cost", "focal_loss_cost"),
    "alpha": _WEIGHT,
    "class_weights": maybe(listed(_WEIGHT, 100_000)),
    "gamma": _WEIGHT,
    # what resizes a picture
    "short_edge_length": either(_PIXELS, listed(_PIXELS, 1000, 1)),
    "max_size": whole(1, 2 * LARGEST_SIDE),
    "sample_style": choice("range", "choice"),
    "interp": whole(0, 5),
    "prob": _SHARE,
    "horizontal": FLAG,
    "vertical": FLAG,
    "crop_type": choice("relative", "relative_range", "absolute", "absolute_range"),
    "crop_size": listed(number(0.001, LARGEST_SIDE), 2, 2),
    # detectron2's and detrex's
    "stem": part("BasicStem"),
    "stages": part("make_default_stages"),
    "freeze_at": whole(0, 5),
    "out_features": listed(_NAME),
    "out_feature": _NAME,
    "in_feature": _NAME,
    "norm": _NORM,
    "depth": whole(1, 256),
    "stride_in_1x1": FLAG,
    "net": part("ViT"),
    "scale_factors": listed(choice(4.0, 2.0, 1.0, 0.5), 8, 1),
    "square_pad": _PIXELS,
    "norm_layer": maybe(part("GroupNorm", "saved_object")),
    "num_channels": _SIZE,
    "window_block_indexes": listed(whole(0, 256), 256),
    "residual_block_indexes": listed(whole(0, 256), 256),
    "use_abs_pos": FLAG,
    "use_rel_pos": FLAG,
    "pretrain_img_size": whole(1, LARGEST_SIDE),
    "pretrain_use_cls_token": FLAG,
    "layer_scale_init_value": number(0, 1e3),
    "out_indices": listed(_FEW, 16, 1),
    "focal_levels": listed(whole(1, 16)),
    "focal_windows": listed(whole(1, 63)),
    "model_name": _NETWORK,
    "features_only": choice(True),
    "return_nodes": mapping(text(r"[\w.]{1,100}", "a name with dots"), _NAME),
    "input_shapes": mapping(
        _NAME, mapping(choice("channels", "height", "width", "stride"), maybe(_SIZE))
    ),
    "kernel_size": whole(1, 15),
    "num_outs": whole(1, 16),
    "recipe": Kind("a layer norm with its eps", lambda *given: _take_layer_norm(*given)),
}  # fmt: skip

_DETECTING = (
    "num_classes backbone neck queries decoder criterion pixel_mean pixel_std max_detections "
    "nms_threshold size_divisibility"
)
_MIXING = (
    "embed_dim num_groups num_points out_points num_reused static_mixing dynamic_reuse residual "
    "bias zero_output"
)
_CRITERION = (
    "num_classes matcher assigner loss_class_weight loss_bbox_weight loss_giou_weight alpha gamma "
    "class_weights"
)
_OF_SCORES = "class_loss negative_weight"
_OF_COPIES = "num_queries num_copies loss_one_to_many_weight"
_EXTENSIONS = "stage_interactor.modeling.extensions"
_SAMPLING = "embed_dim num_groups num_points strides level_shift"
_TABLE = {
    "stage_interactor.modeling.StageInteractor": _DETECTING,
    "stage_interactor.modeling.TimmBackbone": (
        "name pretrained weights strides freeze_norm frozen_stages channels_last "
        "deformable_strides "
        # of timm.create_model
        "output_norm layers depths channels dims embed_dim embed_dims kernel_sizes mlp_ratio "
        "mlp_ratios cardinality base_width stem_width stem_type output_stride avg_down drop_rate "
        "drop_path_rate img_size patch_size window_size strict_img_size always_partition qkv_bias "
        "conv_mlp ls_init_value in_chans num_heads drop_block_rate attn_drop_rate proj_drop_rate "
        "block_reduce_first down_kernel_size replace_stem_pool zero_init_last act_layer"
    ),
    "stage_interactor.modeling.PlainBackbone": (
        "name pretrained weights out_channels channels_last "
        # of timm.create_model
        "img_size patch_size in_chans embed_dim depth num_heads mlp_ratio qkv_bias init_values "
        "num_reg_tokens dynamic_img_size drop_rate drop_path_rate attn_drop_rate proj_drop_rate"
    ),
    "stage_interactor.modeling.timm_channels": (
        "name strides layers depths channels dims embed_dim embed_dims cardinality base_width "
        "stem_width"
    ),
    "stage_interactor.modeling.ChannelMapper": "in_channels out_channels norm_groups in_features",
    "stage_interactor.modeling.InitialQueries": "num_queries embed_dim",
    "stage_interactor.modeling.build_decoder": (
        "num_classes embed_dim num_groups num_heads feedforward_dim num_points out_points strides "
        "level_shift sampler static_mixing dynamic_reuse first_reusing_stage max_reused_filters "
        "mixing_bias zero_mixing_output refinement initial_dz recompute_mixing exit_stage "
        "variant parts"
    ),
    "stage_interactor.modeling.Decoder": "",
    f"{_EXTENSIONS}.settled_decoder.SettledDecoder": "exit_iou",
    f"{_EXTENSIONS}.denoising.DenoisingStageInteractor": f"{_DETECTING} denoising",
    f"{_EXTENSIONS}.denoising.Denoising": (
        "num_classes embed_dim num_groups max_queries label_noise box_noise"
    ),
    f"{_EXTENSIONS}.denoising.MaskedOverlapAttention": "embed_dim num_heads",
    f"{_EXTENSIONS}.fixed_point.FixedPointDecoder": (
        "steps supervised unrolled noise_probability content_noise box_noise"
    ),
    f"{_EXTENSIONS}.hybrid_matching.HybridQueries": "num_queries embed_dim one_to_many_queries",
    f"{_EXTENSIONS}.hybrid_matching.HybridDecoder": "num_queries",
    f"{_EXTENSIONS}.hybrid_matching.HybridCriterion": f"{_CRITERION} {_OF_COPIES}",
    f"{_EXTENSIONS}.scheduled_scope.ScheduledAssigner": "scope iou_threshold start end max_iter",
    f"{_EXTENSIONS}.layer_gates.LayerGatedMixing": _MIXING,
    f"{_EXTENSIONS}.query_groups.GroupedQueries": "num_queries embed_dim num_groups",
    f"{_EXTENSIONS}.query_groups.GroupedDecoder": "num_groups",
    f"{_EXTENSIONS}.query_groups.GroupedCriterion": f"{_CRITERION} num_groups",
    f"{_EXTENSIONS}.recollection.RecollectingDecoder": "",
    f"{_EXTENSIONS}.recollection.RecollectingCriterion": _CRITERION,
    f"{_EXTENSIONS}.iou_aware.IoUAssigner": "scope iou_threshold temperature",
    f"{_EXTENSIONS}.iou_aware.IoUAwareCriterion": f"{_CRITERION} {_OF_SCORES}",
    f"{_EXTENSIONS}.combined.GroupedIoUAwareCriterion": f"{_CRITERION} {_OF_SCORES} num_groups",
    f"{_EXTENSIONS}.combined.RecollectingIoUAwareCriterion": f"{_CRITERION} {_OF_SCORES}",
    f"{_EXTENSIONS}.combined.HybridIoUAwareCriterion": f"{_CRITERION} {_OF_SCORES} {_OF_COPIES}",
    "stage_interactor.modeling.OverlapAttention": "embed_dim num_heads",
    "stage_interactor.modeling.TwoStageSampler": f"{_SAMPLING} inner_offsets",
    "stage_interactor.modeling.VanillaSampler": f"{_SAMPLING} init initial_dz",
    "stage_interactor.modeling.CascadeMixing": _MIXING,
    "stage_interactor.modeling.FeedForward": "embed_dim hidden_dim",
    "stage_interactor.modeling.PredictionHead": "embed_dim num_classes refinement prior",
    "stage_interactor.modeling.Criterion": _CRITERION,
    "stage_interactor.modeling.HungarianMatcher": "cost_class cost_bbox cost_giou alpha gamma",
    "stage_interactor.modeling.DetrStyleMatcher": "matcher",
    "stage_interactor.modeling.OneToOneAssigner": "",
    "stage_interactor.modeling.CrossStageAssigner": "scope iou_threshold",
    "stage_interactor.d2.transforms.ResizeShortestEdge": (
        "short_edge_length max_size sample_style interp"
    ),
    "stage_interactor.d2.transforms.RandomFlip": "prob horizontal vertical",
    "stage_interactor.d2.transforms.RandomCrop": "crop_type crop_size",
    "stage_interactor.config.saved_object": "recipe",
    "torch.nn.GroupNorm": "num_groups num_channels",
    "detectron2.modeling.backbone.ResNet": "stem stages out_features freeze_at",
    "detectron2.modeling.backbone.BasicStem": "in_channels out_channels norm",
    "detectron2.modeling.backbone.ResNet.make_default_stages": "depth stride_in_1x1 norm",
    "detectron2.modeling.backbone.SimpleFeaturePyramid": (
        "net in_feature out_channels scale_factors norm square_pad"
    ),
    "detectron2.modeling.backbone.ViT": (
        "img_size patch_size in_chans embed_dim depth num_heads mlp_ratio qkv_bias drop_path_rate "
        "norm_layer use_abs_pos use_rel_pos window_size window_block_indexes "
        "residual_block_indexes pretrain_img_size pretrain_use_cls_token out_feature"
    ),
    "detrex.modeling.backbone.ConvNeXt": (
        "in_chans depths dims drop_path_rate layer_scale_init_value out_indices frozen_stages"
    ),
    "detrex.modeling.backbone.FocalNet": (
        "in_chans patch_size embed_dim depths mlp_ratio drop_rate drop_path_rate out_indices "
        "frozen_stages focal_levels focal_windows"
    ),
    "detrex.modeling.backbone.TimmBackbone": (
        "model_name features_only pretrained in_channels out_indices norm_layer"
    ),
    "detrex.modeling.backbone.TorchvisionBackbone": "model_name pretrained return_nodes",
    "detrex.modeling.neck.ChannelMapper": (
        "input_shapes in_features out_channels kernel_size norm_layer num_outs"
    ),
    "detrex.modeling.HungarianMatcher": (
        "cost_class cost_bbox cost_giou cost_class_type alpha gamma"
    ),
}
_FETCHED = {"pretrained": False, "weights": None}
# Names of parts to the arguments that they may get from a file, and those that they always get: the
# checkpoint brings all weights, so nothing is fetched.
PARTS: dict[str, tuple[dict[str, Kind], dict[str, Any]]] = {
    name: (
        {key: _ARGUMENTS[key] for key in keys.split()},
        {key: nothing for key, nothing in _FETCHED.items() if key in keys.split()},
    )
    for name, keys in _TABLE.items()
}
# Where parts are imported from, and have been; each to where the list has them.
_HOMES = {
    "stage_interactor.d2.embedded.transforms": "stage_interactor.d2.transforms",
    "detectron2.data.transforms": "stage_interactor.d2.transforms",
} | {
    home: home
    for home in (
        "stage_interactor.modeling", "stage_interactor.d2.transforms", "stage_interactor.config",
        "detectron2.modeling", "detrex.modeling", "torch.nn",
    )
}  # fmt: skip
_NAMES = {(_home(name), _short(name)): name for name in PARTS}


def _take_layer_norm(value: Any, where: str) -> dict:
    """``partial(LayerNorm, eps=...)`` as a config in a file has it."""
    names = ("torch.nn.LayerNorm", "torch.nn.modules.normalization.LayerNorm")
    recipes = [
        {
            "function": "functools.partial",
            "arguments": [{"_target_": "hydra.utils.get_object", "path": name}],
        }
        for name in names
    ]
    keywords = value.get("keywords") if isinstance(value, Mapping) else None
    taken = mapping(choice("eps"), number(0, 1)).take(keywords, f"{where}.keywords")
    if value not in [recipe | {"keywords": keywords} for recipe in recipes]:
        raise Misfit(where, value, f"a partial of {names[0]}")
    return recipes[0] | {"keywords": taken}


def _check_crop(crop: Mapping[str, Any], where: str) -> None:
    kind = whole(1, LARGEST_SIDE) if "absolute" in str(crop.get("crop_type")) else _SHARE
    listed(kind).take(crop.get("crop_size"), f"{where}.crop_size")


def _check_resizing(resizing: Mapping[str, Any], where: str) -> None:
    sides = resizing.get("short_edge_length")
    if resizing.get("sample_style", "range") == "range" and isinstance(sides, list):
        if len(sides) != 2 or sides[0] > sides[1]:
            expected = "the smallest and the largest side, as sample_style is 'range'"
            raise Misfit(f"{where}.short_edge_length", sides, expected)


def _check_detector(model: Mapping[str, Any], where: str) -> None:
    for name in ("decoder", "criterion"):
        inner = model.get(name) or {}
        if inner and inner.get("num_classes") != model.get("num_classes"):
            expected = f"{model.get('num_classes')}, as {where}.num_classes"
            raise Misfit(f"{where}.{name}.num_classes", inner.get("num_classes"), expected)


# Arguments that must fit one another.
_TOGETHER: dict[str, Callable[[Mapping[str, Any], str], None]] = {
    "stage_interactor.d2.transforms.RandomCrop": _check_crop,
    "stage_interactor.d2.transforms.ResizeShortestEdge": _check_resizing,
    "stage_interactor.modeling.StageInteractor": _check_detector,
    f"{_EXTENSIONS}.denoising.DenoisingStageInteractor": _check_detector,
}


_DETECTOR = part("StageInteractor", "DenoisingStageInteractor")


def take_model(config: Mapping[str, Any]) -> dict:
    """A detector's config by the names and values of the list alone; a Misfit names what is not."""
    return _DETECTOR.take(config.get("model"), "model")


def take_input(config: Mapping[str, Any]) -> dict:
    """``augmentation`` and ``image_format`` of the pictures that a detector is given."""
    where = "dataloader.test.mapper"
    given = config.get("dataloader", {}).get("test", {}).get("mapper", {})
    augmentation = listed(_TRANSFORM, 8).take(given.get("augmentation"), f"{where}.augmentation")
    image_format = IMAGE_FORMAT.take(given.get("image_format", "RGB"), f"{where}.image_format")
    return {"augmentation": augmentation, "image_format": image_format}
