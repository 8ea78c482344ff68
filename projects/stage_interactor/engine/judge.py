"""What a detector is worth on a data set, of whichever runtime it is: of files to be exported."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..d2.data import build_detection_test_loader
from ..d2.evaluation import DatasetEvaluator
from ..d2.screening import COCOEvaluator, Screen, Screened
from ..data import DetrDatasetMapper, class_names, load_coco_dataset
from ..data.folders import read_folder, write_json
from ..data.images import prepare_picture, read_picture
from ..data.splitting import hold_out
from ..inference.blueprint import Blueprint
from ..inference.sources import find_sources
from ..untrusted.pictures import limit_restored
from .evaluation import match_order, scores

_MOST_PICTURES = 300  # to calibrate on


class Judge:
    """A data set that detectors are evaluated on, and calibrated.

    Its part "val" is evaluated on; without one "test", or the tenth of "train" that a training
    holds out.

    Args:
        data: folder, or the file that describes the data; see
            :func:`~stage_interactor.data.folders.read_folder`.
        calibration: pictures to calibrate on: a folder, a file or a glob. The rest of "train" by
            default, or those that are evaluated on.
        options: ``images``, ``annotations``, ``format``, ``allow_outside``, of the data.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, or there are no such pictures.
    """

    @limit_restored()
    def __init__(
        self,
        data: str | os.PathLike,
        *,
        calibration: str | os.PathLike | None = None,
        **options: Any,
    ):
        folder = read_folder(data, **options)
        if not {"val", "test"} & set(folder.splits):
            hold_out(folder)
        self.part = "val" if "val" in folder.splits else "test"
        self.split = folder.splits[self.part]
        self.path = folder.path
        self._folder = tempfile.TemporaryDirectory()
        json_file = os.path.join(self._folder.name, f"{self.part}.json")
        write_json(self.split, json_file)
        self._name = f"judged {json_file}"
        self._records = load_coco_dataset(
            self._name, json_file, self.split.image_root, is_train=False
        )
        of = folder.splits.get("train", self.split)
        if calibration is None:
            names = (image["file_name"] for image in of.content["images"])
            files = [os.path.join(of.image_root, name) for name in names]
        else:
            sources, _ = find_sources([calibration])
            files = [source.path for source in sources if not source.is_video]
            if not files:
                raise ValueError(f"{calibration}: there is no picture in it to calibrate on")
        self.apart = calibration is not None or of is not self.split
        step = max(len(files) / _MOST_PICTURES, 1)
        self._files = [files[int(at)] for at in np.arange(0, len(files), step)]

    def __len__(self) -> int:
        """Pictures that are evaluated on."""
        return len(self.split.content["images"])

    def __call__(self, detect: Any, blueprint: Blueprint) -> dict[str, float]:
        """COCO's metrics, such as ``{"AP": ..., "AP50": ...}`` in percent.

        Args:
            detect: the detector, or what takes its place.
            blueprint: of the pictures that it takes, and of the names of its classes.

        Raises:
            ValueError: the data have other classes, or no objects.
            UnusableDetectionsError: there are detections that are NaN or infinite.
        """
        evaluator = self.evaluator(blueprint, self.classes(blueprint))
        return scores(detect, self.loader(blueprint), evaluator)["bbox"]

    def classes(self, blueprint: Blueprint) -> list[int] | None:
        """By the detector's class index that of the data, if they differ.

        Raises:
            ValueError: the data have other classes.
        """
        of_data = class_names(name=self._name)
        return match_order(blueprint.class_names, of_data, "the detector", self.path)

    def loader(self, blueprint: Blueprint, *, with_objects: bool = False) -> Any:
        """Of the pictures that are evaluated on, as the detector takes them, one at a time."""
        mapper = DetrDatasetMapper(
            augmentation=blueprint.build_augmentation().augs,
            is_train=False,
            image_format=blueprint.image_format,
            with_objects=with_objects,
        )
        return build_detection_test_loader(self._records, mapper=mapper)

    def evaluator(self, blueprint: Blueprint, classes: Sequence[int] | None) -> DatasetEvaluator:
        """Of the detector, with its :meth:`classes`."""
        evaluated = blueprint.config.get("dataloader", {}).get("evaluator", {})
        most = evaluated.get("max_dets_per_image")
        scorer = COCOEvaluator(self._name, use_fast_impl=False, max_dets_per_image=most)
        return Screened(scorer, Screen(), classes)

    def pictures(self, blueprint: Blueprint) -> Iterator[dict[str, Any]]:
        """To calibrate on, as the detector takes them."""
        augmentation = blueprint.build_augmentation()
        for file in self._files:
            yield prepare_picture(read_picture(file), augmentation, blueprint.image_format)
