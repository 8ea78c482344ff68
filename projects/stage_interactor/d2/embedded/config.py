"""Stands in for ``detectron2.config`` (its lazy configs: ``lazy`` and ``instantiate``).

Left out: yacs configs, dataclasses, ``LazyConfig.to_py``, and the pickle that detectron2 writes
when YAML cannot hold a config. YAML files are read with a safe loader: they can name objects, in
``_target_``, but not create them while loading.
"""

import builtins
import dataclasses
import logging
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from ...writing import write_text
from .paths import PathManager

__all__ = ["LazyCall", "LazyConfig", "instantiate"]

logger = logging.getLogger(__name__)


class LazyCall:
    """Describe a call instead of making it.

    ``LazyCall(nn.Conv2d)(in_channels=3, out_channels=8)`` is a DictConfig whose ``_target_`` is
    the class itself; edit its fields like attributes, then build it with :func:`instantiate`.

    Args:
        target: a callable, the dotted name of one, or a config that describes one.

    Raises:
        TypeError: if ``target`` is none of these.
    """

    def __init__(self, target: Callable | str | Mapping):
        if not (callable(target) or isinstance(target, (str, Mapping))):
            raise TypeError(
                f"LazyCall got {target!r} of type {type(target).__name__}; it takes a class, a "
                "function, or the dotted name of one."
            )
        # omegaconf would take a dataclass for the type of the config, so it is kept by name
        self._target = _dotted_name(target) if dataclasses.is_dataclass(target) else target

    def __call__(self, **kwargs: Any) -> DictConfig:
        return DictConfig(kwargs | {"_target_": self._target}, flags={"allow_objects": True})


def instantiate(cfg: Any) -> Any:
    """Build what a config describes, innermost calls first.

    Args:
        cfg: a mapping with ``_target_`` and keyword arguments, or a list of such. Anything else,
            also a mapping without ``_target_``, is returned as it is.

    Returns:
        What the target returns; for a ListConfig a ListConfig, for a list a list of the results.

    Raises:
        ImportError: if ``_target_`` names something that cannot be imported.
        TypeError: if ``_target_`` is not callable or does not take these arguments; the log then
            names the target.
    """
    if isinstance(cfg, ListConfig):
        return ListConfig([instantiate(item) for item in cfg], flags={"allow_objects": True})
    if isinstance(cfg, list):
        return [instantiate(item) for item in cfg]
    if not (isinstance(cfg, Mapping) and "_target_" in cfg):
        return cfg

    arguments = {key: instantiate(value) for key, value in cfg.items()}
    target = arguments.pop("_target_")
    if isinstance(target, str):
        target = get_object(target)
    if not callable(target):
        raise TypeError(f"_target_ is {target!r}, which cannot be called.")
    try:
        return target(**arguments)
    except TypeError:
        logger.error(
            "Error when instantiating %s with the arguments %s",
            _dotted_name(target) or repr(target),
            sorted(arguments),
        )
        raise


def _dotted_name(obj: Any) -> str | None:
    """The shortest dotted name that leads to a class or function, or None if none does.

    ``torch.nn.modules.conv.Conv2d`` becomes ``torch.nn.Conv2d``: it reads better, and a saved
    config outlives a move of the implementation.
    """
    module, qualname = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not module or not qualname:
        return None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        found = sys.modules.get(prefix)
        for name in qualname.split("."):
            found = getattr(found, name, None)
        if found is obj:
            return f"{prefix}.{qualname}"
    return None


def _as_config(value: Any) -> Any:
    return DictConfig(value, flags={"allow_objects": True}) if isinstance(value, dict) else value


