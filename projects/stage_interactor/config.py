"""Configs: found by name, loaded, and overridden without room for typing errors."""

import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from .d2.config import LazyCall, LazyConfig, instantiate
from .errors import TRACE, UserError, explain
from .untrusted.files import parse_yaml, read_bytes
from .writing import write_text

__all__ = [
    "ConfigError",
    "build",
    "by_number",
    "copy_config",
    "find_config",
    "flatten",
    "instantiate",
    "is_config",
    "list_configs",
    "load_config",
    "override_text",
    "read_saved",
    "require_runnable",
    "require_said_once",
    "require_sections",
    "save_config",
    "save_resolved",
    "without_pretrained_weights",
]

logger = logging.getLogger(__name__)
# A config's file is run with imports of its own kind, which detectron2 makes those of all threads.
# A file may load another one.
_loading = threading.RLock()

SECTIONS = ("model", "dataloader", "train")  # of the config of a run
_PARTS = ("common", "models", "grid_sampler.py")  # of configs that are no runs
_SUFFIXES = (".py", ".yaml", ".yml")


class ConfigError(UserError, ValueError):
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
        text = read_bytes(given).decode("utf-8-sig", "replace")
        try:
            content = parse_yaml(text, given)  # of whoever made the data
        except ValueError:
            return "_target_" in text or "!!python" in text
        return isinstance(content, dict) and content.keys() >= set(SECTIONS)
    if os.path.exists(given):
        return given.endswith(_SUFFIXES)
    try:
        find_config(given)
    except ConfigError:
        return given.endswith(".py")
    return True


def require_list(overrides: Any) -> None:
    """Raises a ConfigError for a text, which would be taken letter by letter."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list, [{overrides!r}], not a text")


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
        ConfigError: for a file that cannot be read as a config, for an unknown key, naming the
            nearest ones, or a value of another type.
    """
    require_list(overrides)
    if isinstance(config, DictConfig):
        loaded = copy.deepcopy(config)
    else:
        path = find_config(config)
        try:
            with _loading:
                loaded = LazyConfig.load(path)
        except Exception as error:
            if path.endswith(".py") and not isinstance(error, (UnicodeDecodeError, SyntaxError)):
                raise
            told = " ".join(str(error).split())  # YAML's own takes several lines
            raise ConfigError(f"{path} cannot be read as a config: {told}") from error
        if not path.endswith(".py"):
            plain = _plain(loaded)
            if not isinstance(plain, dict):
                raise ConfigError(f"{path} is no config: it holds no keys with values")
            loaded = OmegaConf.create(_restored(plain), flags={"allow_objects": True})
    for override in overrides:
        _apply(loaded, override)
    # A part of a stage given as what makes it is written as a call: saved configs name calls.
    parts = OmegaConf.select(loaded, "model.decoder.parts")
    for name, part in parts.items() if isinstance(parts, DictConfig) else ():
        if isinstance(part, functools.partial):
            if part.args:
                raise ConfigError(f"model.decoder.parts.{name!s}: {part} has values without names")
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


def require_said_once(overrides: Sequence[str], said: Mapping[str, Any]) -> None:
    """Raises a ConfigError if an override gives a key another value than the flag or argument for
    it, which is in ``said`` under the key; None is a flag that is not given."""
    for key, _, text in (override.partition("=") for override in overrides):
        value = said.get(key.lstrip("+"))
        if value is not None and _bare(str(value)) != _bare(text):
            raise ConfigError(f"{key} is named twice: {value} and {text}")


def _bare(text: str) -> Any:
    """What two ways to write a value have in common."""
    text = text.strip().strip("'\"")
    if text.startswith("["):
        items = (item.strip(" '\"") for item in text.strip("[]").split(","))
        return [item for item in items if item]
    try:
        return float(text)
    except ValueError:
        return os.path.normpath(text)


def is_meant(name: str, known: Iterable[str]) -> str:
    """The question whether the nearest of the known names is meant; empty if none is near."""
    names = list(known)
    alike = [one for one in names if one.strip().casefold() == name.strip().casefold()]
    nearest = alike or difflib.get_close_matches(name, names, n=1)
    return f"is {nearest[0]} meant?" if nearest else ""


def without_pretrained_weights(config: DictConfig) -> None:
    """A checkpoint will bring all weights, or none matter: the backbone's own are not fetched."""
    backbone = config.model.get("backbone", {})
    for key, nothing in (("pretrained", False), ("weights", None)):
        if key in backbone:
            backbone[key] = nothing


