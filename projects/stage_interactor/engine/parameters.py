"""Which weights are trained, and how fast: by part of the model, by layer of the backbone."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..config import ConfigError, is_meant
from ..d2.solver import get_default_optimizer_params
from ..modeling import StageInteractor

# A block of a network, by the names that timm, torchvision, detectron2 and detrex give it.
_BLOCK = re.compile(
    r"(?:^|.*?\.)(?:blocks|layers?_?\d*|stages?(?:_\d+)?|features|res\d|s\d)\.(?:blocks\.|b)?\d+"
    r"(?:\.(?:blocks\.)?\d+)?(?=\.)"
)


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    *,
    lr_factors: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    **options: Any,
) -> list[dict]:
    """detectron2's ``get_default_optimizer_params`` with learning rates by part and by layer.

    Args:
        lr_factors: names of parts, ``"backbone"`` or ``"decoder.stages.0"``, to factors on the
            learning rate of all that is in them; of several names the longest counts.
        layer_decay: factor from each block of the backbone to the one before it, as fine-tuned
            ViT and ConvNeXt have it: the last block's rate is multiplied by it once, that of the
            stem by its power of the number of blocks and one more.
        lr_factor_func: one more factor, by the name of a weight.
        options: ``weight_decay``, ``weight_decay_norm``, ``overrides`` and so on of
            ``get_default_optimizer_params``.

    Raises:
        ConfigError: the model has no part of such a name, or its backbone no blocks.
    """
    names = [name for name, _ in model.named_parameters()]
    factors = dict(lr_factors or {})
    for part, value in factors.items():
        if value != 1:  # as of all; a model of one's own may have no such part
            _require_part(model, part, "optimizer.params.lr_factors")
    depths: dict[str, int] = {}
    deepest = 0
    layer_decay = 1.0 if layer_decay is None else layer_decay
    if layer_decay != 1:
        depths, deepest = _depths([name for name in names if _is_in(name, "backbone")])

    def factor(name: str) -> float:
        chosen = max((part for part in factors if _is_in(name, part)), key=len, default=None)
        found = 1.0 if chosen is None else factors[chosen]
        if name in depths:
            found *= layer_decay ** (deepest - depths[name])
        return found if lr_factor_func is None else found * lr_factor_func(name)

    return get_default_optimizer_params(model, base_lr, lr_factor_func=factor, **options)


def _depths(names: Sequence[str]) -> tuple[dict[str, int], int]:
    """How deep each weight of a backbone lies: 0 before its blocks, n in the nth one, and what lies
    behind the last one."""
    blocks: list[str] = []
    depths = {}
    for name in names:
        found = _BLOCK.match(name)
        if found and found[0] not in blocks:
            blocks.append(found[0])
        if found:
            depths[name] = 1 + blocks.index(found[0])
        else:  # between two blocks it belongs to the next one
            depths[name] = len(blocks) + 1 if blocks else 0
    if not blocks:
        raise ConfigError(
            "optimizer.params.layer_decay: the blocks of the backbone are not known by their "
            f"names, such as {', '.join(names[:2])}; optimizer.params.lr_factors takes names"
        )
    return depths, len(blocks) + 1


def freeze(model: StageInteractor, parts: Sequence[str]) -> None:
    """Takes parts of a model out of training: no gradients, statistics and dropout as evaluated.

    Args:
        parts: names of modules or of single weights, ``"backbone"``, ``"decoder.stages.0"``.

    Raises:
        ConfigError: the model has no such part, or nothing would be left to train.
    """
    for part in parts:
        _require_part(model, part, "train.freeze")
    for name, parameter in model.named_parameters():
        if any(_is_in(name, part) for part in parts):
            parameter.requires_grad_(False)
    modules = dict(model.named_modules())
    model.frozen_parts = tuple(part for part in parts if part in modules)
    if parts and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train.freeze={list(parts)} leaves nothing to train")


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _require_part(model: nn.Module, part: str, key: str) -> None:
    names = [name for name, _ in model.named_parameters()]
    if any(_is_in(name, part) for name in names):
        return
    known = dict.fromkeys(
        ".".join(name.split(".")[:depth])
        for name in names
        for depth in range(1, name.count(".") + 2)
    )
    parts = sorted({name.partition(".")[0] for name in names})
    hint = is_meant(part, known) or f"it has {parts}"
    raise ConfigError(f"{key}: the model has no part {part!r}; {hint}")
