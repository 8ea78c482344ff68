"""Average precision as figures of a page: of all, of classes and of sizes, by COCO's evaluation."""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO

from ..d2.embedded.scoring import evaluated

SIZES = {"small, < 32 x 32": 1, "medium": 2, "large, > 96 x 96": 3}  # places in what COCO gives
_LONGEST_NAME = 80  # of a class, in letters


class Precision(NamedTuple):
    """What COCO's evaluation has found."""

    names: list[str]  # of the classes, by their ids' order, short enough for charts
    objects: list[int]  # of each class, crowds apart
    values: np.ndarray  # IoU, recall, class, size, number of detections; -1 for none
    recalls: np.ndarray  # of the second axis

    def ap(self, index: Any = slice(None), *, iou: Any = slice(None), size: int = 0) -> float:
        """In per cent, of a class or of all; NaN where there is no object."""
        values = self.values[iou, :, index, size, -1]
        return float(100 * values[values > -1].mean()) if (values > -1).any() else math.nan


def precision_of(
    content: dict, predictions: Sequence[Mapping], limits: list[int]
) -> Precision | None:
    """Of detections in the images of a COCO file's content; None without any detection."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        if not predictions:
            return None
    evaluation = evaluated(truth, predictions, limits)
    ids = evaluation.params.catIds
    objects = [
        sum(not a.get("iscrowd", 0) for a in truth.loadAnns(truth.getAnnIds(catIds=[key])))
        for key in ids
    ]
    names = short_names([truth.cats[key]["name"] for key in ids])
    return Precision(names, objects, evaluation.eval["precision"], evaluation.params.recThrs)


def short_names(names: Sequence[str]) -> list[str]:
    """Short enough for charts, and still different ones."""
    return [
        name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}… ({index})"
        for index, name in enumerate(names)
    ]