def save_config(config: DictConfig, path: str | os.PathLike) -> None:
    """Writes a config as YAML that :func:`load_config` reads back as what it was.

    References (``${...}``) and the order of the keys are kept: overrides reach what follows them,
    and parts are built, and drawn at random, in the same order. Classes, functions and other
    objects are written by name. One that has none, such as a lambda, is told in a warning, and is
    an error when the file is to be run.
    """
    _write_yaml(_plain(config), path)


def save_resolved(config: DictConfig, path: str | os.PathLike) -> None:
    """The same with the values of all references, to be read: overrides reach their key alone."""
    _write_yaml(_plain(config, resolve=True), path)


class Saved:
    """A saved config as data, of a run that anyone may have made: nothing in it is called.

    Args:
        content: dicts, lists and plain values, with references, ``${...}``; also an attribute.
    """

    def __init__(self, content: Mapping):
        self.content = content

    def section(self, key: str) -> dict[str, Any]:
        """The plain values of a section by their names; empty if there is no such section."""
        node = self._node(key.split("."))
        names = [name for name in node if isinstance(name, str)] if isinstance(node, dict) else []
        return {name: self.get(f"{key}.{name}") for name in names}

    def get(self, key: str) -> Any:
        """A plain value, with the values of what it refers to.

        None for a section or a list, for what is not there, and for a reference that leads
        nowhere, in a circle or to a resolver, such as ``${oc.env:HOME}``.
        """
        try:
            return self._value(key.split("."), [_MOST_REFERENCES])
        except LookupError:
            return None

    def _node(self, parts: Sequence[str]) -> Any:
        node: Any = self.content
        for part in parts:
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def _value(self, parts: list[str], left: list[int]) -> Any:
        value = self._node(parts)
        if isinstance(value, (dict, list)):
            raise LookupError(parts)
        if not (isinstance(value, str) and "${" in value):
            return value

        def referred(reference: re.Match) -> Any:
            left[0] -= 1
            dots, name = len(reference[1]), reference[2]
            # One dot is the section of the value itself, each further one the section around it.
            if left[0] < 0 or dots > len(parts):
                raise LookupError(parts)
            return self._value([*parts[: len(parts) - dots if dots else 0], *name.split(".")], left)

        whole = re.fullmatch(_REFERENCE, value)
        text = referred(whole) if whole else re.sub(_REFERENCE, lambda f: str(referred(f)), value)
        if isinstance(text, str) and ("${" in text or len(text) > _LONGEST_TEXT):
            raise LookupError(parts)
        return text


_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")
_MOST_REFERENCES, _LONGEST_TEXT = 100, 10_000
_MOST_BYTES = 2**19  # of a saved config


def read_saved(path: str | os.PathLike) -> Saved:
    """Reads a saved config as data; of what anyone may have made, unlike :func:`load_config`.

    Raises:
        OSError: it cannot be read, or is larger than a saved config can be.
        ConfigError: it is no YAML of a mapping, or grows when its aliases are followed.
    """

    try:
        text = read_bytes(path, _MOST_BYTES).decode("utf-8", "replace")
        content = parse_yaml(text, path, yaml.SafeLoader)
    except OSError:
        raise
    except Exception as error:  # YAML's own, and nearly anything on values of a wrong form
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} cannot be read as a saved config: {told}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no config: it holds no keys with values")
    return Saved(content)


def flatten(nested: Mapping, separator: str) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; what is no mapping, or an empty one, is a value."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        inner = flatten(value, separator) if isinstance(value, Mapping) and value else None
        joined = {f"{name}{separator}{key}": item for key, item in (inner or {}).items()}
        flat |= joined or {name: value}
    return flat


def by_number(value: Any) -> Any:
    """Lists of sections as sections, ``{"0": ...}``, such that what is in one has a key."""
    if isinstance(value, Mapping):
        return {key: by_number(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return {str(index): by_number(item) for index, item in enumerate(value)}
    return value


def require_sections(config: DictConfig, file: str | os.PathLike) -> None:
    """Raises a ConfigError for a config, of a file, that has not the sections of a run."""
    missing = [name for name in SECTIONS if not isinstance(config.get(name), DictConfig)]
    if missing:
        raise ConfigError(
            f"{file} is no config of a run: it lacks the sections {', '.join(missing)}, and has "
            f"{', '.join(map(str, config)) or 'nothing'}"
        )


def resolved(config: DictConfig) -> dict:
    """Dicts and lists with the values of all references.

    Raises:
        ConfigError: a reference leads nowhere; it says where.
    """
    try:
        return _plain(config, resolve=True)
    except OmegaConfBaseException as error:
        told = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key or 'the config'} cannot be resolved: {told}. A saved config knows no "
            "resolvers of one's own (name the config that it came from) and no key of other files"
        ) from error


