"""Other metrics of boxes than COCO's, of data in COCO's format, whichever the runtime: Pascal
VOC's and LVIS's, under detectron2's names. They leave the same files as COCO's evaluator does."""

import contextlib
import io
import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..writing import write_text
from .comm import all_gather, is_main_process
from .screening import COCOEvaluator

logger = logging.getLogger(__name__)

FREQUENCIES = ("r", "c", "f")  # LVIS's classes: rare, common, frequent
FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")  # of LVIS's images

_THRESHOLDS = np.arange(50, 100, 5)  # percent of IoU


class BoxEvaluator(COCOEvaluator):
    """What the evaluators below have in common: detections collected and written as COCO's are,
    and scored by another metric.

    Raises:
        ValueError: as COCO's, and for data that lack what the metric needs.
    """

    def __init__(self, dataset_name: str, *args: Any, **options: Any):
        super().__init__(dataset_name, *args, **{**options, "use_fast_impl": False})
        if self._metadata.get("json_file") is None or "annotations" not in self.ground_truth:
            raise ValueError(f"data set {dataset_name!r} has no annotations to evaluate on")
        self._all_processes = getattr(self, "_distributed", True)

    def metrics(self, results: list[dict]) -> dict[str, float]:
        """In percent, NaN where there is nothing to find.

        Args:
            results: detections in COCO's format.
        """
        raise NotImplementedError

    def evaluate(self, *args: Any, **kwargs: Any) -> dict:
        self._screen.report()
        self._require_distinct_names()
        predictions = self._predictions
        if self._all_processes:
            predictions = list(itertools.chain.from_iterable(all_gather(predictions)))
            if not is_main_process():
                return {}
        ids = self.category_ids
        results = [
            {**item, "category_id": ids[item["category_id"]]}
            for prediction in predictions
            for item in prediction["instances"]
        ]
        if path := self.results_file:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_text(path, json.dumps(results))
        scores = self.metrics(results)
        main = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if "-" not in name)
        logger.info(f"Evaluation results for bbox: {main}")
        return {"bbox": scores}


