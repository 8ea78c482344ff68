"""What a checkpoint says about itself, so that a detector can be made of it and of nothing else.

Plain values only, see ``schema``; what a config in a file may call is listed in ``parts``.
"""

import copy
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import __version__
from ..config import (
    ConfigError,
    instantiate,
    load_config,
    require_list,
    require_sections,
    saved_object,
)
from ..d2 import transforms
from ..data import categories_of
from ..data.coco import categories_in_file
from ..modeling import StageInteractor
from ..modeling.backbone import OnMeta
from ..modeling.extensions.fixed_point import depth
from ..untrusted.tensors import CheckpointError, parse_json
from .hub import local_file
from .parts import take_input, take_model
from .schema import FIELDS, KEY, THRESHOLDS, Misfit, require_blueprint
from .weights import choose_weights, differences, read_checkpoint, require_fit, set_weights

__all__ = ["KEY", "Blueprint", "class_names_in", "keep_normalisation", "load_model"]

logger = logging.getLogger(__name__)

_DECIDED = ("model.num_classes", "model.decoder.num_classes")  # by the weights
_INPUT = "dataloader.test.mapper"
_INSTEAD = "If you trust it, name the config it was trained with: --config-file"
_LARGEST_ARRAY = 2 * 2**30  # bytes, of one array for one picture; the paper's take a tenth


@dataclass(frozen=True)
class Blueprint:
    """How to build a detector and how to feed it."""

    config: dict  # the run's, resolved; targets by their dotted names
    categories: list[dict]  # COCO's, {"id": ..., "name": ...}, by class index
    averaged: bool  # whether the weights that were evaluated are the averaged ones
    version: str  # of this package
    trusted: bool = False  # of a config that the user named, which may call anything
    thresholds: list[float] | None = None  # least scores by class index, if they were chosen

    @classmethod
    def of_run(cls, cfg: DictConfig, categories: Sequence[Mapping[str, Any]]) -> "Blueprint":
        """Of a run's config and the categories of its data."""
        cfg = copy.deepcopy(cfg)
        cfg.model.num_classes = len(categories)  # may have been counted in a file that goes away
        for service in ("wandb", "mlflow"):  # whose addresses are nobody else's business
            cfg.train.pop(service, None)
        config = _plain(OmegaConf.to_container(cfg, resolve=True))
        averaged = bool(cfg.train.model_ema.enabled)
        return cls(config, [dict(category) for category in categories], averaged, __version__, True)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping, path: str) -> "Blueprint":
        """Of a loaded checkpoint.

        Raises:
            CheckpointError: it carries none, or one that this version cannot read.
        """
        content = checkpoint.get(KEY)
        if content is None:
            raise CheckpointError(
                f"{path} does not say how its detector is built; name the config that it was "
                "trained with: --config-file, or config_file= in Python"
            )
        if content.keys() - {THRESHOLDS} != set(FIELDS):
            raise CheckpointError(
                f"{path} was written by version {content.get('version')} and cannot be read by "
                f"{__version__}: its blueprint has the keys {', '.join(content)}; name the config "
                "that it was trained with: --config-file"
            )
        return cls(**content)

    @classmethod
    def from_json(cls, text: str | None, path: str) -> "Blueprint":
        """Of the text that an exported file carries; see :meth:`from_checkpoint`."""
        content = {} if text is None else {KEY: parse_json(text, path)}
        if text is not None:
            try:
                require_blueprint(content[KEY])
            except Misfit as misfit:
                raise CheckpointError(f"{path}: its blueprint is damaged: {misfit}") from misfit
        return cls.from_checkpoint(content, path)

    def to_json(self) -> str:
        return json.dumps(self.as_extra()[KEY])

    def as_extra(self) -> dict:
        """For :class:`Checkpointer`, which writes it into every checkpoint."""
        extra = {field: getattr(self, field) for field in FIELDS}
        return {KEY: extra if self.thresholds is None else {**extra, THRESHOLDS: self.thresholds}}

    def changed(self, overrides: Sequence[str]) -> "Blueprint":
        """The same detector with other values, ``key=value``, of its model or its input.

        Thresholds that were chosen are kept, but for those of another decoder.

        Raises:
            ConfigError: no such key, or one that changes nothing of a detector.
        """
        require_list(overrides)
        for override in overrides:
            key = override.partition("=")[0].lstrip("+")
            if not key.startswith(("model.", f"{_INPUT}.")) or key in _DECIDED:
                raise ConfigError(
                    f"override {override!r} changes nothing of a detector that is trained: what "
                    "does is below model. and dataloader.test.mapper., the number of classes apart"
                )
        if not overrides:
            return self
        # Of what is listed alone: names of other parts are looked up to know their arguments.
        known = {"model": self._take(take_model), "dataloader": {"test": {"mapper": self.input}}}
        before = OmegaConf.create(known)
        changed = load_config(before, overrides)
        plain = _plain(OmegaConf.to_container(changed, resolve=True))
        config = copy.deepcopy(self.config)
        # Scores of another stage, or of a cascade that ends elsewhere, are others.
        same = before.model.get("decoder") == changed.model.get("decoder")
        config["model"] = plain["model"]
        config["dataloader"]["test"]["mapper"].update(plain["dataloader"]["test"]["mapper"])
        return replace(self, config=config, thresholds=self.thresholds if same else None)

    def build_model(self, weights: Mapping[str, Tensor] | None = None) -> StageInteractor:
        """The detector without its weights, on the CPU.

        Args:
            weights: that it is to have. They are compared before the detector takes any memory, so
                that it cannot need more than its file brings.

        Raises:
            CheckpointError: the config calls something that is no part of a model or gives it what
                it does not take, or the detector is another than that of the weights, or needs too
                much memory.
        """
        if weights is not None:
            sketch = self.sketch()
            require_fit(*differences(weights, sketch.state_dict()))
            sides = [512]
            for step in self.input["augmentation"]:
                lengths = step.get("short_edge_length", [])
                sides += lengths if isinstance(lengths, list) else [lengths]
            _require_small(sketch, max(sides))
        return _build(self._take(take_model), "model")

    def sketch(self) -> StageInteractor:
        """The same on the meta device: names and shapes of its weights, without memory."""
        return _build(self._take(take_model), "model", on_meta=True)

    def build_augmentation(self) -> transforms.AugmentationList:
        """What was done to an image before it was given to the model, in evaluation."""
        return transforms.AugmentationList(_build(self.input["augmentation"], "augmentation"))

    def _take(self, take: Callable[[Mapping[str, Any]], dict]) -> dict:
        """A part of the config that may be built."""
        try:
            return take(self.config)
        except Misfit as misfit:
            raise CheckpointError(f"the checkpoint's config: {misfit}. {_INSTEAD}") from misfit

    @property
    def class_names(self) -> list[str]:
        return [category["name"] for category in self.categories]

    @property
    def input(self) -> dict:
        """``augmentation`` and ``image_format`` of the pictures that the model takes."""
        if self.trusted:
            return self.config["dataloader"]["test"]["mapper"]
        return self._take(take_input)

    @property
    def image_format(self) -> str:
        """ "RGB" or "BGR", the order of the channels that the model takes."""
        mapper = self.config.get("dataloader", {}).get("test", {}).get("mapper", {})
        return mapper.get("image_format", "RGB")


