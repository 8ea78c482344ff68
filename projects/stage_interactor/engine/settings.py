"""What the values of a run's config may be, checked before the run begins."""

import difflib
import fnmatch
import inspect
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.parallel import DistributedDataParallel

from ..config import ConfigError, by_number, flatten, resolved
from ..data.augmentations import FLIPS, POLICIES
from .class_weights import BALANCED


class Rule(NamedTuple):
    """Which values a key may have."""

    holds: Callable[[Any], bool]
    allowed: str  # in words

    def or_null(self) -> "Rule":
        return Rule(lambda value: value is None or self.holds(value), f"{self.allowed}, or null")


def is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and not math.isnan(value))


def is_whole(value: Any) -> bool:
    """Such that a tensor can hold it."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def whole(least: int, most: int = 2**31 - 1, note: str = "") -> Rule:
    upper = f" and at most {most}" if most != 2**31 - 1 else ""
    return Rule(
        lambda value: is_whole(value) and least <= value <= most,
        f"a whole number of {least} or more{upper}{note}",
    )


def number(least: float, most: float = math.inf, *, open: bool = False) -> Rule:
    """Finite; ``open`` excludes both ends."""

    def holds(value: Any) -> bool:
        if not is_number(value) or math.isinf(value):
            return False
        return least < value < most if open else least <= value <= most

    if math.isinf(most):
        return Rule(holds, f"a finite number, {'more than' if open else 'at least'} {least}")
    return Rule(
        holds, f"a number {'between' if open else 'from'} {least} {'and' if open else 'to'} {most}"
    )


def one_of(*values: Any) -> Rule:
    return Rule(lambda value: value in values, f"one of {list(values)}")


def many(rule: Rule, least: int = 1, most: int = 1000) -> Rule:
    count = f"{least}" if least == most else f"{least} or more"
    return Rule(
        lambda value: (
            isinstance(value, (list, tuple))
            and least <= len(value) <= most
            and all(map(rule.holds, value))
        ),
        f"a list of {count}, each {rule.allowed}",
    )


def _ascending(rule: Rule) -> Rule:
    return Rule(
        lambda value: rule.holds(value) and all(a < b for a, b in itertools.pairwise(value)),
        f"{rule.allowed}, ascending",
    )


def _is_device(value: Any) -> bool:
    try:
        device = torch.device(value) if isinstance(value, str) else None
    except RuntimeError:
        return False
    if device is None:
        return False
    if device.type == "cuda":  # without CUDA the run goes on on the CPU
        there = torch.cuda.device_count() if torch.cuda.is_available() else math.inf
        return device.index is None or device.index < there
    return device.type == "cpu" or (device.type == "mps" and torch.backends.mps.is_available())


_FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
_FLAG_OR_AUTO = Rule(lambda v: v == "auto" or isinstance(v, bool), "true, false or auto")
_TEXT = Rule(lambda value: isinstance(value, str) and value.isprintable(), "a text")
_NAME = Rule(lambda value: _TEXT.holds(value) and value != "", "a text that is not empty")
_FOLDER = Rule(lambda v: _NAME.holds(v) and "://" not in v, "a folder of this machine")
_MADE = Rule(callable, "a section with a _target_")
_COUNT, _PERIOD = whole(1), whole(0, note=" (0: never)")
_SHARE, _WEIGHT = number(0, 1), number(0)
_PIXELS, _PAIR = many(number(-math.inf), 3, 3), many(number(-math.inf), 2, 2)
_SIDE = whole(0)  # 0 leaves a picture as it is
_PLAIN = (bool, int, float, str, list, type(None))
_TRANSFORMS = many(
    Rule(lambda v: "_target_" in v if isinstance(v, dict) else not isinstance(v, _PLAIN), "a call"),
    least=0,
).or_null()

# Of DistributedDataParallel, but for init_sync: processes must begin with the same weights.
_DDP_FLAGS = ("fp16_compression",) + tuple(
    name
    for name, parameter in inspect.signature(DistributedDataParallel).parameters.items()
    if (isinstance(parameter.default, bool) or name.endswith("_buffers")) and name != "init_sync"
)

# By key, * in it for anything; a key that a config does not have is not missed.
RULES = {
    "train.output_dir": _FOLDER,
    "train.init_checkpoint": _TEXT.or_null(),
    "train.freeze": many(_NAME, least=0).or_null(),
    "train.max_iter": _COUNT,
    "train.resume": Rule(
        lambda v: v in (None, "auto") or isinstance(v, bool), "true, false, auto or null"
    ),
    "train.grace_seconds": number(0, 1e6, open=True),
    "train.max_pixels": whole(1).or_null(),
    "train.device": Rule(_is_device, "a device of this machine, cuda, cuda:0 or cpu"),
    "train.amp.enabled": _FLAG_OR_AUTO,
    "train.amp.dtype": one_of("bfloat16", "float16"),
    "train.amp.max_skipped_steps": _COUNT,
    "train.clip_grad.enabled": _FLAG,
    "train.clip_grad.params.max_norm": Rule(lambda v: is_number(v) and v > 0, "more than 0"),
    "train.clip_grad.params.norm_type": Rule(
        lambda v: v == "inf" or (is_number(v) and v > 0), "a number of more than 0, or inf"
    ),
    "train.clip_grad.params.error_if_nonfinite": _FLAG,
    "train.clip_grad.params.foreach": _FLAG.or_null(),
    "train.cuda_graph": _FLAG_OR_AUTO,
    "train.fold_norms": _FLAG_OR_AUTO,
    "train.deterministic": _FLAG,
    "train.cudnn_benchmark": _FLAG,
    "train.float32_precision": one_of("highest", "high", "medium").or_null(),
    "train.accumulation_steps": _COUNT,
    **{f"train.ddp.{name}": _FLAG for name in _DDP_FLAGS},
    "train.ddp.bucket_cap_mb": number(0, 1e6, open=True).or_null(),
    "train.model_ema.enabled": _FLAG,
    "train.model_ema.decay": _SHARE,
    "train.model_ema.use_ema_weights_for_eval_only": _FLAG.or_null(),
    "train.checkpointer.period": _PERIOD,
    "train.checkpointer.max_to_keep": _COUNT.or_null(),
    "train.best_checkpointer.val_metric": _NAME,
    "train.best_checkpointer.mode": one_of("max", "min").or_null(),
    "train.early_stopping.patience": _COUNT.or_null(),
    "train.early_stopping.metric": _NAME,
    "train.early_stopping.mode": one_of("max", "min").or_null(),
    "train.early_stopping.min_delta": _WEIGHT,
    "train.class_weights": Rule(
        lambda v: v in (None, BALANCED) or isinstance(v, dict),
        f"weights by name, {BALANCED} or null",
    ),
    "train.class_weights.*": number(0, 1e6),
    "train.eval_period": _PERIOD,
    "train.validation_loss": _FLAG,
    "train.flight_recorder.enabled": _FLAG,
    "train.flight_recorder.images": many(_NAME, most=100_000).or_null(),
    "train.log_period": _PERIOD,
    "train.inference.dtype": one_of("float32", "bfloat16", "float16", "auto"),
    "train.inference.compile": _FLAG,
    "train.inference.bucket": whole(1, 8192),
    "train.unusable_detections": one_of("error", "warning"),
    "train.wandb.enabled": _FLAG,
    "train.mlflow.enabled": _FLAG,
    "train.pictures.num_images": whole(0, 10_000),
    "train.pictures.score_threshold": _SHARE,
    "optimizer.lr": _WEIGHT,
    "optimizer.params.base_lr": _WEIGHT.or_null(),
    "optimizer.*weight_decay*": _WEIGHT.or_null(),
    "optimizer.params.lr_factors.*": _WEIGHT,
    "optimizer.params.layer_decay": Rule(
        lambda v: is_number(v) and 0 < v <= 1, "a number of more than 0 and at most 1"
    ).or_null(),
    "optimizer.betas": many(Rule(lambda v: is_number(v) and 0 <= v < 1, "from 0 to below 1"), 2, 2),
    "optimizer.eps": number(0, open=True),  # with 0 a gradient of 0 makes its weight NaN
    "optimizer.momentum": _SHARE,
    "optimizer.fused": _FLAG.or_null(),
    "lr_multiplier.warmup_iters": whole(0),
    "lr_multiplier.max_iter": _COUNT,
    "lr_multiplier.num_epochs": _COUNT,
    "lr_multiplier.milestones": _ascending(many(number(0), 0)),
    "lr_multiplier.final": _WEIGHT,
    "dataloader.train.total_batch_size": _COUNT,
    "dataloader.train.aspect_ratio_grouping": _FLAG,
    "dataloader.train.shuffle": _FLAG,
    "dataloader.train.repeat_threshold": _SHARE.or_null(),
    "dataloader.train.closing": _SHARE,
    "dataloader.*.num_workers": whole(0, 256),
    "dataloader.test.batch_size": _COUNT,
    "dataloader.*.mapper": _MADE,
    "dataloader.*.mapper.image_format": one_of("RGB", "BGR"),
    "dataloader.*.mapper.decode": one_of("exact", "fast"),
    "dataloader.*.mapper.policy": one_of(*POLICIES).or_null(),
    "dataloader.*.mapper.flip": one_of(*FLIPS).or_null(),
    "dataloader.*.mapper.augmentation": _TRANSFORMS,
    "dataloader.*.mapper.augmentation_with_crop": _TRANSFORMS,
    "dataloader.*.mapper.closing_augmentation": _TRANSFORMS,
    "dataloader.*.mapper.combinations": _TRANSFORMS,
    "dataloader.*.combinations*.prob": _SHARE,
    "dataloader.*augmentation*.prob": _SHARE,
    "dataloader.*augmentation*.short_edge_length": Rule(
        lambda v: _SIDE.holds(v) or many(_SIDE).holds(v), "whole numbers of 0 or more"
    ),
    "dataloader.*augmentation*.max_size": Rule(lambda v: is_whole(v) and v > 0, "1 or more"),
    "dataloader.*augmentation*.crop_size": many(number(0, 2**31, open=True), 2, 2),
    "dataloader.*.dataset.name": _NAME,
    "dataloader.*.dataset.json_file": _TEXT.or_null(),
    "dataloader.*.dataset.image_root": _TEXT.or_null(),
    "dataloader.*.dataset.filter_empty": _FLAG,
    "train.inference.channels_last": _FLAG,
    "model.*channels_last": _FLAG_OR_AUTO,
    "dataloader.evaluator.max_dets_per_image": _COUNT.or_null(),
    "dataloader.evaluator.output_dir": _FOLDER.or_null(),
    "dataloader.evaluator.use_07_metric": _FLAG.or_null(),
    "model.*num_classes": whole(1, 100_000),
    "model.queries.num_queries": whole(1, 100_000),
    "model.neck.in_channels": many(_COUNT),
    "model.neck.norm_groups": _COUNT,
    "model.decoder.embed_dim": whole(1, 65_536),
    "model.queries.num_groups": _COUNT,
    "model.queries.one_to_many_queries": whole(1, 65_536),
    "model.criterion.num_copies": _COUNT,
    "model.denoising.num_groups": _COUNT,
    "model.denoising.max_queries": _COUNT,
    "model.denoising.label_noise": _SHARE,
    "model.denoising.box_noise": number(0, 0.999),
    "model.decoder.num_groups": _COUNT,
    "model.decoder.num_heads": _COUNT,
    "model.decoder.feedforward_dim": whole(1, 1_000_000),
    "model.decoder.num_points": many(whole(1, 65_536), most=100),
    "model.decoder.out_points": whole(1, 65_536),
    "model.decoder.strides": many(_COUNT, most=10),
    "model.decoder.exit_stage": _COUNT.or_null(),
    "model.decoder.parts.cascade.exit_iou": number(1e-6, 1),
    "model.decoder.parts.cascade.steps": whole(1, 62),
    "model.decoder.parts.cascade.supervised": many(whole(1, 62), most=62),
    "model.decoder.parts.cascade.unrolled": whole(1, 64),
    "model.decoder.parts.cascade.*_noise": _SHARE,
    "model.decoder.parts.cascade.noise_probability": _SHARE,
    "model.backbone.weights": _NAME.or_null(),
    "model.backbone.strides": many(_COUNT, most=10),
    "model.criterion.*cost_*": _WEIGHT,
    "model.criterion.*loss_*_weight": _WEIGHT,
    "model.criterion.*iou_threshold": _SHARE,
    "model.criterion.assigner.temperature": number(1e-6, 1e3).or_null(),
    "model.criterion.assigner.start": _SHARE,
    "model.criterion.assigner.end": _SHARE,
    "model.criterion.negative_weight": _WEIGHT,
    "model.criterion.gamma": number(0, 100),
    "model.criterion.alpha": _SHARE,
    "model.nms_threshold": _SHARE.or_null(),
    "model.max_detections": _COUNT.or_null(),
    "model.pixel_mean": _PIXELS.or_null(),
    "model.pixel_std": many(number(0, open=True), 3, 3).or_null(),
    "*.image_size": whole(16, 8192),
    "*.num_train": whole(1, 1_000_000),
    "*.num_val": whole(1, 1_000_000),
    "*.m??_objects": whole(0, 1000),
    "*.seed": whole(0, 2**32 - 2**16),  # to which each process adds its number, for numpy
    "*.root": _FOLDER,
}
# What a run looks up whatever else a config has; sections among it end in a dot.
REQUIRED = (
    "train.", "train.output_dir", "train.init_checkpoint", "train.max_iter", "train.seed",
    "train.device", "train.amp.", "train.clip_grad.", "train.accumulation_steps", "train.ddp.",
    "train.model_ema.", "train.model_ema.enabled", "train.model_ema.decay", "train.checkpointer.",
    "train.checkpointer.period", "train.best_checkpointer.", "train.best_checkpointer.val_metric",
    "train.eval_period", "train.log_period", "dataloader.", "dataloader.train.",
    "dataloader.train.dataset.", "dataloader.test.", "dataloader.test.dataset.",
    "dataloader.test.mapper.", "dataloader.evaluator.", "optimizer.", "optimizer.params.",
    "lr_multiplier.", "model.", "model.num_classes", "model.backbone.", "model.queries.",
)  # fmt: skip
SECTIONS = (
    "train.clip_grad.params", "train.inference", "train.pictures", "train.wandb", "train.mlflow",
    "train.wandb.params", "train.mlflow.params", "train.early_stopping",
    "train.flight_recorder", "model.decoder.parts",
    "optimizer.params.lr_factors",
)  # fmt: skip
# Sections whose keys are arguments of a call in this program: it takes no others.
KEYS = {
    "train.clip_grad.params": ("max_norm", "norm_type", "error_if_nonfinite", "foreach"),
    "train.checkpointer": ("period", "max_to_keep"),
    "train.best_checkpointer": ("val_metric", "mode"),
    "train.early_stopping": ("patience", "metric", "mode", "min_delta"),
    "train.pictures": ("num_images", "score_threshold"),
    "train.ddp": (*_DDP_FLAGS, "bucket_cap_mb"),
    "train.flight_recorder": ("enabled", "images"),
    "train.inference": ("dtype", "bucket", "channels_last", "compile"),
    "train.amp": ("enabled", "dtype", "max_skipped_steps"),
    "train.clip_grad": ("enabled", "params"),
    "train.model_ema": ("enabled", "decay", "use_ema_weights_for_eval_only"),
    "train.wandb": ("enabled", "params"),
    "train.mlflow": ("enabled", "params"),
    "train.mlflow.params": ("tracking_uri", "experiment_name", "run_name"),
}
# Sections that are no arguments of a call, where a reference may name a key of one's own.
READ = {
    "train": {
        key.split(".")[1]
        for key in (*RULES, *REQUIRED, *SECTIONS, *KEYS)
        if key.startswith("train.") and key != "train."
    },
    "dataloader": {"train", "test", "evaluator"},
}
# What must be the same in two places.
EQUAL = (
    ("model.queries.embed_dim", "model.decoder.embed_dim"),
    ("model.neck.out_channels", "model.decoder.embed_dim"),
    ("model.decoder.num_classes", "model.num_classes"),
    ("model.denoising.num_classes", "model.num_classes"),
    ("model.denoising.embed_dim", "model.decoder.embed_dim"),
    ("model.criterion.num_classes", "model.num_classes"),
    ("model.decoder.parts.cascade.num_groups", "model.queries.num_groups"),
    ("model.criterion.num_groups", "model.queries.num_groups"),
    ("model.decoder.parts.cascade.num_queries", "model.queries.num_queries"),
    ("model.criterion.num_queries", "model.queries.num_queries"),
)


def check_settings(cfg: DictConfig, processes: int) -> None:
    """Raises a ConfigError that names each value that cannot be meant, and what it may be.

    Args:
        cfg: of a run.
        processes: that share a batch.
    """
    plain = resolved(cfg)
    wrong = []
    section = Rule(lambda value: isinstance(value, dict), "a section with keys")
    for key in (*REQUIRED, *SECTIONS):
        name = key.removesuffix(".")
        value, there = _look_up(plain, name)
        if not there and key in REQUIRED:
            wrong.append(f"{name} is missing")
        elif there and (key in SECTIONS or name != key) and not section.holds(value):
            wrong.append(_told(name, section, value))
    clips, _ = _look_up(plain, "train.clip_grad.enabled")
    if clips is True and not _look_up(plain, "train.clip_grad.params.max_norm")[1]:
        wrong.append("train.clip_grad.params.max_norm is missing")
    for name, known in KEYS.items():
        value, _ = _look_up(plain, name)
        if isinstance(value, dict) and (unknown := sorted(set(map(str, value)) - set(known))):
            has = f"; it has {list(known)}" if len(known) < 10 else ""
            wrong.append(f"{name} has no key {', '.join(unknown)}{has}")
    leaves = flatten(plain, ".")
    sections = {key[: dot.start()] for key in leaves for dot in re.finditer(r"\.", key)}
    sections -= {key.removesuffix("._target_") for key in leaves}  # what is made is a value
    values = flatten(by_number(plain), ".") | leaves
    for pattern, rule in RULES.items():
        for key in _matching(pattern, values):
            if not rule.holds(values[key]):
                wrong.append(_told(_where_said(cfg, key), rule, values[key]))
        for key in _matching(pattern, sections):  # where a value was meant
            section_there, _ = _look_up(plain, key)
            if not rule.holds(section_there):
                wrong.append(_told(key, rule, section_there))
    wrong += _wrong_transforms(values)
    for key, other in EQUAL:
        ours, theirs = values.get(key), values.get(other)
        if is_whole(ours) and is_whole(theirs) and ours != theirs:
            wrong.append(_told(key, Rule(bool, f"{other}, {theirs}"), ours))
    batch = values.get("dataloader.train.total_batch_size", 0)
    if is_whole(batch) and batch % max(processes, 1):
        allowed = f"a multiple of the {processes} processes that share a batch"
        wrong.append(_told("dataloader.train.total_batch_size", Rule(bool, allowed), batch))
    parts = values.get("train.accumulation_steps", 1)
    if processes > 1 and values.get("train.ddp.static_graph") is True and parts != 1:
        # PyTorch fails in the first step, or exchanges no gradients from the second one on.
        allowed = f"false with train.accumulation_steps={parts}"
        wrong.append(_told("train.ddp.static_graph", Rule(bool, allowed), True))
    for name, key in (("augmentation", "policy"), ("flip", "flip")):
        wanted, used = values.get(f"data.{name}"), values.get(f"dataloader.train.mapper.{key}")
        if wanted is not None and used != wanted and f"${{data.{name}}}" not in str(cfg):
            wrong.append(
                f"data.{name} is {wanted!r}, but dataloader.train.mapper.{key} is not: it must "
                f"say ${{data.{name}}}, in a config with references"
            )
    if wrong:
        raise ConfigError("; ".join(dict.fromkeys(wrong)))


def _wrong_transforms(values: dict[str, Any]) -> Iterator[str]:
    """Of transforms, what two arguments cannot be together; their rules say what each may be."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if not _PAIR.holds(value):
            continue
        style = values.get(f"{section}.sample_style", "range")
        if name == "short_edge_length" and style == "range" and value[0] > value[1]:
            yield _told(key, Rule(bool, "[min, max]"), value)
        kind = str(values.get(f"{section}.crop_type")) if name == "crop_size" else ""
        if kind.startswith("relative") and max(value) > 1:
            yield _told(key, Rule(bool, "shares of the sides, up to 1"), value)
        if kind.startswith("absolute") and min(value) < 1:
            yield _told(key, Rule(bool, "pixels, 1 or more"), value)


