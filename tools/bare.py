"""Imported first: lets stage_interactor be imported on a machine without timm.

For checks and timings on borrowed machines; no network of timm can be built there.
"""

import sys
import types
from importlib.util import find_spec


class _Missing(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


if find_spec("timm") is None:
    for name in (
        "timm", "timm.layers", "timm.layers.pos_embed_sincos", "timm.models",
        "timm.models._features", "timm.models.swin_transformer",
    ):  # fmt: skip
        sys.modules[name] = _Missing(name)
