"""Evaluators that are given detections only, whichever runtime they are of.

COCO's metric takes a NaN for a perfect match, since no threshold is larger than it.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import RUNTIME
from .comm import all_gather, is_main_process
from .detections import UnusableDetectionsError, split_output
from .structures import Instances

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.evaluation import COCOEvaluator as _COCOEvaluator
    from .embedded.evaluation import DatasetEvaluator
else:
    from detectron2.evaluation import COCOEvaluator as _COCOEvaluator
    from detectron2.evaluation import DatasetEvaluator

logger = logging.getLogger(__name__)

_SHOWN = 5  # pictures that a message names


class Screen:
    """Keeps unusable detections from an evaluator, and remembers whose they were.

    Args:
        unusable_detections: what they are when all pictures are through: an ``"error"``, or a
            ``"warning"`` before the rest is evaluated.
        distributed: whether those of all processes count; the error is then raised on each.

    Raises:
        ValueError: for another value of ``unusable_detections``.
    """

    def __init__(self, unusable_detections: str = "error", distributed: bool = True):
        if unusable_detections not in ("error", "warning"):
            raise ValueError(
                f"unusable_detections must be 'error' or 'warning', got {unusable_detections!r}"
            )
        self._is_error = unusable_detections == "error"
        self._distributed = distributed
        self._counts: Counter[str] = Counter()  # by picture

    def reset(self) -> None:
        self._counts.clear()

    def __call__(self, inputs: Iterable, outputs: Iterable) -> list:
        """The outputs of a batch without their unusable detections."""
        screened = []
        for image, output in zip(inputs, outputs):
            output, count = split_output(output)
            screened.append(output)
            if count:
                name = image.get("file_name") or f"image {image.get('image_id')}"
                self._counts[str(name)] += count
        return screened

    def report(self) -> None:
        """To be called by all processes before they evaluate.

        Raises:
            UnusableDetectionsError: there were unusable detections, and they are an error.
        """
        found: Counter[str] = Counter()
        for counts in all_gather(self._counts) if self._distributed else [self._counts]:
            found.update(counts)
        if not found:
            return
        shown = ", ".join(f"{name} ({count})" for name, count in found.most_common(_SHOWN))
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        told = (
            f"{sum(found.values())} detections in {len(found)} pictures are NaN, infinite or of "
            f"negative size: {shown}{more}"
        )
        if self._is_error:
            raise UnusableDetectionsError(
                f"{told}. The model overflows: evaluate in float32 (train.inference.dtype), or "
                "another checkpoint; train.unusable_detections=warning (in Python "
                "unusable_detections='warning') leaves them out and evaluates the rest"
            )
        if is_main_process():
            logger.warning(f"{told}. They are left out, the rest is evaluated")


class Screened(DatasetEvaluator):
    """An evaluator of any kind behind a :class:`Screen`.

    Args:
        evaluator, screen: these.
        classes: by the model's class index that of the evaluator's data, if they differ.
    """

    def __init__(
        self, evaluator: DatasetEvaluator, screen: Screen, classes: Sequence[int] | None = None
    ):
        self._evaluator = evaluator
        self._screen = screen
        self._classes = None if classes is None else torch.tensor(classes)

    def reset(self) -> None:
        self._screen.reset()
        self._evaluator.reset()

    def process(self, inputs: list, outputs: list) -> None:
        self._evaluator.process(inputs, [*map(self._renamed, self._screen(inputs, outputs))])

    def _renamed(self, output: Any) -> Any:
        if self._classes is None or "instances" not in output:
            return output
        found = output["instances"]
        fields = dict(found.get_fields())
        labels = fields["pred_classes"]
        fields["pred_classes"] = self._classes.to(labels.device)[labels]
        return {**output, "instances": Instances(found.image_size, **fields)}

    def evaluate(self) -> dict | None:
        self._screen.report()
        return self._evaluator.evaluate()


def detection_limits(max_dets_per_image: int | None) -> list[int]:
    """pycocotools' ``maxDets``: three limits, the last of which, after they are sorted, is AP's.

    Raises:
        ValueError: for what is no integer of 1 or more.
    """
    most = 100 if max_dets_per_image is None else max_dets_per_image
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ValueError(f"max_dets_per_image must be an integer of 1 or more, got {most!r}")
    return [min(1, most - 1), min(10, most - 1), most]


class COCOEvaluator(_COCOEvaluator):
    """The runtime's evaluator of COCO average precision, behind a :class:`Screen`.

    Args:
        dataset_name, tasks, distributed, output_dir, use_fast_impl, options: as detectron2's.
        max_dets_per_image: how many of the best detections of a class count in an image, by
            default 100.
        unusable_detections: see :class:`Screen`.

    Raises:
        ValueError: ``max_dets_per_image`` is no integer of 1 or more, or ``unusable_detections``
            is another word; in ``evaluate``: unusable detections, or two classes of one name,
            whose AP would be told in one line.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Any = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        unusable_detections: str = "error",
        **options: Any,
    ):
        limits = detection_limits(max_dets_per_image)
        super().__init__(
            dataset_name, tasks, distributed, output_dir, use_fast_impl=use_fast_impl, **options
        )
        self._max_dets_per_image = limits
        self._results_folder = output_dir
        self._screen = Screen(unusable_detections, distributed)

    @property
    def ground_truth(self) -> dict:
        """The content of the COCO file that is evaluated on."""
        return getattr(self, "_coco" if RUNTIME == "embedded" else "_coco_api").dataset

    @property
    def most_counted(self) -> int | None:
        """Detections of an image, or of a class in it, that count; None is all of them."""
        return self._max_dets_per_image[-1]

    def judged(self, results: list[dict]) -> list[dict]:
        """Of detections in COCO's format those of which the annotations say whether they are
        right."""
        return results

    @property
    def category_ids(self) -> list:
        """Those of the file, by class index."""
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if ids is None:
            return sorted(category["id"] for category in self.ground_truth["categories"])
        return sorted(ids, key=lambda key: ids[key])

    @property
    def results_file(self) -> str | None:
        """Where the main process finds, after ``evaluate``, what was scored."""
        folder = self._results_folder
        return None if not folder else os.path.join(folder, "coco_instances_results.json")

    def reset(self) -> None:
        self._screen.reset()
        super().reset()

    def process(self, inputs: list, outputs: list) -> None:
        super().process(inputs, self._screen(inputs, outputs))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict:
        self._screen.report()
        self._require_distinct_names()
        return super().evaluate(*args, **kwargs)

    @staticmethod
    def metric_names(class_names: Sequence[str]) -> list[str]:
        """The keys of ``bbox`` in what ``evaluate`` gives, of data with these classes."""
        per_class = [f"AP-{name}" for name in class_names] if len(class_names) > 1 else []
        return ["AP", "AP50", "AP75", "APs", "APm", "APl", *per_class]

    def _require_distinct_names(self) -> None:
        names = Counter(self._metadata.get("thing_classes") or ())
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ValueError(
                f"data set {self._metadata.name!r} has several classes of the name {repeated}, "
                "whose AP cannot be told apart: rename them"
            )
