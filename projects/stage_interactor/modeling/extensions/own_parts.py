"""Parts of a decoder of one's own, or of those that are ready."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def build_part(name: str, part: Any, sizes: Mapping[str, Any]) -> nn.Module:
    """Calls a LazyCall, class or function with its options and with the sizes that it names."""
    target, options = part, {}
    if isinstance(part, Mapping):
        # The ready-made parts do without what reads configs.
        from hydra.utils import get_object

        from ...d2.config import instantiate

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
