"""Loading LazyConfig files, and overriding them without room for typing errors."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from .d2.config import LazyConfig, instantiate

__all__ = [
    "ConfigError",
    "instantiate",
    "load_config",
    "save_resolved",
    "without_pretrained_weights",
]


class ConfigError(ValueError):
    """A config file or an override that cannot mean what its author meant."""


def load_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Loads a LazyConfig file (.py or .yaml) and applies ``key=value`` overrides.

    A key must exist, or name a parameter of the callable that it configures; ``+key=value`` adds
    any other key.

    Raises:
        ConfigError: for an unknown key, naming the nearest ones, or a value of another type.
    """
    try:
        config = LazyConfig.load(config_file)
    except FileNotFoundError as error:
        raise ConfigError(f"--config-file {config_file}: there is no such file") from error
    for override in overrides:
        _apply(config, override)
    return config


def without_pretrained_weights(config: DictConfig) -> None:
    """A checkpoint will bring all weights, or none matter: the backbone's own are not fetched."""
    if "pretrained" in config.model.get("backbone", {}):
        config.model.backbone.pretrained = False


def save_resolved(config: DictConfig, path: str) -> None:
    """Writes the config with all interpolations resolved, as YAML that can be loaded again."""
    resolved = OmegaConf.create(
        OmegaConf.to_container(config, resolve=True), flags={"allow_objects": True}
    )
    LazyConfig.save(resolved, path)


def _apply(config: DictConfig, override: str) -> None:
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except Exception as error:
        raise ConfigError(f"override {override!r} is not of the form key=value: {error}") from error
    key, value = parsed.key_or_group, parsed.value()
    if parsed.is_delete():
        raise ConfigError(f"override {override!r}: a key cannot be deleted")
    if parsed.is_add():
        override = override.lstrip("+")
    else:
        _check_key(config, key, override)
        old = OmegaConf.select(config, key)
        _check_type(old, value, override)
        if isinstance(old, DictConfig) and isinstance(value, list):
            OmegaConf.update(config, key, None, merge=False)  # a call gives way to its result
    LazyConfig.apply_overrides(config, [override])


def _check_key(config: DictConfig, key: str, override: str) -> None:
    """Walks down the key and stops where it leaves the config."""
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the config"
        if isinstance(node, ListConfig):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"override {override!r}: {where} is a list of {len(node)} items")
            node = node[int(part)]
            continue
        if not isinstance(node, DictConfig):
            raise ConfigError(
                f"override {override!r}: {where} is the value {node!r}, not a section"
            )
        parameters = _parameters(node.get("_target_"))
        if part not in node and not (depth == len(parts) - 1 and part in parameters):
            known = sorted({str(name) for name in node if name != "_target_"} | set(parameters))
            nearest = difflib.get_close_matches(part, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"it has {known}."
            raise ConfigError(
                f"override {override!r}: {where} has no key {part!r}; {hint} "
                "(+key=value adds a new key)"
            )
        node = node.get(part)


def _parameters(target: Any) -> list[str]:
    """Named parameters of what a ``_target_`` calls."""
    if isinstance(target, str):
        from pydoc import locate

        target = locate(target)
    if not callable(target):
        return []
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _check_type(old: Any, new: Any, override: str) -> None:
    """A number stays a number, a list a list, a section a section."""
    if new is None or (isinstance(new, str) and "${" in new):
        return
    if isinstance(old, DictConfig):
        if "_target_" in old or isinstance(new, dict):
            return
        raise ConfigError(f"override {override!r}: the key is a section with keys {list(old)}")
    kinds = {
        bool: (bool, "true or false"),
        int: (int, "a whole number"),
        float: ((int, float), "a number"),
        ListConfig: (list, "a list such as [1,2]"),
    }
    for kind, (accepted, name) in kinds.items():
        if isinstance(old, kind):
            wrong = not isinstance(new, accepted) or (kind is not bool and isinstance(new, bool))
            # A whole number may become a fraction where the default just happens to be whole.
            if wrong and not (kind is int and isinstance(new, float)):
                raise ConfigError(f"override {override!r}: expected {name} (now {old})")
            return
