"""Which of a picture's detections are given: one rule for pictures, files and all models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torchvision.ops import batched_nms, nms

from ..d2.detections import THRESHOLD, one_of_each_box
from .values import number, whole

Threshold = float | Mapping[str, float] | Mapping[str | None, float] | None


@dataclass(frozen=True)
class Selection:
    """What is kept, in this order: by score, one box a query, NMS, classes, the best so many.

    Classes come late: those that are asked for are found as they are among all of them.
    """

    thresholds: np.ndarray  # (C,) least score, by class index
    multi_label: bool = False
    nms: float | None = None
    agnostic: bool = False
    classes: frozenset[int] | None = None  # by class index; None for all
    max_detections: int | None = None

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        chosen: Sequence[float] | None = None,
        threshold: Threshold = None,
        *,
        classes: Sequence[str] | str | None = None,
        multi_label: bool = False,
        nms: float | None = None,
        agnostic: bool = False,
        max_detections: int | None = None,
    ) -> "Selection":
        """
        Args:
            names: of the detector's classes, by their index.
            chosen: least scores of the classes, where nothing else is said; 0.3 by default.
            threshold: one for all classes, or for some of them by name, and under None for all
                others. What nothing is said of is what was chosen.
            classes: names of those to keep, also where they are numbers, such as "7".
            multi_label: a query that wins several classes gives a box for each, not for the best.
            nms: of boxes of a class that overlap with more than this IoU the best is kept.
            agnostic: whatever the class.
            max_detections: the best so many of a picture.

        Raises:
            ValueError: a value is out of its range, or a class unknown.
        """
        if nms is None and agnostic:
            raise ValueError("agnostic (--agnostic) is a way of NMS: give its IoU, nms (--nms)")
        if nms is not None:
            iou = number(nms)
            if iou is None or not 0 < iou <= 1:
                raise ValueError(
                    f"nms (--nms) must be an IoU, more than 0 and at most 1, got {nms!r}"
                )
            nms = iou
        if max_detections is not None:
            max_detections = whole(max_detections, "max_detections (--max-detections)")
        kept = None if classes is None else _indices(classes, names)
        thresholds = _thresholds(names, chosen, threshold)
        return cls(thresholds, multi_label, nms, agnostic, kept, max_detections)

    def __call__(self, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Indices of the detections that are kept, best first.

        Args:
            boxes: (N, 4), xyxy in pixels.
            scores, classes: (N,) of them, classes by their index.
        """
        kept = np.argsort(-scores, kind="stable")
        kept = kept[scores[kept] >= self.thresholds.astype(scores.dtype)[classes[kept]]]
        if not self.multi_label:
            kept = kept[one_of_each_box(boxes[kept])]
        if self.nms is not None:
            # In double precision: NMS of all classes at once moves them far apart.
            corners, of = (torch.from_numpy(values[kept]).double() for values in (boxes, scores))
            if self.agnostic:
                found = nms(corners, of, self.nms)
            else:
                found = batched_nms(corners, of, torch.from_numpy(classes[kept]), self.nms)
            kept = kept[np.sort(found.numpy())]
        if self.classes is not None:
            kept = kept[np.isin(classes[kept], list(self.classes))]
        return kept[: self.max_detections]

    def everything(self) -> "Selection":
        """All that a model gives, from which others may select."""
        return type(self)(np.zeros_like(self.thresholds), multi_label=True)

    def lowered(self, score: float) -> "Selection":
        """The same, down to a lower score."""
        return replace(self, thresholds=np.minimum(self.thresholds, score))


def _thresholds(
    names: Sequence[str], chosen: Sequence[float] | None, threshold: Threshold
) -> np.ndarray:
    """(C,) by class index."""
    found = np.full(len(names), THRESHOLD) if chosen is None else np.array(chosen, dtype=float)
    if threshold is None:
        return found
    if not isinstance(threshold, Mapping):
        return np.full(len(names), _score(threshold, ""))
    given: dict[Any, Any] = dict(threshold)
    if None in given:
        found[:] = _score(given.pop(None), "")
    given = {str(name): value for name, value in given.items()}
    for name, index in zip(given, _in_order([*given], names)):
        found[index] = _score(given[name], f" of {name!r}")
    return found


def _score(value: Any, whose: str) -> float:
    score = number(value)
    if score is None or not 0 <= score <= 1:
        raise ValueError(f"threshold{whose} must be a number from 0 to 1, got {value!r}")
    return score


def _indices(classes: Sequence[str] | str, known: Sequence[str]) -> frozenset[int]:
    names = [classes] if isinstance(classes, str) else [str(name) for name in classes]
    if not names:
        raise ValueError("classes is empty, so that nothing would be found: None takes all of them")
    return frozenset(_in_order(names, known))


def _in_order(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """The class index of each name."""
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(
            f"classes {unknown}: the detector knows {list(known)}; they are chosen by name, not by "
            "index"
        )
    if repeated := sorted({name for name in names if known.count(name) > 1}):
        raise ValueError(f"classes {repeated}: several classes of the detector are called so")
    return [known.index(name) for name in names]