def _run_config_file(filename: str) -> dict:
    """Execute a Python config file and return its namespace.

    The file gets an ``__import__`` of its own, so that its relative imports read other config files
    by their place on disk, without packages and without a cache: who edits an imported config
    does not change it for others. All other imports are ordinary ones.
    """

    def import_(
        name: str,
        globals: Mapping | None = None,
        locals: Mapping | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> types.ModuleType:
        if level == 0:
            return builtins.__import__(name, globals, locals, fromlist, level)
        imported = _find_relative(filename, name, level)
        module = types.ModuleType(Path(imported).stem)
        module.__dict__.update(_run_config_file(imported))
        for key in fromlist:
            if key not in module.__dict__:
                raise ImportError(
                    f"Config file {filename} imports {key!r} from {imported}, which does not "
                    "define it. Import the names of its configs one by one."
                )
            module.__dict__[key] = _as_config(module.__dict__[key])
        return module

    with PathManager.open(filename) as file:
        source = file.read()
    try:
        code = compile(source, filename, "exec")
    except SyntaxError as error:
        raise SyntaxError(f"Config file {filename} has a syntax error: {error}") from error
    namespace = {
        "__name__": f"config_file.{Path(filename).stem}",
        "__file__": filename,
        "__builtins__": vars(builtins) | {"__import__": import_},
    }
    exec(code, namespace)
    return namespace


def _find_relative(importer: str, name: str, level: int) -> str:
    folder = os.path.join(os.path.dirname(importer), *[os.pardir] * (level - 1))
    path = os.path.normpath(os.path.join(folder, *name.split(".")))
    if PathManager.isfile(path + ".py"):
        return path + ".py"
    if not name or PathManager.isdir(path):
        raise ImportError(
            f"Config file {importer} imports the folder {path}. A relative import "
            "in a config file can only name another config file."
        )
    raise ImportError(
        f"Config file {importer} imports {'.' * level}{name}, but {path}.py does not exist."
    )


class LazyConfig:
    """Load, save and override configs."""

    @staticmethod
    def load(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """Load a ``.py``, ``.yaml`` or ``.yml`` config file.

        Args:
            filename: path, relative to the working directory.
            keys: the name or names to return. Without, all configs of the file: for Python every
                dict or list config at its top level whose name does not start with ``_``.

        Returns:
            One config for a single key or for none, a tuple for several keys.

        Raises:
            ValueError: for another file type, or YAML that asks to create Python objects.
        """
        suffix = os.path.splitext(filename)[1]
        if suffix == ".py":
            loaded: Any = _run_config_file(filename.replace("/./", "/"))
        elif suffix in (".yaml", ".yml"):
            with PathManager.open(filename) as file:
                try:
                    content = yaml.safe_load(file)
                except yaml.constructor.ConstructorError as error:
                    raise ValueError(
                        f"Config file {filename} contains a tag that creates Python objects while "
                        f"loading, which is refused: {error}. Name the object in _target_ instead."
                    ) from error
            loaded = OmegaConf.create(content, flags={"allow_objects": True})
        else:
            raise ValueError(
                f"Config file {filename!r} must end in .py, .yaml or .yml, not in {suffix!r}."
            )

        if isinstance(keys, str):
            return _as_config(loaded[keys])
        if keys is not None:
            return tuple(_as_config(loaded[key]) for key in keys)
        if suffix != ".py":
            return loaded
        configs = {
            name: _as_config(value)
            for name, value in loaded.items()
            if isinstance(value, (DictConfig, ListConfig, dict)) and not name.startswith("_")
        }
        return DictConfig(configs, flags={"allow_objects": True})

    @staticmethod
    def load_rel(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        """Like :meth:`load`, with a path relative to the file that calls this."""
        caller = sys._getframe(1).f_code.co_filename
        return LazyConfig.load(os.path.join(os.path.dirname(caller), filename), keys)

    @staticmethod
    def save(cfg: DictConfig | ListConfig, filename: str) -> None:
        """Write a config as YAML that :meth:`load` and :func:`instantiate` can use.

        Classes and functions are written by name: as a string in ``_target_``, elsewhere as a call
        that looks the object up. Other objects are written as text, with a warning that names them.
        Interpolations are kept, not resolved.
        """
        plain = _plain(OmegaConf.to_container(cfg, resolve=False), "config")
        options: dict[str, Any] = dict(default_flow_style=None, allow_unicode=True, width=9999)
        write_text(filename, yaml.safe_dump(plain, **options))

    @staticmethod
    def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
        """Change a config in place by strings in hydra's grammar: ``a.b=1``, ``+c=[1,2]``.

        Returns:
            The same config.

        Raises:
            KeyError: if a key goes through something that is not a config.
            NotImplementedError: for the deletion ``~key``.
        """
        for override in OverridesParser.create().parse_overrides(overrides):
            key = override.key_or_group
            if override.is_delete():
                raise NotImplementedError(f"Override ~{key}: deleting keys is not supported.")
            parts = key.split(".")
            for end in range(1, len(parts)):
                prefix = ".".join(parts[:end])
                parent = OmegaConf.select(cfg, prefix, default=None)
                if parent is None:
                    break  # the rest of the path is created
                if not OmegaConf.is_config(parent):
                    raise KeyError(
                        f"Override {key}: {prefix} is not a config but {parent!r} "
                        f"of type {type(parent).__name__}."
                    )
            OmegaConf.update(cfg, key, override.value(), merge=True)
        return cfg


def _plain(value: Any, where: str) -> Any:
    """Reduce a container to what YAML holds without Python tags; ``where`` is for the warning."""
    if isinstance(value, dict):
        plain = {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
        target = value.get("_target_")
        if callable(target) and _dotted_name(target):
            plain["_target_"] = _dotted_name(target)
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    name = _dotted_name(value) if callable(value) else None
    if name is not None:
        return {"_target_": "hydra.utils.get_object", "path": name}
    logger.warning(
        "%s is %r, which has no importable name. The saved config shows it as text and cannot be "
        "instantiated.",
        where,
        value,
    )
    return repr(value)
