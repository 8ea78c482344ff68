"""What the arguments of augmentations may be."""

import math
import sys
from collections.abc import Sequence
from typing import Any


def require_number(owner: object, name: str, least: float, most: float = math.inf) -> None:
    """Of an attribute: finite, from ``least`` to ``most``.

    Raises:
        ValueError: it is not.
    """
    value = getattr(owner, name)
    if not _is_number(value) or not least <= value <= most:
        limit = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of {least:g} or more"
        raise _error(owner, name, f"a number {limit}")


def require_range(owner: object, name: str, least: float, most: float = math.inf) -> None:
    """Of an attribute: (min, max), both from ``least`` to ``most``.

    Raises:
        ValueError: it is not.
    """
    value = getattr(owner, name)
    pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not pair or not all(map(_is_number, value)) or not least <= value[0] <= value[1] <= most:
        limit = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of {least:g} or more"
        raise _error(owner, name, f"(min, max), numbers {limit}")


def _is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and abs(value) <= sys.float_info.max  # of what an integer can be, too


def _error(owner: object, name: str, allowed: str) -> ValueError:
    return ValueError(
        f"{type(owner).__name__}: {name} must be {allowed}, got {getattr(owner, name)!r}"
    )
