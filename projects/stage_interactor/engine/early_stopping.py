"""Ends a run whose evaluations have ceased to become better."""

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

SIGNS = {"max": 1, "min": -1}  # of what is better, by the mode of a metric


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
        mode: whether ``"max"`` or ``"min"`` is best.
        min_delta: only what is better by more than this counts.
    """

    def __init__(
        self,
        patience: int | None = None,
        metric: str = "bbox/AP",
        mode: str = "max",
        min_delta: float = 0.0,
    ):
        self.patience = patience
        self.metric = metric
        self._sign = SIGNS[mode]
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
        best = "no value" if waiting.value is None else f"{waiting.value:.5f}"
        return (
            f"{self.metric} has not become better than {best} in {waiting.evaluations} evaluations "
            f"(train.early_stopping.patience={self.patience})"
        )


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