def require_runnable(config: DictConfig) -> None:
    """Raises a ConfigError for a reference or a ``_target_`` that leads nowhere, and for a value
    that what it is given to does not take; it says where."""
    plain = resolved(config)
    for where, call in _calls(plain, ""):
        target = call["_target_"]
        if target == _NOT_SAVED:
            raise _not_saved_error(call["what"])
        if isinstance(target, str):
            try:
                found, why = locate(target), "it is not there"
            except ErrorDuringImport as error:
                found, why = None, str(error)
            if found is None:
                raise ConfigError(
                    f"{where}._target_ is {target!r}, which cannot be imported ({why}): is the "
                    "folder that it lies in on PYTHONPATH?"
                )
            target = found
        if not callable(target):
            raise ConfigError(f"{where}._target_ must name what is called, got {target!r:.200}")
        _check_call(where, target, call)


def build(config: DictConfig, key: str, **changes: Any) -> Any:
    """Makes what a section of a config describes, with ``changes`` of its values.

    Raises:
        ConfigError: what it calls cannot do with these values, which its own words then say.
    """
    section = OmegaConf.select(config, key)
    try:
        return instantiate({**section, **changes} if changes else section)
    except Exception as error:
        if explain(error) is not None:
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{key} of the config cannot be built ({told}); {TRACE}=1 shows where it comes from"
        ) from error


def _check_call(where: str, target: Any, call: Mapping[str, Any]) -> None:
    """Raises a ConfigError for a keyword that a call does not know, and for a value of a kind that
    an annotation of this package rules out."""
    names = [name for name in call if not name.startswith("_")]
    known = _parameters(target)
    if known and not _takes_any_keyword(target):
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"it has {known}"
                raise ConfigError(f"{where} has no parameter {name!r}; {hint}")
    if (getattr(target, "__module__", None) or "").partition(".")[0] != __package__:
        return  # others' annotations are no promises: (3, 3) works where an int is said
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations that need what is not there, or none
        return
    for name in names:
        value = call[name]
        if name in hints and not _may_be(value, hints[name]):
            kind = hints[name]
            told = kind.__name__ if inspect.isclass(kind) else str(kind).replace("typing.", "")
            shown = "null" if value is None else repr(value)[:200]
            raise ConfigError(f"{where}.{name} must be {told}, got {shown}")


