"""What a checkpoint says about itself, so that a detector can be made of it and of nothing else.

Plain values only: loading a checkpoint runs no code in it, and what its config may build is
restricted to parts of a model and of its input.
"""

import copy
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from .. import __version__
from ..config import ConfigError, instantiate, load_config, require_sections
from ..d2 import transforms
from ..data import categories_of
from ..data.coco import categories_in_file
from ..modeling import StageInteractor
from .weights import CheckpointError, choose_weights, read_checkpoint, set_weights

logger = logging.getLogger(__name__)

KEY = "blueprint"  # of a checkpoint
_DECIDED = ("model.num_classes", "model.decoder.num_classes")  # by the weights

# Where parts of a model and of its input are defined. A config in a file can name anything that can
# be imported; only these are called.
_TRUSTED = (
    "stage_interactor.modeling",
    "stage_interactor.d2.embedded.transforms",
    "detectron2.data.transforms",
    "detectron2.layers",
    "detectron2.modeling",
    "detrex.layers",
    "detrex.modeling",
    "fvcore.transforms",
    "torch.nn",
)


class Blueprint(NamedTuple):
    """How to build a detector and how to feed it."""

    config: dict  # the run's, resolved; targets by their dotted names
    categories: list[dict]  # COCO's, {"id": ..., "name": ...}, by class index
    averaged: bool  # whether the weights that were evaluated are the averaged ones
    version: str  # of this package

    @classmethod
    def of_run(cls, cfg: DictConfig, categories: Sequence[Mapping[str, Any]]) -> "Blueprint":
        """Of a run's config and the categories of its data."""
        cfg = copy.deepcopy(cfg)
        cfg.model.num_classes = len(categories)  # may have been counted in a file that goes away
        for service in ("wandb", "mlflow"):  # whose addresses are nobody else's business
            cfg.train.pop(service, None)
        config = _plain(OmegaConf.to_container(cfg, resolve=True))
        averaged = bool(cfg.train.model_ema.enabled)
        return cls(config, [dict(category) for category in categories], averaged, __version__)

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
        try:
            return cls(**content)
        except TypeError as error:
            raise CheckpointError(
                f"{path} was written by version {content.get('version')} and cannot be read by "
                f"{__version__} ({error}); name the config that it was trained with: --config-file"
            ) from error

    @classmethod
    def from_json(cls, text: str | None, path: str) -> "Blueprint":
        """Of the text that an exported file carries; see :meth:`from_checkpoint`."""
        return cls.from_checkpoint({} if text is None else {KEY: json.loads(text)}, path)

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    def as_extra(self) -> dict:
        """For :class:`Checkpointer`, which writes it into every checkpoint."""
        return {KEY: self._asdict()}

    def changed(self, overrides: Sequence[str]) -> "Blueprint":
        """The same detector with other values, ``key=value``, of its model or its input.

        Raises:
            ConfigError: no such key, or one that changes nothing of a detector.
        """
        for override in overrides:
            key = override.partition("=")[0].lstrip("+")
            if not key.startswith(("model.", "dataloader.test.mapper.")) or key in _DECIDED:
                raise ConfigError(
                    f"override {override!r} changes nothing of a detector that is trained: what "
                    "does is below model. and dataloader.test.mapper., the number of classes apart"
                )
        if not overrides:
            return self
        config = load_config(OmegaConf.create(self.config), overrides)
        return self._replace(config=_plain(OmegaConf.to_container(config, resolve=True)))

    def build_model(self) -> StageInteractor:
        """The detector without its weights, on the CPU.

        Raises:
            CheckpointError: the config calls something that is no part of a model.
        """
        return _build(_without_pretrained(self.config["model"]))

    def build_augmentation(self) -> transforms.AugmentationList:
        """What was done to an image before it was given to the model, in evaluation."""
        return transforms.AugmentationList(_build(self.config_of_input["augmentation"]))

    @property
    def class_names(self) -> list[str]:
        return [category["name"] for category in self.categories]

    @property
    def config_of_input(self) -> dict:
        return self.config["dataloader"]["test"]["mapper"]

    @property
    def image_format(self) -> str:
        """ "RGB" or "BGR", the order of the channels that the model takes."""
        return self.config_of_input.get("image_format", "RGB")


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
    checkpoint = read_checkpoint(path, mmap=True)
    if config_file is None:
        blueprint = Blueprint.from_checkpoint(checkpoint, path).changed(overrides)
        model = blueprint.build_model()
    else:
        cfg = load_config(config_file, overrides)
        require_sections(cfg, config_file)
        keep_normalisation(cfg, checkpoint)
        # The names of the classes are those of the training where they are known.
        known = KEY in checkpoint
        trained = Blueprint.from_checkpoint(checkpoint, path).categories if known else None
        categories = trained or _categories_of_config(cfg)
        cfg.model.num_classes = len(categories)
        # Of the config itself, a user's own file, which may hold and call anything.
        config = _without_pretrained(OmegaConf.to_container(cfg.model, resolve=True))
        model = instantiate(OmegaConf.create(config, flags={"allow_objects": True}))
        mean, std, _ = model.normalisation
        cfg.model.update(pixel_mean=list(mean), pixel_std=list(std))
        blueprint = Blueprint.of_run(cfg, categories)
    set_weights(model, choose_weights(checkpoint, path, averaged))
    are_averages = "ema" in checkpoint and averaged is not False
    return model.eval(), blueprint._replace(averaged=are_averages)


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
    named = getattr(value, "__qualname__", None)
    if named and getattr(transforms, named, None) is value:
        return f"{transforms.__name__}.{named}"
    return f"{value.__module__}.{named}" if named else str(value)


def _without_pretrained(config: Any) -> Any:
    """The same, with nothing fetched from a network: the checkpoint brings all weights."""
    if isinstance(config, dict):
        plain = {key: _without_pretrained(value) for key, value in config.items()}
        return plain | ({"pretrained": False} if "pretrained" in plain else {})
    return [_without_pretrained(item) for item in config] if isinstance(config, list) else config


def _build(config: Any) -> Any:
    _check_targets(config)
    return instantiate(OmegaConf.create(config))


def _check_targets(config: Any) -> None:
    if isinstance(config, str) and "${" in config:  # it was resolved when it was written
        raise CheckpointError(f"the checkpoint's config refers to something outside: {config!r}")
    if isinstance(config, list):
        for item in config:
            _check_targets(item)
    elif isinstance(config, dict):
        for item in config.values():
            _check_targets(item)
        target = config.get("_target_")
        if target is not None and not _is_trusted(target):
            raise CheckpointError(
                f"the checkpoint's config calls {target}, which is not known as a part of a "
                "detector. If you trust it, name the config it was trained with: --config-file"
            )


def _is_trusted(target: str) -> bool:
    if target.split(".")[0] not in {name.split(".")[0] for name in _TRUSTED}:
        return False
    found = get_object(target)
    module = getattr(inspect.unwrap(found), "__module__", None) or ""
    return any(module == name or module.startswith(f"{name}.") for name in _TRUSTED)
