"""From a record to a model's input: read the image, augment it as DETR does, with its boxes."""

import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..d2 import transforms as T
from ..d2.data import detection_utils
from ..d2.structures import Boxes, BoxMode, Instances
from .fast import Reduced, not_plannable
from .images import read_image, to_tensor
from .loader import share
from .records import RecordError, require_record

logger = logging.getLogger(__name__)


class DetrDatasetMapper:
    """Reads and augments one image with its boxes.

    In training, if there is a second list of augmentations, one of the two is taken for every
    image with probability 0.5: the plain resize, or DETR's resize, crop and resize. The random
    numbers are numpy's global ones, as in all of detectron2's augmentations.

    Args:
        augmentation: detectron2 augmentations, in order.
        augmentation_with_crop: the alternative ones; in training only.
        is_train: one of the two lists of augmentations is taken at random.
        image_format: "RGB" or "BGR", the order of the channels.
        decode: "exact" gives detectron2's pixels; "fast" decodes large JPEG files to a fraction and
            resizes by torch, two to four times as fast, see :mod:`~stage_interactor.data.fast`.
            Augmentations but flip, crop and bilinear resize leave it at "exact".
        with_objects: return the ground truth, without crowds and without boxes that a crop
            emptied; by default in training.
    """

    def __init__(
        self,
        *,
        augmentation: Sequence[T.Augmentation],
        augmentation_with_crop: Sequence[T.Augmentation] | None = None,
        is_train: bool = True,
        image_format: str = "RGB",
        decode: Literal["exact", "fast"] = "exact",
        with_objects: bool | None = None,
    ):
        if decode not in ("exact", "fast"):
            raise ValueError(f"decode must be 'exact' or 'fast', got {decode!r}")
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        self.augmentation = T.AugmentationList(list(augmentation))
        self.augmentation_with_crop = None
        if augmentation_with_crop is not None:
            self.augmentation_with_crop = T.AugmentationList(list(augmentation_with_crop))
        self.is_train = is_train
        self.with_objects = is_train if with_objects is None else with_objects
        self.image_format = image_format
        self.fast = decode == "fast"
        unknown = not_plannable(self.augmentation)
        if is_train and self.augmentation_with_crop is not None:
            unknown += not_plannable(self.augmentation_with_crop)
        if self.fast and unknown:
            logger.warning(f"decode=fast is not for {', '.join(unknown)}: pixels are exact")
            self.fast = False
        logger.info(
            "%s augmentation: %s; alternative with crop: %s",
            "training" if is_train else "evaluation",
            self.augmentation,
            self.augmentation_with_crop if is_train else None,
        )

    def __call__(self, record: dict) -> dict:
        """Maps one record, which is not changed.

        Returns:
            `image` (uint8 tensor (3, H, W) of the augmented image), `file_name`, `image_id`,
            `height` and `width` (of the image file, in pixels), and `with_objects` `instances` of
            size (H, W) with `gt_boxes` (xyxy in pixels of the augmented image, clipped to it) and
            `gt_classes` (int64).

        Raises:
            ImageReadError: the file cannot be read.
            RecordError: the record lacks something, or has a value that is none.
            ValueError: the image is of another size than the record says.
        """
        _leave_process_group()
        require_record(record)
        augmentation = self.augmentation
        if self.is_train and self.augmentation_with_crop is not None and np.random.rand() < 0.5:
            augmentation = self.augmentation_with_crop
        reader = Reduced(augmentation) if self.fast else None
        least_size = reader.least_size if reader else None
        image = read_image(record["file_name"], self.image_format, least_size)
        height, width = reader.size if reader and reader.size else image.shape[:2]
        expected = (record.get("height", height), record.get("width", width))
        if (height, width) != expected:
            raise ValueError(
                f"{record['file_name']} is {width} x {height} pixels (turned upright by its EXIF "
                f"tag), but its annotation says {expected[1]} x {expected[0]}; correct width and "
                "height in the annotation file, or replace the image"
            )

        if reader:
            transforms, tensor = reader.transformed(image)
        else:
            aug_input = T.AugInput(image)
            transforms = augmentation(aug_input)
            tensor = to_tensor(aug_input.image)
        result = {
            "image": tensor,
            "file_name": record["file_name"],
            "image_id": record.get("image_id"),
            "height": height,
            "width": width,
        }
        if self.with_objects:
            result["instances"] = self._instances(
                record, transforms, (tensor.shape[1], tensor.shape[2])
            )
        return result if self.is_train else share(result)  # the stream of a training shares

    def _instances(self, record: dict, transforms: T.TransformList, size: tuple[int, int]):
        """As detectron2's functions for one annotation do, for all boxes at once."""
        objects = [item for item in record.get("annotations", []) if not item.get("iscrowd", 0)]
        boxes = _xyxy(objects, record["file_name"])
        if len(boxes):
            height, width = size
            boxes = transforms.apply_box(boxes).clip(min=0)
            boxes = np.minimum(boxes, [width, height, width, height])
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        classes = [int(item["category_id"]) for item in objects]
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        return detection_utils.filter_empty_instances(instances)


def _xyxy(objects: Sequence[dict], file_name: str) -> np.ndarray:
    """Boxes of annotations, (N, 4) float64, rounded as BoxMode.convert rounds a single one.

    Raises:
        RecordError: a number is infinite, or NaN.
    """
    boxes = np.empty((len(objects), 4))
    kinds = [(int(item["bbox_mode"]), type(item["bbox"])) for item in objects]
    for mode, kind in set(kinds):
        chosen = [i for i, other in enumerate(kinds) if other == (mode, kind)]
        given: Any = [objects[i]["bbox"] for i in chosen]
        if kind is torch.Tensor:
            given = [box.tolist() for box in given]
        if mode != BoxMode.XYXY_ABS:
            stacked = np.stack if kind is np.ndarray else torch.tensor
            given = BoxMode.convert(stacked(given), BoxMode(mode), BoxMode.XYXY_ABS)
        boxes[chosen] = np.asarray(given)
    if not np.isfinite(boxes).all():
        box = objects[int(np.argmin(np.isfinite(boxes).all(axis=1)))]["bbox"]
        raise RecordError(f"{file_name}: a box has a number that is none, {box!r}: leave it out")
    return boxes


def _leave_process_group() -> None:
    """A loader's worker is no member of the group that a signal may be sent to.

    The training that it works for takes SIGTERM and Ctrl-C, and needs its batches until it has
    saved; a worker ends with it.
    """
    if get_worker_info() is not None and hasattr(os, "setpgid") and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