def _takes_any_keyword(target: Any) -> bool:
    parameters = inspect.signature(target).parameters.values()
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def _may_be(value: Any, kind: Any) -> bool:
    """Whether a plain value can be meant where an annotation stands; what is made by a call, and
    annotations of anything but plain values, are not looked at."""
    if isinstance(value, dict) and "_target_" in value:
        return True
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_may_be(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if kind in (int, float):
        accepted = (int, float) if kind is float else int
        return isinstance(value, accepted) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is type(None):
        return value is None
    if kind in (list, tuple) or origin in (list, tuple, Sequence):
        each = [part for part in parts if part is not Ellipsis]
        return isinstance(value, (list, tuple)) and (
            not each or all(any(_may_be(item, part) for part in each) for item in value)
        )
    if kind is dict or origin in (dict, Mapping):
        return isinstance(value, dict)
    if inspect.isclass(kind) and issubclass(kind, nn.Module):
        return not isinstance(value, (bool, int, float, str, list, dict, type(None)))
    return True


def saved_object(*, recipe: Mapping) -> Any:
    """What a saved config calls in place of an object that YAML cannot hold.

    Args:
        recipe: ``function``, a dotted name, and its ``arguments`` and ``keywords``. In one mapping,
            which whoever builds configs hands on as it is: lists would be no tuples any more.
    """
    plain = _plain(recipe) if isinstance(recipe, DictConfig) else recipe
    made: Any = locate(plain["function"])
    if made is None:
        raise ConfigError(f"a saved config calls {plain['function']!r}, which cannot be imported")
    return made(*_restored(plain["arguments"]), **_restored(plain["keywords"]))


def not_saved(*, what: str) -> Any:
    """What a saved config calls in place of an object that has no name: an error."""
    raise _not_saved_error(what)


def _not_saved_error(what: str) -> ConfigError:
    return ConfigError(
        f"the saved config could not hold {what}: name the config file that it came from"
    )


_OBJECT, _CALL = "hydra.utils.get_object", f"{__name__}.{saved_object.__name__}"
_NOT_SAVED = f"{__name__}.{not_saved.__name__}"


def _plain(config: DictConfig | ListConfig, resolve: bool = False) -> Any:
    """Dicts and lists; dataclasses, which a config takes for a section, as they were."""
    mode = SCMode.INSTANTIATE
    return OmegaConf.to_container(config, resolve=resolve, structured_config_mode=mode)


def _calls(value: Any, where: str) -> Iterator[tuple[str, dict]]:
    """All calls below a value, with their keys."""
    if isinstance(value, dict) and "_target_" in value:
        yield where, value
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _calls(item, f"{where}.{key}".lstrip("."))


def _write_yaml(plain: Any, path: str | os.PathLike) -> None:
    text = yaml.safe_dump(
        _named(plain, ""), default_flow_style=None, allow_unicode=True, width=9999, sort_keys=False
    )
    write_text(path, text, errors="strict")


def _named(value: Any, where: str) -> Any:
    """What YAML holds in place of a value: an object becomes the call that makes it anew."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        named = {key: _named(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
        target = named.get("_target_")
        if isinstance(target, dict):  # a class or a function
            return (
                target if target["_target_"] == _NOT_SAVED else named | {"_target_": target["path"]}
            )
        return named
    if isinstance(value, list):
        return [_named(item, f"{where}.{index}") for index, item in enumerate(value)]
    if name := _name_of(value):
        return {"_target_": _OBJECT, "path": name}
    function, arguments, keywords = _recipe(value)
    if name := _name_of(function):
        parts = {"arguments": list(arguments), "keywords": dict(keywords)}
        return {"_target_": _CALL, "recipe": {"function": name, **_named(parts, where)}}
    logger.warning(f"A saved config cannot hold {where}, {value!r}: it has no name to import")
    return {"_target_": _NOT_SAVED, "what": f"{where}, {value!r}"}


def _recipe(value: Any) -> tuple[Any, Sequence, Mapping]:
    """What makes an object anew: a function, or None if none is known, and its arguments."""
    if isinstance(value, functools.partial):
        return functools.partial, (value.func, *value.args), value.keywords
    if type(value) is tuple:
        return tuple, (list(value),), {}
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return type(value), (), {name: getattr(value, name) for name in fields}
    try:
        function, arguments, *state = value.__reduce_ex__(2)
    except (TypeError, ValueError):
        return None, (), {}
    return (None if any(part is not None for part in state) else function), arguments, {}


def _name_of(value: Any) -> str | None:
    """The shortest dotted name that imports a class, a function or torch's types of numbers."""
    name = getattr(value, "__qualname__", None)
    module = getattr(value, "__module__", None) or type(value).__module__
    if name is None and str(value).startswith(f"{module}."):  # torch.float32
        name = str(value).removeprefix(f"{module}.")
    parts = module.split(".") if name else []
    for end in range(1, len(parts) + 1):
        if sys.modules.get(found := ".".join(parts[:end])) and locate(f"{found}.{name}") == value:
            return f"{found}.{name}"
    return None


def _restored(value: Any) -> Any:
    """Objects in place of the calls that :func:`_named` wrote; what cannot be imported stays."""
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    try:
        if value.get("_target_") == _OBJECT:
            return locate(value["path"]) or value
        if value.get("_target_") == _CALL:
            return saved_object(recipe=value["recipe"])
    except Exception:  # of a part of one's own; the config may be wanted to be read alone
        return value
    return {key: _restored(item) for key, item in value.items()}


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
        write_text(target, text)
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
        dotted = re.sub(r"\[(\d+)\]", r".\1", key)
        hint = f"; an item of a list is named by a dot: {dotted}" if dotted != key else ""
        raise ConfigError(f"override {override!r} is not of the form key=value{hint}")
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
    if old == "auto" and isinstance(value, bool):  # in whose place it stands
        return value
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
    if isinstance(old, bool) and new == "auto":
        return  # which flags take it is a matter of the settings
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


def build_part(name: str, part: Any, sizes: Mapping[str, Any]) -> nn.Module:
    """Calls a LazyCall, class or function with its options and with the sizes that it names."""
    target, options = part, {}
    if isinstance(part, Mapping):
        options = {key: instantiate(value) for key, value in part.items()}
        target = options.pop("_target_", None)
        target = get_object(target) if isinstance(target, str) else target
    if not callable(target) or isinstance(target, nn.Module):
        raise ValueError(
            f"model.decoder.parts.{name} must be L(MyPart)(option=1) in a config, a class or "
            "function in Python, or, on the command line, "
            f"+model.decoder.parts.{name}._target_=my_module.MyPart; got {part!r}"
        )
    parameters = inspect.signature(target).parameters.values()
    names = {parameter.name for parameter in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names |= set(sizes)
    if getattr(target, "__init__", None) is nn.Module.__init__:  # takes nothing, whatever it says
        names = set()
    wanted = {size: value for size, value in sizes.items() if size in names}
    made = target(**wanted | options)
    # A class or function that stood in a config is, once saved, a call that looks it up.
    factory = callable(made) and not isinstance(made, nn.Module)
    return build_part(name, made, sizes) if factory else made