def keep_normalisation(cfg: DictConfig, checkpoint: Mapping) -> None:
    """A checkpoint's ``pixel_mean`` and ``pixel_std`` where a config leaves them to the backbone.

    Its weights were trained with them, maybe under another version of timm or of this package.
    """
    theirs = checkpoint.get(KEY, {}).get("config", {}).get("model", {})
    if theirs.get("backbone", {}).get("name") == cfg.model.backbone.get("name"):
        for name in ("pixel_mean", "pixel_std"):
            if cfg.model.get(name) is None:
                cfg.model[name] = theirs.get(name)


def load_model(
    path: str,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
    averaged: bool | None = None,
) -> tuple[StageInteractor, Blueprint]:
    """The detector of a checkpoint, in evaluation mode.

    See :meth:`stage_interactor.Detector.from_checkpoint` for arguments and errors.
    """
    path = local_file(path)
    checkpoint = read_checkpoint(path, mmap=True)
    weights = choose_weights(checkpoint, path, averaged)
    if config_file is None:
        blueprint = Blueprint.from_checkpoint(checkpoint, path)
        try:
            blueprint = blueprint.changed(overrides)
            model = blueprint.build_model(weights)
            blueprint.build_augmentation()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    else:
        cfg = load_config(config_file, overrides)
        require_sections(cfg, config_file)
        keep_normalisation(cfg, checkpoint)
        # The names of the classes are those of the training where they are known.
        known = KEY in checkpoint
        trained = Blueprint.from_checkpoint(checkpoint, path) if known else None
        categories = trained.categories if trained else _categories_of_config(cfg)
        cfg.model.num_classes = len(categories)
        # Of the config itself, a user's own file, which may hold and call anything.
        config = _without_pretrained(OmegaConf.to_container(cfg.model, resolve=True))
        model = instantiate(OmegaConf.create(config, flags={"allow_objects": True}))
        mean, std, _ = model.normalisation
        cfg.model.update(pixel_mean=list(mean), pixel_std=list(std))
        blueprint = Blueprint.of_run(cfg, categories)
        if trained:
            blueprint = replace(blueprint, thresholds=trained.thresholds)
    set_weights(model, weights)
    are_averages = "ema" in checkpoint and averaged is not False
    if "ema" in checkpoint and not are_averages:  # the averages were evaluated
        blueprint = replace(blueprint, thresholds=None)
    return model.eval(), replace(blueprint, averaged=are_averages)


