"""Stands in for ``detectron2.utils.events``.

Left out: images and histograms for tensorboard, name scopes.
"""

import datetime
import json
import logging
import os
import time
from collections import defaultdict
from functools import cached_property

import torch
from fvcore.common.history_buffer import HistoryBuffer

from .paths import PathManager

_storages = []  # the innermost is the current one


def get_event_storage() -> "EventStorage":
    """The storage whose ``with`` block we are in.

    Raises:
        RuntimeError: outside of any.
    """
    if not _storages:
        raise RuntimeError("get_event_storage() works only inside `with EventStorage(...):`.")
    return _storages[-1]


class EventStorage:
    """The scalars of a run, with their history and the iteration of each value."""

    def __init__(self, start_iter: int = 0):
        self._history = defaultdict(HistoryBuffer)
        self._smoothing_hints = {}
        self._latest = {}
        self._iter = start_iter

    def put_scalar(self, name: str, value, smoothing_hint: bool = True, cur_iter=None) -> None:
        """Add a value.

        Args:
            smoothing_hint: whether writers should show a median of the last values.
            cur_iter: its iteration, by default the current one.

        Raises:
            ValueError: if the hint differs from that of earlier values.
        """
        value = float(value)
        cur_iter = self._iter if cur_iter is None else cur_iter
        if self._smoothing_hints.setdefault(name, smoothing_hint) != smoothing_hint:
            raise ValueError(
                f"Scalar {name!r} was put with smoothing_hint={not smoothing_hint} before and now "
                f"with {smoothing_hint}."
            )
        self._history[name].update(value, cur_iter)
        self._latest[name] = (value, cur_iter)

    def put_scalars(self, *, smoothing_hint: bool = True, cur_iter=None, **kwargs) -> None:
        """Add several values by name."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

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
        count = 0
        for _, iteration in reversed(values):
            if iteration <= oldest:
                break
            count += 1
        return count

    def smoothing_hints(self) -> dict[str, bool]:
        return self._smoothing_hints

    @property
    def iter(self) -> int:
        """The current iteration."""
        return self._iter

    @iter.setter
    def iter(self, value: int) -> None:
        self._iter = int(value)

    def __enter__(self) -> "EventStorage":
        _storages.append(self)
        return self

    def __exit__(self, *exception) -> None:
        _storages.pop()


class EventWriter:
    """Reports the scalars of the current storage whenever :meth:`write` is called."""

    def write(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class JSONWriter(EventWriter):
    """Append one JSON object per iteration to a file; each value is written once.

    Args:
        window_size: iterations over which scalars are smoothed by the median.
    """

    def __init__(self, json_file: str, window_size: int = 20):
        self._file = PathManager.open(json_file, "a")
        self._window_size = window_size
        self._last_write = -1

    def write(self) -> None:
        lines = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                lines[iteration][name] = value
        for iteration, scalars in lines.items():
            line = json.dumps(scalars | {"iteration": iteration}, sort_keys=True)
            self._file.write(line + "\n")
        self._last_write = max(lines, default=self._last_write)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorboardXWriter(EventWriter):
    """Write scalars for tensorboard; each value is written once.

    Args:
        log_dir: folder of the event file.
        window_size: iterations over which scalars are smoothed by the median.
        **kwargs: for torch's SummaryWriter.
    """

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs):
        self._window_size = window_size
        self._arguments = {"log_dir": log_dir} | kwargs
        self._last_write = -1

    @cached_property
    def _writer(self):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and often not needed

        return SummaryWriter(**self._arguments)

    def write(self) -> None:
        newest = self._last_write
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                self._writer.add_scalar(name, value, iteration)
                newest = max(newest, iteration)
        self._last_write = newest

    def close(self) -> None:
        if "_writer" in self.__dict__:  # created by the first write
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Log one line: time left, losses, times, learning rate, memory.

    Args:
        max_iter: length of the training, needed for the time left.
        window_size: iterations over which losses are smoothed by the median.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20):
        self.logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write = None  # (iteration, time), to estimate the speed without a timer

    def _eta(self, storage: EventStorage) -> str | None:
        if self._max_iter is None:
            return None
        left = self._max_iter - storage.iter - 1
        if "time" in storage.histories():
            seconds = storage.history("time").median(1000) * left
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            return str(datetime.timedelta(seconds=int(seconds)))
        last, self._last_write = self._last_write, (storage.iter, time.perf_counter())
        if last is None or last[0] == storage.iter:
            return None
        per_iter = (self._last_write[1] - last[1]) / (storage.iter - last[0])
        return str(datetime.timedelta(seconds=int(per_iter * left)))

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return  # the training is over; there is no progress to report
        eta = self._eta(storage)
        histories = storage.histories()
        parts = [f"eta: {eta}"] if eta else []
        parts.append(f"iter: {storage.iter}")
        for kind in ("loss", "[metric]"):
            for name, history in histories.items():
                if kind in name:
                    smoothed = history.median(storage.count_samples(name, self._window_size))
                    parts.append(f"{name}: {smoothed:.4g}")
        if "time" in histories:
            history = histories["time"]
            parts.append(f"time: {history.global_avg():.4f}  last_time: {history.latest():.4f}")
        if "data_time" in histories:
            history = histories["data_time"]
            average = history.avg(storage.count_samples("data_time", self._window_size))
            parts.append(f"data_time: {average:.4f}  last_data_time: {history.latest():.4f}")
        lr = f"{histories['lr'].latest():.5g}" if "lr" in histories else "N/A"
        parts.append(f"lr: {lr}")
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 1024**2:.0f}M")
        self.logger.info("  ".join(parts))
