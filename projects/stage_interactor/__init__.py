"""StageInteractor: a query-based object detector with cross-stage interaction (ICCV 2023)."""

import importlib
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import list_configs as list_configs
    from .config import load_config as get_config
    from .engine.training import train as train
    from .inference.detector import Detector as Detector

__version__ = "0.1.0"
__all__ = ["Detector", "get_config", "list_configs", "train"]

# Imported when they are asked for: they bring PyTorch along.
_PLACES = {
    "Detector": ("inference.detector", "Detector"),
    "get_config": ("config", "load_config"),
    "list_configs": ("config", "list_configs"),
    "train": ("engine.training", "train"),
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module, attribute = _PLACES[name]
        return getattr(importlib.import_module(f".{module}", __name__), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Moved(types.ModuleType):
    """A module under the name that it had before: what it held is looked up where it is now."""

    def __init__(self, name: str, place: str):
        super().__init__(name)
        self._place = place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        warnings.warn(f"{self.__name__} is {self._place} now", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(self._place), name)


for _old, _new in {
    "blueprint": "inference.blueprint",
    "cli": "commands",
    "data.quality": "data.check",
    "export": "inference.export",
    "predictor": "inference.detector",
    "released": "inference.released",
    "report": "pages.report",
    "stages": "pages.stages",
    "visualization": "pages.boxes",
}.items():
    _name = f"{__name__}.{_old}"
    sys.modules[_name] = _Moved(_name, f"{__name__}.{_new}")
    globals().setdefault(_old, sys.modules[_name])  # as import leaves it