def class_names_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """The names of the classes that a loaded checkpoint was trained on; none if it has no names."""
    return [category["name"] for category in checkpoint.get(KEY, {}).get("categories", [])]


def _categories_of_config(cfg: DictConfig) -> list[dict]:
    """Of the data that a config evaluates on, which need not be there."""
    dataset = cfg.dataloader.test.dataset
    num_classes = cfg.model.num_classes
    try:
        if dataset.get("json_file"):
            return categories_in_file(dataset.json_file)
        return categories_of(cfg.dataloader.evaluator.dataset_name)
    except (FileNotFoundError, KeyError, ValueError) as error:
        if not isinstance(num_classes, int):
            raise
        logger.warning(f"Classes are shown by their numbers, their names are not known: {error}")
        return [{"id": index, "name": str(index)} for index in range(num_classes)]


def _plain(value: Any) -> Any:
    """Mappings, lists and numbers; classes and functions by name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        # Transforms by the name that they have with detectron2 and without it.
        module, _, name = value.rpartition(".")
        known = module.startswith(("stage_interactor.d2.embedded.tr", "detectron2.data.tr"))
        return f"{transforms.__name__}.{name}" if known and hasattr(transforms, name) else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, functools.partial) and not value.args:  # such as a norm with its eps
        what = {"_target_": "hydra.utils.get_object", "path": _plain(value.func)}
        recipe = {"function": "functools.partial", "arguments": [what]}
        target = f"{saved_object.__module__}.{saved_object.__name__}"
        return {"_target_": target, "recipe": recipe | {"keywords": _plain(value.keywords)}}
    named = getattr(value, "__qualname__", None)
    if named and getattr(transforms, named, None) is value:
        return f"{transforms.__name__}.{named}"
    return f"{value.__module__}.{named}" if named else str(value)


def _without_pretrained(config: Any) -> Any:
    """The same, with nothing fetched from a network: the checkpoint brings all weights."""
    if isinstance(config, dict):
        plain = {key: _without_pretrained(value) for key, value in config.items()}
        if "pretrained" in plain:
            plain.pop("weights", None)
            plain["pretrained"] = False
        return plain
    return [_without_pretrained(item) for item in config] if isinstance(config, list) else config


def _build(config: Any, what: str, *, on_meta: bool = False) -> Any:
    """What a config of listed names describes, without memory for its weights if on meta."""
    try:
        with OnMeta() if on_meta else nullcontext():
            return instantiate(OmegaConf.create(config))
    except (Exception, SystemExit) as error:  # of values that fit one by one
        told = str(error) or type(error).__name__
        raise CheckpointError(f"the checkpoint's {what} cannot be built: {told}") from error


def _require_small(model: Any, side: int) -> None:
    """Raises a CheckpointError if an array for one picture of so many pixels would be too large.

    ``model`` is on the meta device.
    """
    side += -side % max(model.size_divisibility, 1)
    queries = model.queries.num_queries
    # Every stage's are kept, beside those that are sorted.
    scores = (depth(model.decoder) + 2) * queries * model.num_classes
    largest = {"the scores": scores}
    for stage in model.decoder.stages:
        sampler, width = stage.sampler, stage.attention.qkv.in_features
        points = sampler.point_groups * sampler.points_per_group * len(sampler.strides)
        layers = [layer for layer in stage.modules() if isinstance(layer, nn.Linear)]
        for name, size in {
            "the attention": queries * stage.attention.num_heads,
            "the sampling points": width * points,
            "the queries": max(layer.in_features + layer.out_features for layer in layers),
        }.items():
            largest[name] = max(queries * size, largest.get(name, 0))
    with _Largest() as backbone, torch.inference_mode():
        try:
            model.eval().backbone(torch.empty(1, 3, side, 2 * side, device="meta"))
        except (NotImplementedError, RuntimeError):  # an operation that meta does not know
            pass
    largest["the backbone"] = backbone.values
    name, values = max(largest.items(), key=lambda item: item[1])
    if 4 * values > _LARGEST_ARRAY:
        raise CheckpointError(
            f"for a picture of {side} x {2 * side} {name} would take "
            f"{4 * values / 2**30:.1f} GiB, more than the {_LARGEST_ARRAY / 2**30:.0f} GiB that a "
            f"file may ask for. {_INSTEAD}"
        )


class _Largest(TorchDispatchMode):
    """Notes how many values the largest array has that anything computes."""

    values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.values = max([self.values, *(tensor.numel() for tensor in tensors)])
        return found
