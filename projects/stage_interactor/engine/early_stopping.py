"""Ends a run whose evaluations have ceased to become better."""

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

SIGNS = {"max": 1, "min": -1}  # of what is better, by the mode of a metric


def sign_of(metric: str, mode: str | None = None) -> int:
    """1 where larger values of a metric are better, -1 where smaller ones are, as those of losses.

    Args:
        mode: ``"max"`` or ``"min"`` says so itself.
    """
    name = metric.rpartition("/")[2]
    # "AP-loss" is of a class that is called so.
    is_loss = name.startswith("loss") or name.endswith("loss") and not name.startswith("AP-")
    return SIGNS[mode or ("min" if is_loss else "max")]


class Waiting(NamedTuple):
    """What a run knows of the evaluations that it has had; in its checkpoints.

    Attributes:
        metric: that was looked at.
        value: the best one that counts, None before the first one.
        evaluations: since then, without a better one.
    """

    metric: str
    value: float | None = None
    evaluations: int = 0


class EarlyStopping:
    """Says after an evaluation whether the run ends.

    Args:
        patience: so many evaluations one after the other without a better one end it; None: none.
        metric: such as ``"bbox/AP"``.
        mode: whether ``"max"`` or ``"min"`` is best; None: by its name, see :func:`sign_of`.
        min_delta: only what is better by more than this counts.
    """

    def __init__(
        self,
        patience: int | None = None,
        metric: str = "bbox/AP",
        mode: str | None = None,
        min_delta: float = 0.0,
    ):
        self.patience = patience
        self.metric = metric
        self._sign = sign_of(metric, mode)
        self._min_delta = min_delta

    def after(self, waiting: Waiting | None, scalars: Mapping[str, float]) -> Waiting:
        """What is known after an evaluation, from what was known before and its metrics."""
        if waiting is None or waiting.metric != self.metric:
            waiting = Waiting(self.metric)
        value, best = scalars.get(self.metric, math.nan), waiting.value
        if self.patience and self.metric not in scalars:
            logger.warning(
                f"There is no metric {self.metric} to stop by (train.early_stopping.metric), only "
                f"{sorted(scalars)}"
            )
        if math.isfinite(value) and (best is None or self._sign * (value - best) > self._min_delta):
            return Waiting(self.metric, value)
        return waiting._replace(evaluations=waiting.evaluations + 1)

    def ends(self, waiting: Waiting | None) -> bool:
        """Whether there is nothing more to wait for."""
        if self.patience is None or waiting is None or waiting.metric != self.metric:
            return False
        return waiting.evaluations >= self.patience

    def told(self, waiting: Waiting | None) -> str:
        """Why, in words, where it ends."""
        assert waiting is not None
        keys = f"train.early_stopping.patience={self.patience}"
        if waiting.value is None:
            reason = "has had no finite value, as where there is nothing to measure it by,"
        else:
            reason = f"has not become better than {waiting.value:.5f}"
            if self._min_delta:
                reason += f" by more than {self._min_delta:g}"
                keys += f" train.early_stopping.min_delta={self._min_delta:g}"
        return f"{self.metric} {reason} in {waiting.evaluations} evaluations ({keys})"


class StoppedEarly(BaseException):
    """Leaves the loop of a training, which nothing else can; no error."""


def waiting_of(state: Any) -> Waiting | None:
    """Of a checkpoint.

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    if state is None:
        return None
    metric, value, evaluations = state
    return Waiting(str(metric), None if value is None else float(value), int(evaluations))
