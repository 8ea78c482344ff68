"""Metrics for Weights & Biases and for MLflow: off unless the config says so."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..config import ConfigError
from ..d2.events import EventWriter, get_event_storage

_SMOOTHED = 20  # iterations, as metrics.json


class _ServiceWriter(EventWriter):
    """Scalars as ``metrics.json`` has them, and at the end the pictures of the detections.

    Args:
        output_dir: of the run.
        config: of the run, resolved, to be kept beside the metrics.
        **params: of the service, from the config.
    """

    package: str

    def __init__(self, output_dir: str, config: Mapping[str, Any], **params: Any):
        self._output_dir = output_dir
        self._last_write = -1
        try:
            self._start(dict(config), params)
        except ImportError as error:
            raise ConfigError(
                f"train.{self.package}.enabled=true needs: pip install {self.package}"
            ) from error

    def _start(self, config: dict, params: dict) -> None:
        raise NotImplementedError

    def _log(self, scalars: dict[str, float], iteration: int) -> None:
        raise NotImplementedError

    def write(self) -> None:
        by_iteration: dict[int, dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(_SMOOTHED)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                by_iteration[iteration][name] = value
        for iteration, scalars in sorted(by_iteration.items()):
            self._last_write = iteration
            self._log(scalars, iteration)

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

    def close(self) -> None:
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

    def close(self) -> None:
        if self._pictures:
            self._mlflow.log_artifact(self._pictures)
        self._mlflow.end_run()


SERVICES = {writer.package: writer for writer in (WandbWriter, MlflowWriter)}
