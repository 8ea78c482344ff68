"""Configs: found by name, loaded, and overridden without room for typing errors."""

import ast
import copy
import difflib
import functools
import inspect
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from .d2.config import LazyCall, LazyConfig, instantiate

__all__ = [
    "ConfigError",
    "copy_config",
    "find_config",
    "instantiate",
    "is_config",
    "list_configs",
    "load_config",
    "override_text",
    "save_resolved",
    "without_pretrained_weights",
]

_PARTS = ("common", "models", "grid_sampler.py")  # of configs that are no runs
_SUFFIXES = (".py", ".yaml", ".yml")


class ConfigError(ValueError):
    """A config file or an override that cannot mean what its author meant."""


def configs_folder() -> Path:
    """This package's configs: in it where it is installed, beside it in the repository."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def list_configs() -> list[str]:
    """Names of this package's run configs, such as ``"quickstart.py"`` or ``"custom/nano.py"``."""
    folder = configs_folder()
    names = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return sorted(name.as_posix() for name in names if not set(name.parts) & set(_PARTS))


def find_config(name_or_path: str | os.PathLike) -> str:
    """The path of a config file: one's own, or one of this package's by its name.

    ``"quickstart.py"``, ``"quickstart"`` and ``"configs/quickstart.py"`` name the same one; a file
    that is there comes first.

    Raises:
        ConfigError: there is no such file, and no such name; it lists similar ones.
    """
    given = os.fspath(name_or_path)
    if os.path.isfile(given):
        return given
    name = Path(given).as_posix().removeprefix("./").removeprefix("configs/")
    for candidate in (name, f"{name}.py"):
        path = configs_folder() / candidate
        if candidate.endswith(_SUFFIXES) and path.is_file():
            return str(path)
    similar = difflib.get_close_matches(name, list_configs(), n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(similar)}?" if similar else "list them: stage-interactor config"
    )
    raise ConfigError(
        f"--config-file {given}: there is no such file, and none of this package's configs is "
        f"called so; {hint}"
    )


def is_config(name_or_path: str | os.PathLike) -> bool:
    """Whether it means a config, and not a data set: a folder, a JSON, or YOLO's data.yaml."""
    given = os.fspath(name_or_path)
    if given.endswith((".yaml", ".yml")) and os.path.isfile(given):
        with open(given, encoding="utf-8-sig", errors="replace") as file:
            text = file.read()
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError:  # such as detectron2's tags, which name Python objects
            return "_target_" in text or "!!python" in text
        return isinstance(content, dict) and {"model", "train", "dataloader"} <= content.keys()
    if os.path.exists(given):
        return given.endswith(_SUFFIXES)
    try:
        find_config(given)
    except ConfigError:
        return given.endswith(".py")
    return True


def load_config(
    config: str | os.PathLike | DictConfig, overrides: Sequence[str] = ()
) -> DictConfig:
    """Loads a LazyConfig file (.py or .yaml) and applies ``key=value`` overrides.

    A key must exist, or name a parameter of the callable that it configures; ``+key=value`` adds
    any other key. Values are written as in Hydra; where the config has a text, such as a path, the
    text behind ``=`` is meant as it stands, unless it is in quotes, ``null`` or ``${...}``.

    Args:
        config: a path, the name of one of this package's configs (see :func:`find_config`), or a
            config, which is copied.
        overrides: applied in order.

    Raises:
        ConfigError: for an unknown key, naming the nearest ones, or a value of another type.
    """
    if isinstance(config, DictConfig):
        loaded = copy.deepcopy(config)
    else:
        loaded = LazyConfig.load(find_config(config))
    for override in overrides:
        _apply(loaded, override)
    # A part of a stage given as what makes it is written as a call: saved configs name calls.
    parts = OmegaConf.select(loaded, "model.decoder.parts") or {}
    for name, part in parts.items():
        if isinstance(part, functools.partial):
            if part.args:
                raise ConfigError(f"model.decoder.parts.{name}: {part} has values without names")
            parts[name] = LazyCall(part.func)(**part.keywords)
        elif callable(part):
            parts[name] = LazyCall(part)()
    return loaded


def override_text(key: str, value: str) -> str:
    """``key=value`` such that :func:`load_config` reads back the text, whatever is in it.

    Raises:
        ConfigError: for what would refer to another key, ``${``.
    """
    if "${" in value:
        raise ConfigError(f"{key}: a text cannot hold '${{', which refers to another key: {value}")
    if value and value == value.strip() and value[0] not in "'\"":
        if value.lower() != "null":
            return f"{key}={value}"
    # Hydra takes a backslash as it is unless a quote follows.
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", value)
    escaped = re.sub(r"\\+$", lambda found: found[0] * 2, escaped)
    return f"{key}='{escaped}'"


