"""Numbers that are given from Python: NumPy's are taken as Python's, and others told."""

from typing import Any

import numpy as np


def whole(value: Any, name: str, least: int = 1) -> int:
    """A whole number, as Python's.

    Raises:
        ValueError: it is none, or too small; it is called ``name``.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least:
        return int(value)
    raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")


def number(value: Any) -> float | None:
    """As Python's, or None where it is no number."""
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return float(value) if np.isrealobj(value) else None
    return None
