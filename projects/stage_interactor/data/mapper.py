"""From a record to a model's input: read the image, augment it as DETR does, with its boxes."""

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..d2 import transforms as T
from ..d2.data import detection_utils
from ..d2.structures import Boxes, BoxMode, Instances
from .augmentations import (
    Combination,
    CuttingTransform,
    Recipe,
    Sample,
    in_format,
    opening_and_closing,
    with_flips,
)
from .fast import Reduced, not_plannable
from .images import read_image, to_tensor
from .loader import Draw, share
from .records import RecordError, require_record

logger = logging.getLogger(__name__)


class _Lists(NamedTuple):
    """A recipe whose lists are ready to be called."""

    augmentation: T.AugmentationList
    augmentation_with_crop: T.AugmentationList | None
    combinations: Sequence[Combination]


class DetrDatasetMapper:
    """Reads and augments one image with its boxes.

    In training, if there is a second list of augmentations, one of the two is taken for every
    image with probability 0.5: the plain resize, or DETR's resize, crop and resize. The random
    numbers are numpy's global ones, as in all of detectron2's augmentations.

    Pictures that are combined of several, and a last part of the training without them, need a
    loader of :func:`~stage_interactor.data.build_train_loader`, which says what is drawn.

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
        combinations: :mod:`Mosaic, MixUp and the like <stage_interactor.data.augmentations>`, one
            after the other, before the augmentation; in training only, and not in its last part.
        closing_augmentation: in the last part of the training, in place of the other two lists.
        policy: None, or a named choice that is made of the lists, `"none"`, `"light"` or
            `"strong"`; see :func:`~stage_interactor.data.augmentations.opening_and_closing`.
        plain: the augmentation of the evaluation, which `policy="none"` takes.
        flip: None, or which flips there are in place of those of the lists, `"none"`,
            `"horizontal"`, `"vertical"` or `"both"`; in training only. See
            :func:`~stage_interactor.data.augmentations.with_flips`.

    Raises:
        ValueError: what is given cannot be meant, or not together.
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
        combinations: Sequence[Combination] | None = None,
        closing_augmentation: Sequence[T.Augmentation] | None = None,
        policy: Literal["none", "light", "strong"] | None = None,
        plain: Sequence[T.Augmentation] | None = None,
        flip: Literal["none", "horizontal", "vertical", "both"] | None = None,
    ):
        if decode not in ("exact", "fast"):
            raise ValueError(f"decode must be 'exact' or 'fast', got {decode!r}")
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        self.is_train = is_train
        self.with_objects = is_train if with_objects is None else with_objects
        self.image_format = image_format
        self.closing_augmentation = closing_augmentation
        if is_train and flip is not None:
            augmentation = with_flips(augmentation, flip)
            augmentation_with_crop, closing_augmentation, plain = (
                None if augs is None else with_flips(augs, flip)
                for augs in (augmentation_with_crop, closing_augmentation, plain)
            )
        for item in combinations or ():
            if not callable(item):
                raise ValueError(
                    f"combinations: {item!r:.200} cannot be called; in a config they are "
                    "[L(Mosaic)(prob=0.3)], of classes that are no dataclasses"
                )
        given = Recipe(augmentation, augmentation_with_crop, tuple(combinations or ()))
        opening = closing = given._replace(combinations=())
        if is_train:
            opening, closing = opening_and_closing(
                policy, given, closing_augmentation=closing_augmentation, plain=plain
            )
        ready, self._closing = self._ready(opening), self._ready(closing)
        self.augmentation, self.augmentation_with_crop, self.combinations = ready
        self._asks_for_draw = bool(self.combinations) or closing_augmentation is not None
        self.fast = decode == "fast"
        unknown: list[str] = [type(item).__name__ for item in self.combinations]
        for lists in (ready, self._closing):
            unknown += not_plannable(lists.augmentation)
            if is_train and lists.augmentation_with_crop is not None:
                unknown += not_plannable(lists.augmentation_with_crop)
        if self.fast and unknown:
            told = ", ".join(dict.fromkeys(unknown))
            logger.warning(f"decode=fast is not for {told}: pixels are exact")
            self.fast = False
        logger.info(
            "%s augmentation: %s; alternative with crop: %s",
            "training" if is_train else "evaluation",
            self.augmentation,
            self.augmentation_with_crop if is_train else None,
        )
        if self.combinations:
            logger.info("pictures are combined before it by %s", [*self.combinations])
        if is_train and closing != opening:
            logger.info("in the last part of the training: %s", self._closing.augmentation)

    def _ready(self, recipe: Recipe) -> _Lists:
        """For this mapper's order of channels."""

        def ready(augmentation: Sequence[T.Augmentation]) -> T.AugmentationList:
            # Of a mapper for RGB they are what they were made for.
            turned = augmentation if self.image_format == "RGB" else in_format(augmentation, "BGR")
            return T.AugmentationList(list(turned))

        crop = recipe.augmentation_with_crop
        with_crop = None if crop is None else ready([*crop])
        return _Lists(ready([*recipe.augmentation]), with_crop, recipe.combinations)

    def __call__(self, record: dict, draw: Draw | None = None) -> dict:
        """Maps one record, which is not changed.

        Args:
            draw: of the training's stream, which gives it to each mapper that takes it.

        Returns:
            `image` (uint8 tensor (3, H, W) of the augmented image), `file_name`, `image_id`,
            `height` and `width` (of the image file, in pixels), and `with_objects` `instances` of
            size (H, W) with `gt_boxes` (xyxy in pixels of the augmented image, clipped to it) and
            `gt_classes` (int64).

        Raises:
            ImageReadError: the file cannot be read.
            RecordError: the record lacks something, or has a value that is none.
            ValueError: the image is of another size than the record says, or pictures are to be
                combined and there is no `draw`.
        """
        _leave_process_group()
        require_record(record)
        lists = _Lists(self.augmentation, self.augmentation_with_crop, self.combinations)
        if draw is None:
            if self._asks_for_draw:
                raise ValueError(
                    "the mapper combines pictures, or differs in the last part of the training: it "
                    "needs a loader of build_train_loader, which hands it the draw"
                )
        elif draw.closing:
            lists = self._closing
        augmentation = lists.augmentation
        if self.is_train and lists.augmentation_with_crop is not None and np.random.rand() < 0.5:
            augmentation = lists.augmentation_with_crop
        reader = Reduced(augmentation) if self.fast else None
        image, (height, width) = self._read(record, reader)
        sample = Sample(image, *(_objects(record) if self.with_objects else _NOTHING))
        if draw is not None:
            for combination in lists.combinations:
                sample = combination(sample, functools.partial(draw.other, self._sample))

        if reader:
            transforms, tensor = reader.transformed(image)
        else:
            aug_input = T.AugInput(sample.image)
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
            result["instances"] = _instances(sample, transforms, (tensor.shape[1], tensor.shape[2]))
        return result if self.is_train else share(result)  # the stream of a training shares

    def _read(
        self, record: dict, reader: Reduced | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """A picture, and (height, width) of its file, which may be larger if a reader says so."""
        image = read_image(
            record["file_name"], self.image_format, reader.least_size if reader else None
        )
        height, width = reader.size if reader and reader.size else image.shape[:2]
        expected = (record.get("height", height), record.get("width", width))
        if (height, width) != expected:
            raise ValueError(
                f"{record['file_name']} is {width} x {height} pixels (turned upright by its EXIF "
                f"tag), but its annotation says {expected[1]} x {expected[0]}; correct width and "
                "height in the annotation file, or replace the image"
            )
        return image, (height, width)

    def _sample(self, record: dict) -> Sample:
        """Of another record, to be combined with one."""
        require_record(record)
        return Sample(self._read(record)[0], *_objects(record))


def _objects(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4), xyxy in pixels of the file, and classes (N,), without crowds."""
    objects = [item for item in record.get("annotations", []) if not item.get("iscrowd", 0)]
    boxes = _xyxy(objects, record["file_name"])
    return boxes, np.array([int(item["category_id"]) for item in objects], dtype=np.int64)


_NOTHING = np.empty((0, 4)), np.empty(0, dtype=np.int64)


def _instances(sample: Sample, transforms: T.TransformList, size: tuple[int, int]) -> Instances:
    """As detectron2's functions for one annotation do, for all boxes at once."""
    boxes, classes = sample.boxes, sample.classes
    for transform in transforms.transforms if len(boxes) else ():
        if isinstance(transform, CuttingTransform):
            boxes, left = transform.cut_boxes(boxes)
            boxes, classes = boxes[left], classes[left]
        else:
            boxes = transform.apply_box(boxes)
    if len(boxes):
        height, width = size
        boxes = np.minimum(boxes.clip(min=0), [width, height, width, height])
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
    instances.gt_classes = torch.as_tensor(classes)
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
