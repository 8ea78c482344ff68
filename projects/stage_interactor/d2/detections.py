"""Which detections are any: those that a model which computes NaN or infinity gives are none."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UserError

THRESHOLD = 0.3  # least score of detections that are shown, where none was chosen


class UnusableDetectionsError(UserError, ValueError):
    """Detections that are NaN, infinite or of negative size: no picture is to be judged by them."""


def usable(boxes: Tensor, scores: Tensor) -> Tensor:
    """(N,) whether a box (N, 4), xyxy, has a finite size of at least 0, and its score is finite."""
    size = boxes[..., 2:] - boxes[..., :2]
    # Written so that a NaN, which no comparison is true of, is caught as well.
    return ((size >= 0) & (size < math.inf)).all(-1) & scores.isfinite()


def split_output(output: Any) -> tuple[Any, int]:
    """A model's output of an image without its unusable detections, and how many those were.

    Args:
        output: a dict with detectron2's ``instances``, and under ``num_undefined`` how many more
            there would be if their scores could be compared. Anything else is returned as it is.
    """
    instances = output.get("instances") if isinstance(output, Mapping) else None
    if instances is None or not (instances.has("pred_boxes") and instances.has("scores")):
        return output, 0
    kept = usable(instances.pred_boxes.tensor, instances.scores)
    count = int((~kept).sum()) + int(output.get("num_undefined", 0))
    if not count:
        return output, 0
    return {**output, "instances": instances[kept], "num_undefined": 0}, count


def one_of_each_box(boxes: np.ndarray) -> np.ndarray:
    """Indices, ascending, of the first of all boxes (N, 4) that are the same to the last bit.

    A detector scores each query for each class, so a query that wins two classes is there twice,
    with one box. What was exported says no more of which query it was. Two queries are as good as
    never at one box to the bit; if they are, one says what the other does.
    """
    _, first = np.unique(boxes.reshape(-1, 4), axis=0, return_index=True)
    return np.sort(first)
