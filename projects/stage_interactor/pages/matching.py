"""Which detections of an image are right, and what was missed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from ..modeling.geometry import box_area, intersection

IOU = 0.5
_MOST_PAIRS = 2**21  # of boxes whose overlaps are in memory at a time


class ImageResult(NamedTuple):
    """One image: its objects and detections, boxes xyxy in pixels, classes by index."""

    image_id: int
    file_name: str
    object_boxes: np.ndarray  # (M, 4)
    object_classes: np.ndarray  # (M,)
    boxes: np.ndarray  # (N, 4), best first
    classes: np.ndarray  # (N,)
    scores: np.ndarray  # (N,)
    object_of: np.ndarray  # (N,) the object that a detection finds, -1 for a false alarm

    @property
    def missed(self) -> np.ndarray:
        """(M,) whether nothing finds an object."""
        return ~np.isin(np.arange(len(self.object_boxes)), self.object_of)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 for an empty image without detections."""
        total = len(self.boxes) + len(self.object_boxes)
        return 2 * int((self.object_of >= 0).sum()) / total if total else 1.0


def best_of_each_box(predictions: Iterable[Mapping]) -> list[Mapping]:
    """Of detections of an image that have one box, of one query, the best; in their order.

    See :func:`stage_interactor.d2.detections.one_of_each_box`.
    """
    best: dict[tuple, Mapping] = {}
    for item in predictions:
        place = (item["image_id"], *item["bbox"])
        if place not in best or item["score"] > best[place]["score"]:
            best[place] = item
    return list(best.values())


def match_images(
    ground_truth: Mapping, predictions: Sequence[Mapping], threshold: float
) -> list[ImageResult]:
    """Greedily by score, an object of the same class with the largest IoU of at least 0.5.

    Args:
        ground_truth: the content of a COCO file. Crowds neither count nor are missed, nor do
            detections of their class that lie by half in them.
        predictions: of ``coco_instances_results.json``.
        threshold: detections with a lower score do not count.
    """
    categories = sorted(ground_truth["categories"], key=itemgetter("id"))
    index = {category["id"]: position for position, category in enumerate(categories)}
    objects: dict[Any, list] = defaultdict(list)
    crowds: dict[Any, list] = defaultdict(list)
    found: dict[Any, list] = defaultdict(list)
    for item in ground_truth["annotations"]:
        (crowds if item.get("iscrowd", 0) else objects)[item["image_id"]].append(item)
    for item in predictions:
        if item["score"] >= threshold:
            found[item["image_id"]].append(item)
    results = []
    for image in ground_truth["images"]:
        truth = objects[image["id"]]
        detected = sorted(found[image["id"]], key=lambda item: -item["score"])
        object_boxes, object_classes = _arrays(truth, index)
        boxes, classes = _arrays(detected, index)
        object_of = _match(boxes, object_boxes, (classes, object_classes))
        scores = np.array([item["score"] for item in detected])
        in_crowd = _in_crowd(boxes, classes, *_arrays(crowds[image["id"]], index))
        counts = (object_of >= 0) | ~in_crowd
        results.append(
            ImageResult(
                image["id"],
                image["file_name"],
                object_boxes,
                object_classes,
                boxes[counts],
                classes[counts],
                scores[counts],
                object_of[counts],
            )
        )
    return results


def confusion_matrix(results: Sequence[ImageResult], num_classes: int) -> np.ndarray:
    """(C + 1, C + 1) counts: rows are objects' classes, columns detections'; the last is nothing.

    Detections are matched to objects of whatever class here.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=int)
    for result in results:
        object_of = _match(result.boxes, result.object_boxes)
        for label, target in zip(result.classes, object_of):
            matrix[result.object_classes[target] if target >= 0 else num_classes, label] += 1
        missed = result.object_classes[result._replace(object_of=object_of).missed]
        matrix[:, num_classes] += np.bincount(missed, minlength=num_classes + 1)
    return matrix


def _match(
    boxes: np.ndarray,
    object_boxes: np.ndarray,
    classes: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """(N,) for each box, in order, the free object it overlaps most, or -1.

    With ``classes``, of boxes and objects, it must be of the same one.
    """
    object_of = np.full(len(boxes), -1)
    free = np.ones(len(object_boxes), dtype=bool)
    objects = torch.from_numpy(object_boxes)
    for rows in _rows(len(boxes), len(object_boxes)):
        iou = box_iou(torch.from_numpy(boxes[rows]), objects).numpy()
        allowed = iou >= IOU
        if classes is not None:
            allowed &= classes[0][rows, None] == classes[1]
        for row in np.flatnonzero(allowed.any(1)):
            those = np.flatnonzero(allowed[row] & free)
            if len(those):
                best = those[iou[row, those].argmax()]
                object_of[rows.start + row] = best
                free[best] = False
    return object_of


def _in_crowd(
    boxes: np.ndarray, classes: np.ndarray, crowd_boxes: np.ndarray, crowd_classes: np.ndarray
) -> np.ndarray:
    """(N,) whether half of a box or more lies in a crowd of its class."""
    found = np.zeros(len(boxes), dtype=bool)
    theirs = torch.from_numpy(crowd_boxes)
    for rows in _rows(len(boxes), len(crowd_boxes)):
        ours = torch.from_numpy(boxes[rows])
        shared = intersection(ours[:, None], theirs[None])
        inside = (shared >= IOU * box_area(ours)[:, None]).numpy()
        found[rows] = (inside & (classes[rows, None] == crowd_classes)).any(1)
    return found


def _rows(count: int, columns: int) -> Iterator[slice]:
    """So many rows at a time that tables of all pairs, with ``columns``, stay small."""
    step = max(_MOST_PAIRS // max(columns, 1), 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step) if columns)


def _arrays(items: Sequence[Mapping], index: Mapping) -> tuple[np.ndarray, np.ndarray]:
    boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float64).reshape(-1, 4)
    classes = np.array([index[item["category_id"]] for item in items], dtype=int)
    return box_convert(boxes, "xywh", "xyxy").numpy(), classes