def without_pretrained_weights(config: DictConfig) -> None:
    """A checkpoint will bring all weights, or none matter: the backbone's own are not fetched."""
    if "pretrained" in config.model.get("backbone", {}):
        config.model.backbone.pretrained = False


def save_resolved(config: DictConfig, path: str | os.PathLike) -> None:
    """Writes the config with all interpolations resolved, as YAML that can be loaded again."""
    resolved = OmegaConf.create(
        OmegaConf.to_container(config, resolve=True), flags={"allow_objects": True}
    )
    LazyConfig.save(resolved, os.fspath(path))


def copy_config(
    name_or_path: str | os.PathLike, folder: str | os.PathLike, overrides: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Copies a config file, and those that it imports, to be edited.

    Places relative to one another are kept. ``overrides`` become lines at the end of the copy.

    Returns:
        the path of the copy, and those of the files that it imports.

    Raises:
        ConfigError: there is no such config, an override is wrong, or a file is there already.
    """
    source = Path(find_config(name_or_path)).resolve()
    config = load_config(source)
    lines = []
    for override in overrides:
        before = copy.deepcopy(config)
        *keys, value = _apply(config, override)
        if isinstance(value, dict):
            raise ConfigError(f"override {override!r}: give the keys of a section one by one")
        while len(keys) > 1 and OmegaConf.select(before, ".".join(keys[:-1])) is None:
            value = {keys.pop(): value}  # a section that is new
        path = "".join(f"[{int(key) if key.isdigit() else key!r}]" for key in keys[1:])
        lines.append(f"{keys[0]}{path} = {value!r}\n")
    if lines and source.suffix != ".py":
        raise ConfigError(f"{source} is YAML: change the copy by hand, or leave the overrides out")
    files = _imported_files(source)
    top = configs_folder().resolve()
    if top not in source.parents:
        top = Path(os.path.commonpath([file.parent for file in files]))
    copies = {file: Path(folder, file.relative_to(top)) for file in files}
    if there := [str(copy) for copy in copies.values() if copy.exists()]:
        raise ConfigError(f"{there[0]} is there already: name another folder")
    for file, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8")
        if file == source and lines:
            text = f"{text.rstrip()}\n\n{''.join(lines)}"
        target.write_text(text, encoding="utf-8")
    own, *others = map(str, copies.values())
    return own, others


def _imported_files(source: Path) -> list[Path]:
    """A config file, and all files of its tree that it imports."""
    found = [source]
    for file in found:
        if file.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):  # without dots: a module that may lie beside it
                name = (node.module or "").replace(".", "/")
                imported = Path(file.parents[max(node.level - 1, 0)], f"{name}.py")
                if imported not in found and (node.level or imported.is_file()):
                    found.append(imported)
    return found


def _apply(config: DictConfig, override: str) -> tuple[Any, ...]:
    """Applies an override; the parts of its key, and its value."""
    key, equals, text = override.partition("=")
    if not (equals and re.fullmatch(r"\+{0,2}[A-Za-z_][\w.]*", key)):
        raise ConfigError(f"override {override!r} is not of the form key=value")
    new = key.startswith("+")
    key = key.lstrip("+")
    old = None
    if not new:
        _check_key(config, key, override)
        old = OmegaConf.select(config, key)
    value = _parse(override, text, old)
    if not new:
        _check_type(old, value, override)
        if isinstance(old, DictConfig) and isinstance(value, list):
            OmegaConf.update(config, key, None, merge=False)  # a call gives way to its result
    OmegaConf.update(config, key, value, merge=True)
    return *key.split("."), value


def _parse(override: str, text: str, old: Any) -> Any:
    """The value of an override, where the config has ``old`` now."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
        value = parsed.value()
        wrong = "it gives several values" if parsed.is_sweep_override() else None
    except Exception as error:
        value, wrong = None, str(error)
    if isinstance(old, str) or (old is None and wrong):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        if wrong or not (quoted or value is None or "${" in text):
            return text
    if wrong:
        raise ConfigError(f"override {override!r} is not of the form key=value: {wrong}")
    return value


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
    kinds: dict[type, tuple[Any, str]] = {
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
