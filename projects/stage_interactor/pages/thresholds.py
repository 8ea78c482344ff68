"""Which score is enough for a detection: precision, recall and F1 over it, and the best F1."""

import os
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from ..config import read_saved
from .matching import best_of_each_box, match_images
from .run import read_ground_truth, read_predictions, usable_ones

FEWEST = 10  # objects of a class from which it has a threshold of its own


class Curve(NamedTuple):
    """What detections with at least a score are worth, for each score that there is."""

    scores: np.ndarray  # (K,), each once, the best first
    right: np.ndarray  # (K,) how many find an object
    found: np.ndarray  # (K,) how many there are
    objects: int  # that there are to find

    @classmethod
    def of(cls, scores: np.ndarray, right: np.ndarray, objects: int) -> "Curve":
        """Of detections (N,), by their scores and whether they find an object."""
        order = np.argsort(-scores, kind="stable")
        scores, right = scores[order], right[order]
        last = np.flatnonzero(scores != np.append(scores[1:], -1)[: len(scores)])
        return cls(scores[last], np.cumsum(right)[last], last + 1, objects)

    def at(self, threshold: float | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 from a score on; NaN is that of nothing."""
        index = np.searchsorted(-self.scores, -np.asarray(threshold), side="right")
        right = np.append(0, self.right)[index]
        found = np.append(0, self.found)[index]
        with np.errstate(invalid="ignore", divide="ignore"):
            f1 = 2 * right / (found + self.objects)
            return right / found, right / np.full(right.shape, self.objects), f1

    def best(self) -> float | None:
        """The threshold of the best F1, the highest of several; None if nothing is right.

        It lies in the middle between the last score that is kept and the next one, rounded as far
        as that does not matter.
        """
        if not self.right.any():
            return None
        last = int(np.argmax(2 * self.right / (self.found + self.objects)))
        most = float(self.scores[last])
        least = float(self.scores[last + 1]) if last + 1 < len(self.scores) else 0.0
        for digits in range(2, 8):
            value = round((least + most) / 2, digits)
            if least < np.float32(value) <= most:  # scores are compared in float32
                return value
        return most


class ClassThreshold(NamedTuple):
    """That of a class."""

    category_id: Any
    name: str
    curve: Curve
    threshold: float
    reason: str  # why it is that of all classes; empty for one of its own


class Thresholds(NamedTuple):
    """What :func:`choose_thresholds` has chosen."""

    curve: Curve  # of all classes together
    threshold: float
    classes: list[ClassThreshold]  # by their category ids

    def told(self) -> str:
        values = [item.threshold for item in self.classes]
        precision, recall, f1 = self.curve.at(self.threshold)
        return (
            f"{self.threshold:g} for all classes (precision {precision:.2f}, recall {recall:.2f}, "
            f"F1 {f1:.2f}), {min(values):g} to {max(values):g} by class"
        )


def choose_thresholds(ground_truth: Mapping, predictions: Iterable[Mapping]) -> Thresholds | None:
    """The score of each class from which on its detections have the best F1, at IoU 0.5.

    A class with fewer than 10 objects, or of which nothing is found rightly, has that of all
    classes together. Detections are those that a detector gives, one a box; crowds count neither
    way, see :func:`~stage_interactor.pages.matching.match_images`.

    Args:
        ground_truth: the content of a COCO file.
        predictions: of ``coco_instances_results.json``, that can be judged.

    Returns:
        None where there is nothing to choose by: fewer than 10 objects, or nothing found rightly.
    """
    matched = match_images(ground_truth, best_of_each_box(predictions), 0.0)
    empty = np.zeros(0)
    scores, classes, object_of, truth = (
        np.concatenate([empty, *parts])
        for parts in zip(
            *((r.scores, r.classes, r.object_of, r.object_classes) for r in matched), strict=True
        )
    ) if matched else (empty,) * 4  # fmt: skip
    overall = Curve.of(scores, object_of >= 0, len(truth))
    threshold = overall.best()
    if threshold is None or len(truth) < FEWEST:
        return None
    chosen = []
    for index, category in enumerate(sorted(ground_truth["categories"], key=itemgetter("id"))):
        of = classes == index
        curve = Curve.of(scores[of], object_of[of] >= 0, int((truth == index).sum()))
        own = curve.best()
        reason = ""
        if curve.objects < FEWEST:
            reason = f"fewer than {FEWEST} objects" if curve.objects else "no object"
        elif own is None:
            reason = "nothing found rightly"
        value = threshold if reason or own is None else own
        chosen.append(ClassThreshold(category["id"], category["name"], curve, value, reason))
    return Thresholds(overall, threshold, chosen)


def thresholds_of_run(
    output_dir: str | os.PathLike, allow_outside: bool = False
) -> Thresholds | None:
    """Those of a run's last evaluation; see :func:`choose_thresholds`.

    Raises:
        FileNotFoundError: there was no evaluation.
        OSError, ValueError, KeyError: it cannot be read.
    """
    path = os.path.join(output_dir, "coco_instances_results.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file, as an evaluation leaves it")
    config = read_saved(os.path.join(output_dir, "config_resolved.yaml"))
    content, _ = read_ground_truth(config, allow_outside)
    predictions, _ = read_predictions(path, content)
    return choose_thresholds(content, usable_ones(predictions)[0])
