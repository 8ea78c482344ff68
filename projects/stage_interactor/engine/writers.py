"""Metrics as JSON lines, for tensorboard and, if wanted, for Weights & Biases and MLflow."""

import io
import json
import logging
import math
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from ..config import ConfigError
from ..d2.events import EventWriter, get_event_storage
from ..locking import keep_lock
from ..writing import AppendedFile, write_atomically

logger = logging.getLogger(__name__)

_SMOOTHED = 20  # iterations, as metrics.json


def finite_or_null(value: Any) -> Any:
    """For a JSON file, which has no NaN and no infinity: None in their place, at any depth."""
    if isinstance(value, Mapping):
        return {name: finite_or_null(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _EveryValueOnce(EventWriter):
    """Gives every value to :meth:`_log` once, smoothed as detectron2 smooths them.

    Args:
        first_iteration: values of earlier iterations were written before.
    """

    def __init__(self, first_iteration: int):
        self._last_write = first_iteration - 1

    def _log(self, scalars: dict[str, float], iteration: int) -> None:
        raise NotImplementedError

    def _append(self, file: AppendedFile, record: bytes) -> AppendedFile:
        """Begins the file anew where somebody has removed it."""
        if not file.is_there():
            keep_lock(os.path.dirname(file.path))
            logger.warning(f"{file.path} was removed while the run writes to it: begun anew")
            file.close()
            file = AppendedFile(file.path)
        file.append(record)
        return file

    def write(self) -> None:
        by_iteration: dict[int, dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(_SMOOTHED)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                by_iteration[iteration][name] = value
        for iteration, scalars in sorted(by_iteration.items()):
            self._last_write = iteration
            self._log(scalars, iteration)


class MetricsWriter(_EveryValueOnce):
    """``metrics.json``: the values of an iteration in a line, null for what is not finite.

    Args:
        path: of the file, which is appended to.
        first_iteration: of this training; lines of it and of later ones, which a run that was
            interrupted has left, are taken out.
    """

    def __init__(self, path: str, first_iteration: int):
        super().__init__(first_iteration)
        if os.path.isfile(path) and not os.path.islink(path):
            # A kill, or a disk at fault, may have left anything in the last line.
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = [line for line in file if _iteration_of(line) < first_iteration]
            write_atomically(path, lambda file: file.write("".join(lines).encode()))
        self._file = AppendedFile(path)

    def _log(self, scalars: dict[str, float], iteration: int) -> None:
        line = finite_or_null(scalars) | {"iteration": iteration}
        text = json.dumps(line, sort_keys=True, allow_nan=False)
        self._file = self._append(self._file, f"{text}\n".encode())

    def close(self) -> None:
        self._file.close()


class TensorboardWriter(_EveryValueOnce):
    """A file of events, begun with the first value.

    It is written here and now: PyTorch's writer leaves that to a thread, whose errors, of a full
    disk for example, the training does not get.

    Args:
        folder: of the file.
        first_iteration: of this training.
    """

    def __init__(self, folder: str, first_iteration: int = 0):
        super().__init__(first_iteration)
        self._folder = folder
        self._file: AppendedFile | None = None

    def _log(self, scalars: dict[str, float], iteration: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # slow to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        events = []
        if self._file is None:
            name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
            self._file = AppendedFile(os.path.join(self._folder, name))
            events = [Event(wall_time=now, file_version="brain.Event:2")]
        for name, value in scalars.items():
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            events.append(Event(wall_time=now, step=iteration, summary=summary))
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        self._file = self._append(self._file, records.getvalue())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _iteration_of(line: str) -> float:
    """Of a line of metrics; infinity for one that was cut off by a kill."""
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf
    return iteration if isinstance(iteration, (int, float)) else math.inf


class _ServiceWriter(_EveryValueOnce):
    """Scalars as ``metrics.json`` has them, and at the end the pictures of the detections.

    Args:
        output_dir: of the run.
        config: of the run, resolved, to be kept beside the metrics.
        first_iteration: of this training.
        **params: of the service, from the config.
    """

    package: str

    def __init__(
        self, output_dir: str, config: Mapping[str, Any], first_iteration: int = 0, **params: Any
    ):
        super().__init__(first_iteration)
        self._output_dir = output_dir
        self._lost = False
        try:
            self._start(dict(config), params)
        except ImportError as error:
            raise ConfigError(
                f"train.{self.package}.enabled=true needs: pip install {self.package}"
            ) from error
        except Exception as error:  # of a parameter, an address, a key, a connection
            told = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"train.{self.package} cannot be started ({told}): see its params, or do without, "
                f"train.{self.package}.enabled=false"
            ) from error

    def write(self) -> None:
        self._try(super().write)

    def close(self) -> None:
        self._try(self._end)

    def _try(self, call: Callable[[], None]) -> None:
        """A service that is away ends no training."""
        try:
            if not self._lost:
                call()
        except Exception as error:
            self._lost = True
            told = " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning(f"{self.package} gets no more of this run ({told}); metrics.json does")

    def _start(self, config: dict, params: dict) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    @property
    def _pictures(self) -> str | None:
        path = os.path.join(self._output_dir, "detections.jpg")
        return path if os.path.isfile(path) else None


class WandbWriter(_ServiceWriter):
    """Weights & Biases; ``params`` are those of ``wandb.init``."""

    package = "wandb"

    def _start(self, config: dict, params: dict) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(config=config, **{"dir": self._output_dir} | params)

    def _log(self, scalars: dict[str, float], iteration: int) -> None:
        self._run.log(scalars, step=iteration)

    def _end(self) -> None:
        if self._pictures:
            self._run.log({"detections": self._image(self._pictures)})
        self._run.finish()


class MlflowWriter(_ServiceWriter):
    """MLflow; ``params``: ``tracking_uri``, ``experiment_name``, ``run_name``."""

    package = "mlflow"

    def _start(self, config: dict, params: dict) -> None:
        import mlflow

        self._mlflow = mlflow
        if params.get("tracking_uri"):
            mlflow.set_tracking_uri(params["tracking_uri"])
        mlflow.set_experiment(params.get("experiment_name") or "stage_interactor")
        mlflow.start_run(run_name=params.get("run_name"))
        mlflow.log_dict(config, "config.yaml")

    def _log(self, scalars: dict[str, float], iteration: int) -> None:
        # What MLflow allows in a name; classes may be called anything.
        named = {re.sub(r"[^\w\-. /:]", "_", name): value for name, value in scalars.items()}
        self._mlflow.log_metrics(named, step=iteration)

    def _end(self) -> None:
        if self._pictures:
            self._mlflow.log_artifact(self._pictures)
        self._mlflow.end_run()


SERVICES = {writer.package: writer for writer in (WandbWriter, MlflowWriter)}
