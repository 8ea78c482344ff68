"""Stands in for ``detectron2.evaluation`` (``coco_evaluation``; the rest is in ``evaluator``).

Left out: masks, keypoints, proposals, and a part of the images.
"""

import contextlib
import io
import itertools
import json
import logging
import os
from collections.abc import Sequence

import numpy as np
import torch

from ...writing import write_atomically, write_text
from . import comm
from .catalog import MetadataCatalog
from .coco import convert_to_coco_json, read_coco
from .evaluator import DatasetEvaluator, inference_on_dataset, print_csv_format
from .logger import create_small_table, create_wide_table
from .paths import PathManager
from .scoring import evaluated
from .structures import BoxMode

__all__ = [
    "COCOEvaluator",
    "DatasetEvaluator",
    "inference_on_dataset",
    "print_csv_format",
]

# name, IoU threshold (None: the mean over 0.50:0.05:0.95), range of areas
_METRICS = (
    ("AP", None, "all"),
    ("AP50", 0.5, "all"),
    ("AP75", 0.75, "all"),
    ("APs", None, "small"),
    ("APm", None, "medium"),
    ("APl", None, "large"),
)


class COCOEvaluator(DatasetEvaluator):
    """COCO average precision of boxes, in percent.

    Args:
        dataset_name: a registered data set. Without ``json_file`` in its metadata its annotations
            are first converted, into ``output_dir``.
        tasks: ``("bbox",)`` or None.
        distributed: whether predictions are gathered from all processes.
        output_dir: folder for ``coco_instances_results.json`` (COCO's format, its category ids)
            and ``instances_predictions.pth`` (per image); None writes neither.
        max_dets_per_image: how many of the best boxes of a class count in an image, by default
            100; as detectron2's, never less than 10.
        use_fast_impl: score by faster-coco-eval, to the same bit, if it is installed.

    Raises:
        ValueError: for other tasks, or if ``output_dir`` is missing for a conversion.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
    ):
        if tasks is not None and tuple(tasks) != ("bbox",):
            raise ValueError(f"tasks is {tasks!r}; only boxes, ('bbox',), can be evaluated.")
        self._logger = logging.getLogger(__name__)
        self._distributed = distributed
        self._output_dir = output_dir
        most = 100 if max_dets_per_image is None else max_dets_per_image
        self._max_dets_per_image = [1, 10, most]
        self._use_fast_impl = use_fast_impl
        self._metadata = MetadataCatalog.get(dataset_name)
        if self._metadata.get("json_file") is None:
            if output_dir is None:
                raise ValueError(
                    f"Dataset {dataset_name!r} has no json_file; its annotations are converted to "
                    "COCO's format, for which output_dir must be given."
                )
            path = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, path)
            self._metadata.json_file = path
        self._coco = read_coco(self._metadata.json_file)
        self._coco.dataset.setdefault("info", {})  # some versions of loadRes read it
        self._predictions: list[dict] = []

    def reset(self) -> None:
        self._predictions = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the detections of a batch.

        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances`` that have ``pred_boxes`` (x1, y1, x2, y2 in pixels of
                the original image), ``scores`` and ``pred_classes``.
        """
        for image, output in zip(inputs, outputs):
            if "instances" not in output:
                continue
            instances = output["instances"].to(torch.device("cpu"))
            boxes = instances.pred_boxes.tensor.numpy()
            boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
            detections = zip(
                instances.pred_classes.tolist(), boxes.tolist(), instances.scores.tolist()
            )
            image_id = image["image_id"]
            found = [
                {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
                for label, box, score in detections
            ]
            self._predictions.append({"image_id": image_id, "instances": found})

    def evaluate(self) -> dict:
        """Write and score what was collected.

        Returns:
            ``{"bbox": {"AP": ..., "AP-<class>": ...}}``, NaN where there is nothing to average;
            an empty dict on other processes, without predictions, and for an annotation file
            without annotations.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain.from_iterable(comm.gather(predictions)))
            if not comm.is_main_process():
                return {}
        if not predictions:
            self._logger.warning("There are no predictions to evaluate.")
            return {}
        results = [dict(item) for p in predictions for item in p["instances"]]
        self._to_dataset_categories(results)
        if self._output_dir:
            self._write(self._output_dir, predictions, results)
        if "annotations" not in self._coco.dataset:
            self._logger.info(
                "%s has no annotations: there is nothing to score.", self._metadata.json_file
            )
            return {}
        if not results:
            self._logger.warning("The model found nothing.")
            return {"bbox": {name: float("nan") for name, _, _ in _METRICS}}
        return {"bbox": self._score(results)}

    def _to_dataset_categories(self, results: list[dict]) -> None:
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:
            return
        category_ids = {index: category for category, index in mapping.items()}
        for result in results:
            index = result["category_id"]
            if index not in category_ids:
                raise ValueError(
                    f"A detection in image {result['image_id']} has class {index}, but dataset "
                    f"{self._metadata.name!r} has the classes 0 to {len(category_ids) - 1}."
                )
            result["category_id"] = category_ids[index]

    def _write(self, folder: str, predictions: list[dict], results: list[dict]) -> None:
        PathManager.mkdirs(folder)
        path = os.path.join(folder, "instances_predictions.pth")
        write_atomically(path, lambda file: torch.save(predictions, file))
        path = os.path.join(folder, "coco_instances_results.json")
        write_text(path, json.dumps(results))
        self._logger.info("Saved %d detections in %s", len(results), path)

    def _score(self, results: list[dict]) -> dict[str, float]:
        limits = self._max_dets_per_image
        evaluation = evaluated(self._coco, results, limits, fast=self._use_fast_impl)
        report = io.StringIO()
        with contextlib.redirect_stdout(report):
            if limits[2] == 100:  # the number that summarize() expects
                evaluation.summarize()
        self._logger.info("Official COCO evaluation:\n%s", report.getvalue())

        params, precision = evaluation.params, evaluation.eval["precision"]
        scores = {}
        for name, threshold, area in _METRICS:
            ious = slice(None) if threshold is None else params.iouThrs == threshold
            # precision: (IoU thresholds, recalls, classes, areas, limits of detections)
            scores[name] = _mean(precision[ious][:, :, :, params.areaRngLbl.index(area), 2])
        self._logger.info("Evaluation results for bbox:\n%s", create_small_table(scores))
        if not np.isfinite(sum(scores.values())):
            self._logger.info("Metrics without any object to find are NaN.")

        classes = self._metadata.get("thing_classes")
        if classes is None or len(classes) <= 1:
            return scores
        per_class = {name: _mean(precision[:, :, i, 0, 2]) for i, name in enumerate(classes)}
        table = create_wide_table(list(per_class.items()), ["category", "AP"], floatfmt=".3f")
        self._logger.info("AP of each category:\n%s", table)
        return scores | {f"AP-{name}": value for name, value in per_class.items()}


def _mean(precision: np.ndarray) -> float:
    """Mean in percent over what COCO could compute (it marks the rest by -1), or NaN."""
    computed = precision[precision > -1]
    return float(np.mean(computed) * 100) if computed.size else float("nan")
