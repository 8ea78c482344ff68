"""A page about a data set: what is in it, and what training gets of it."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig

from ..config import instantiate
from ..data import ImageReadError, TrainStream
from ..data.check import check_folder
from ..data.coco import records_of
from ..data.reading import DataFolder, count_by_image
from . import charts
from .boxes import evenly_spread, input_with_boxes
from .page import section, write_page


def write_view(
    path: str,
    folder: DataFolder,
    cfg: DictConfig,
    *,
    num_pictures: int = 12,
) -> None:
    """Writes the page.

    Args:
        path: of the page.
        folder: the data set.
        cfg: whose ``dataloader.train.mapper`` augments the pictures.
        num_pictures: evenly spread over the part to train on, each after one drawing of the
            augmentation.

    Raises:
        OSError, ValueError: see :func:`stage_interactor.pages.page.write_page`.
    """
    if num_pictures < 0:
        raise ValueError(f"num_pictures must not be less than 0, got {num_pictures}")
    name = "train" if "train" in folder.splits else next(iter(folder.splits))
    records = records_of(folder.splits[name])
    names = folder.class_names
    mapper = instantiate(cfg.dataloader.train.mapper)
    pictures, unreadable = _augmented(records, mapper, names, num_pictures)
    sections = [
        section("Objects", charts=_histograms(folder)),
        section(
            "After augmentation",
            text="Pictures as training gets them, each after one drawing of the augmentation: "
            + ", ".join(map(str, [*getattr(mapper, "combinations", ()), mapper.augmentation])),
            pictures=pictures,
        ),
        section("Suspicious", **_suspicious(folder, unreadable)),
    ]
    tiles = [
        (len(split.content["images"]), f"images in {name}") for name, split in folder.splits.items()
    ]
    tiles.append((len(names), "classes"))
    title = f"Data: {os.path.basename(os.path.abspath(folder.path))}"
    notes = "; ".join([folder.kind, *folder.notes])
    write_page(path, title, f"{folder.path}: {notes}", tiles, sections)


def _augmented(
    records: list[dict], mapper: Any, names: Sequence[str], number: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pictures with captions, and what is wrong with those that are none."""
    pictures: list[tuple[str, str]] = []
    unreadable: list[tuple[str, str]] = []
    if not records:
        return pictures, unreadable
    stream = TrainStream(records, mapper, seed=0)
    for index in evenly_spread(range(len(records)), number):
        try:
            image = stream.mapped(index, draw=index)
        except (ImageReadError, ValueError) as error:
            unreadable.append(("train", str(error)))
            continue
        instances = image["instances"]
        boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
        drawn = input_with_boxes(image["image"], mapper.image_format, boxes, classes, names)
        height, width = image["image"].shape[1:]
        name = os.path.basename(image["file_name"])
        pictures.append((drawn, f"{name}: {len(instances)} objects, {width} x {height}"))
    return pictures, unreadable


def _histograms(folder: DataFolder) -> list[tuple[str, str]]:
    drawn = []
    for name, split in folder.splits.items():
        counts = split.count_objects()
        ranked = dict(sorted(counts.items(), key=lambda item: -item[1])[:30])
        drawn.append((f"Objects by class, {name}", charts.bars(ranked, x="objects")))
    sides, per_image = {}, {}
    for name, split in folder.splits.items():
        sizes = [math.sqrt(w * h) for *_, w, h in (a["bbox"] for a in split.content["annotations"])]
        sides[name] = np.array(sizes)
        per_image[name] = np.array(list(count_by_image(split).values()), dtype=int)
    largest = max((values.max(initial=1) for values in sides.values()), default=1)
    edges = np.linspace(0, largest, 31)
    svg = charts.shares(sides, edges, x="square root of the area, pixels")
    drawn.append(("Size of the objects", svg))
    most = max((values.max(initial=1) for values in per_image.values()), default=1)
    edges = np.arange(0, most + 2, max(most // 30, 1)) - 0.5
    drawn.append(("Objects in an image", charts.shares(per_image, edges, x="objects")))
    return drawn


def _suspicious(folder: DataFolder, unreadable: Sequence[tuple[str, str]]) -> dict:
    found = check_folder(folder, decode=False)
    rows = [("part", "what"), *unreadable]
    for messages in (found.errors, found.warnings):
        rows += [(name or "all", text) for name, texts in messages.items() for text in texts[:50]]
    if len(rows) == 1:
        return {"text": "Nothing is wrong, as far as can be seen without looking at the pixels."}
    return {"text": "See stage-interactor data check for all of it.", "table": rows}