class PascalVOCDetectionEvaluator(BoxEvaluator):
    """Pascal VOC's average precision, as its development kit computes it; AP50 is VOC's metric.

    A detection belongs to the object of its class that it overlaps most, and is right from an IoU
    of 0.5 on if no better one has found that object. Difficult objects count neither way: these are
    the crowds of a COCO file, which what reads VOC's makes of them. Pixels are inclusive there: a
    box from 1 to 10 is 10 wide, as reading VOC has made it. AP is the area below the precision that
    does not rise; ``use_07_metric`` takes the mean at 11 recalls, as VOC 2007 does.

    detectron2's has the same names and metrics; it reads VOC's own folders, rounds boxes to a tenth
    of a pixel and scores to a thousandth, and counts an IoU of exactly 0.5 as wrong.

    Args:
        dataset_name, distributed, output_dir, unusable_detections: see :class:`COCOEvaluator`.
        use_07_metric: None takes it for a data set whose metadata say that its ``year`` is 2007.
        max_dets_per_image: how many of the best detections of a class count in an image; None is
            all of them, as in VOC.

    Returns:
        of ``evaluate``: ``{"bbox": {"AP": mean over IoU 0.5 to 0.95, "AP50", "AP75",
        "AP50-<class>": ...}}``, in percent.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Any = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        use_07_metric: bool | None = None,
        max_dets_per_image: int | None = None,
        **options: Any,
    ):
        if use_07_metric not in (None, True, False):
            raise ValueError(f"use_07_metric must be true, false or null, got {use_07_metric!r}")
        limit = max_dets_per_image
        super().__init__(
            dataset_name, tasks, distributed, output_dir, max_dets_per_image=limit, **options
        )
        self._limit = limit
        is_2007 = self._metadata.get("year") == 2007
        self.use_07_metric = is_2007 if use_07_metric is None else use_07_metric

    @property
    def most_counted(self) -> int | None:
        return self._limit

    @staticmethod
    def metric_names(class_names: Sequence[str]) -> list[str]:
        return ["AP", "AP50", "AP75", *(f"AP50-{name}" for name in class_names)]

    def metrics(self, results: list[dict]) -> dict[str, float]:
        truth = self.ground_truth
        names = {category["id"]: category["name"] for category in truth["categories"]}
        objects: dict[Any, list] = defaultdict(list)
        for item in truth["annotations"]:
            objects[item["category_id"]].append(item)
        found: dict[Any, list] = defaultdict(list)
        for item in results:
            found[item["category_id"]].append(item)
        aps = np.array(
            [
                voc_average_precision(objects[key], found[key], self.use_07_metric, self._limit)
                for key in self.category_ids
            ]
        )  # (classes, IoU thresholds)
        means = [_mean(column) for column in aps.T]
        scores = {"AP": _mean(np.array(means)), "AP50": means[0], "AP75": means[5]}
        per_class = zip(self.category_ids, aps[:, 0])
        return scores | {f"AP50-{names[key]}": float(value) for key, value in per_class}


def voc_average_precision(
    objects: Sequence[Mapping],
    found: Sequence[Mapping],
    use_07_metric: bool = False,
    limit: int | None = None,
) -> np.ndarray:
    """AP of a class in percent, (10,), at the IoUs 0.5, 0.55, ... 0.95; NaN without objects.

    Args:
        objects: COCO's annotations; those with ``iscrowd`` are difficult.
        found: detections in COCO's format. Of equal scores the first comes first.
        limit: how many of the best of an image count.
    """
    by_image: dict[Any, list[int]] = defaultdict(list)
    for index, item in enumerate(objects):
        by_image[item["image_id"]].append(index)
    boxes = np.array([item["bbox"] for item in objects], dtype=float).reshape(-1, 4)
    difficult = np.array([bool(item.get("iscrowd", 0)) for item in objects], dtype=bool)
    count = int((~difficult).sum())
    if not count:
        return np.full(len(_THRESHOLDS), np.nan)
    order = np.argsort([-item["score"] for item in found], kind="stable") if found else ()
    ranked: dict[Any, list[int]] = defaultdict(list)
    for rank, index in enumerate(order):
        ranked[found[index]["image_id"]].append(rank)
    best = np.full(len(order), -1)  # index of the object that is overlapped most
    overlap = np.zeros(len(order))
    counted = np.zeros(len(order), dtype=bool)
    for image, ranks in ranked.items():
        ranks = ranks[:limit]
        counted[ranks] = True
        if of_image := by_image.get(image):
            theirs = np.array([found[order[rank]]["bbox"] for rank in ranks], dtype=float)
            ious = _ious(theirs, boxes[of_image])
            nearest = ious.argmax(1)
            best[ranks] = np.array(of_image)[nearest]
            overlap[ranks] = ious[np.arange(len(ranks)), nearest]
    best, overlap = best[counted], overlap[counted]
    aps = []
    for threshold in _THRESHOLDS / 100:
        matched = (best >= 0) & (overlap >= threshold)
        ignored = matched & difficult[best]
        right = np.zeros(len(best), dtype=bool)
        candidates = np.flatnonzero(matched & ~ignored)
        _, first = np.unique(best[candidates], return_index=True)
        right[candidates[first]] = True
        right = right[~ignored]
        recall = np.cumsum(right) / count
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        aps.append(100 * _area(recall, precision, use_07_metric))
    return np.array(aps)


def _ious(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(N, M) of boxes (N, 4) and (M, 4): x, y, width, height."""
    start = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    end = np.minimum((ours[:, :2] + ours[:, 2:])[:, None], (theirs[:, :2] + theirs[:, 2:])[None])
    shared = (end - start).clip(min=0).prod(-1)
    union = ours[:, 2:].prod(-1)[:, None] + theirs[:, 2:].prod(-1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _area(recall: np.ndarray, precision: np.ndarray, use_07_metric: bool) -> float:
    if use_07_metric:
        levels = np.arange(0.0, 1.1, 0.1)
        return float(np.mean([precision[recall >= level].max(initial=0.0) for level in levels]))
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate((precision, [0.0]))
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best from a recall on
    return float(np.sum(np.diff(recall) * precision))


class LVISEvaluator(BoxEvaluator):
    """LVIS's average precision of boxes: 300 detections an image, of all classes together, and of
    each image only the classes that were looked for in it.

    Scored by faster-coco-eval in LVIS's way, which gives what the package ``lvis`` does.

    Args:
        dataset_name, distributed, output_dir, unusable_detections: see :class:`COCOEvaluator`. The
            data set is of a file as LVIS's: its images have ``neg_category_ids`` and
            ``not_exhaustive_category_ids``, its categories ``frequency``.
        max_dets_per_image: how many of the best detections of an image count, by default 300.

    Returns:
        of ``evaluate``: ``{"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc",
        "APf", "AP-<class>": ...}}``, in percent; APr, APc and APf are of rare, common and frequent
        classes.

    Raises:
        ValueError: the data lack these.
        ImportError: faster-coco-eval is missing.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Any = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        **options: Any,
    ):
        limit = 300 if max_dets_per_image is None else max_dets_per_image
        _require_scorer()
        super().__init__(
            dataset_name, tasks, distributed, output_dir, max_dets_per_image=limit, **options
        )
        self._limit = limit
        truth = self.ground_truth
        for what, items, keys in (
            ("images", truth["images"], FEDERATED),
            ("categories", truth["categories"], ("frequency",)),
        ):
            lacking = [key for key in keys if any(key not in item for item in items)]
            if lacking:
                raise ValueError(
                    f"data set {dataset_name!r}: its {what} have no {' and '.join(lacking)}, which "
                    "LVIS's metric needs: name a file of LVIS's, or another dataloader.evaluator, "
                    "such as COCOEvaluator"
                )

    def judged(self, results: list[dict]) -> list[dict]:
        truth = self.ground_truth
        looked_for = {item["id"]: {*item["neg_category_ids"]} for item in truth["images"]}
        for item in truth["annotations"]:
            looked_for[item["image_id"]].add(item["category_id"])
        return [item for item in results if item["category_id"] in looked_for[item["image_id"]]]

    @staticmethod
    def metric_names(class_names: Sequence[str]) -> list[str]:
        names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
        return names + [f"AP-{name}" for name in class_names]

    def metrics(self, results: list[dict]) -> dict[str, float]:
        truth = self.ground_truth
        categories = sorted(truth["categories"], key=lambda category: category["id"])
        names = self.metric_names([category["name"] for category in categories])
        best = _best_of_each_image(results, self._limit)
        if not best:
            return dict.fromkeys(names, float("nan"))
        COCO, COCOeval = _require_scorer()
        with contextlib.redirect_stdout(io.StringIO()):
            objects = COCO({**truth, "annotations": [dict(a) for a in truth["annotations"]]})
            scored = COCOeval(
                objects, objects.loadRes(best), "bbox", lvis_style=True, print_function=_no_print
            )
            scored.params.maxDets = [self._limit]
            scored.evaluate()
            scored.accumulate()
        # (IoU thresholds, recalls, classes by their ids, areas, 1)
        precision = np.asarray(scored.eval["precision"])[..., 0]
        of = [category["frequency"] for category in categories]
        groups = [np.flatnonzero([value == group for value in of]) for group in FREQUENCIES]
        parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
        parts += [precision[..., area] for area in (1, 2, 3)]
        parts += [precision[:, :, group, 0] for group in groups]
        parts += [precision[:, :, index, 0] for index in range(len(categories))]
        return {name: 100 * _mean(part[part > -1]) for name, part in zip(names, parts)}


def _no_print(*_: Any) -> None: ...


def _best_of_each_image(results: Sequence[Mapping], limit: int) -> list[dict]:
    by_image: dict[Any, list] = defaultdict(list)
    for item in results:
        by_image[item["image_id"]].append(item)
    return [
        dict(item)
        for items in by_image.values()
        for item in sorted(items, key=lambda item: -item["score"])[:limit]
    ]


def _require_scorer() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError("LVIS's metric needs: pip install 'stage-interactor[lvis]'") from error
    return COCO, COCOeval_faster


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN if none is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