def unread_keys(cfg: DictConfig) -> list[str]:
    """A line for each key that no part of a run reads, and no reference: one that is misspelt."""
    references = re.findall(r"\$\{(\.*)([\w.]+)", str(cfg))
    named = {name.split(".")[0] for dots, name in references if not dots}
    # A section beside those of a run may hold what these are made of.
    values = [str(key) for key, value in cfg.items_ex(False) if not isinstance(value, DictConfig)]
    lines = [f"{key} of the config is read by nothing" for key in values if key not in named]
    parts = {part for _, name in references for part in name.split(".")}
    for section, known in READ.items():
        for key in set(map(str, cfg[section])) - known - parts:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f": is {section}.{nearest[0]} meant?" if nearest else ""
            lines.append(f"{section}.{key} of the config is read by nothing{hint}")
    return sorted(lines)


def _matching(pattern: str, keys: Collection[str]) -> list[str]:
    if "*" not in pattern:
        return [pattern] if pattern in keys else []
    return fnmatch.filter(keys, pattern)


def _look_up(plain: Any, key: str) -> tuple[Any, bool]:
    for part in key.split("."):
        if not isinstance(plain, dict) or part not in plain:
            return None, False
        plain = plain[part]
    return plain, True


def _where_said(cfg: DictConfig, key: str) -> str:
    """The key that a person has set where this one refers to it, ``${data.closing}``."""
    written = OmegaConf.to_container(cfg, resolve=False)
    for _ in range(10):
        value, _ = _look_up(written, key)
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if reference is None:
            break
        key = reference[1]
    return key


def _told(key: str, rule: Rule, value: Any) -> str:
    shown = "null" if value is None else repr(value)
    return f"{key} must be {rule.allowed}, got {shown[:200]}"
