"""Stands in for ``detectron2.utils.events``.

Left out: ``CommonMetricPrinter``, ``JSONWriter``, ``TensorboardXWriter``, images and histograms,
name scopes.
"""

import itertools
from collections import defaultdict
from typing import SupportsFloat

from fvcore.common.history_buffer import HistoryBuffer

__all__ = [
    "EventStorage",
    "EventWriter",
    "get_event_storage",
]

_storages: list["EventStorage"] = []  # the innermost is the current one


def get_event_storage() -> "EventStorage":
    """The storage whose ``with`` block we are in.

    Raises:
        RuntimeError: outside of any.
    """
    if not _storages:
        raise RuntimeError("get_event_storage() works only inside `with EventStorage(...):`.")
    return _storages[-1]


class EventStorage:
    """The scalars of a run, with their history and the iteration of each value.

    Attributes:
        iter: the current iteration.
    """

    def __init__(self, start_iter: int = 0):
        self._history: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self.iter = start_iter

    def put_scalar(self, name: str, value: SupportsFloat, smoothing_hint: bool = True) -> None:
        """Add a value of the current iteration.

        Args:
            smoothing_hint: whether writers should show a median of the last values.

        Raises:
            ValueError: if the hint differs from that of earlier values.
        """
        if self._smoothing_hints.setdefault(name, smoothing_hint) != smoothing_hint:
            raise ValueError(
                f"Scalar {name!r} was put with smoothing_hint={not smoothing_hint} before and now "
                f"with {smoothing_hint}."
            )
        self._history[name].update(float(value), self.iter)
        self._latest[name] = (float(value), self.iter)

    def put_scalars(self, *, smoothing_hint: bool = True, **kwargs: SupportsFloat) -> None:
        """Add several values by name."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint)

    def history(self, name: str) -> HistoryBuffer:
        """All values of a scalar.

        Raises:
            KeyError: if it has none.
        """
        if name not in self._history:
            raise KeyError(f"No scalar {name!r} was put; there are {sorted(self._history)}.")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        return self._history

    def smoothing_hints(self) -> dict[str, bool]:
        """For every scalar whether writers should show a median."""
        return self._smoothing_hints

    def latest(self) -> dict[str, tuple[float, int]]:
        """The last value of every scalar and its iteration."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Like :meth:`latest`, with the median over ``window_size`` iterations where hinted."""
        return {
            name: (
                self._history[name].median(self.count_samples(name, window_size))
                if self._smoothing_hints[name]
                else value,
                iteration,
            )
            for name, (value, iteration) in self._latest.items()
        }

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """How many values a scalar has in the ``window_size`` iterations up to its last one."""
        values = self._history[name].values()
        oldest = values[-1][1] - window_size
        recent = itertools.takewhile(lambda value: value[1] > oldest, reversed(values))
        return len(list(recent))

    def __enter__(self) -> "EventStorage":
        _storages.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _storages.pop()


class EventWriter:
    """Reports the scalars of the current storage whenever :meth:`write` is called."""

    def write(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass
