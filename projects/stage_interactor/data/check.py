"""What is wrong, or looks wrong, in a data set: for ``stage-interactor data check``."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.ops import box_iou
from tqdm import tqdm

from ..d2.structures import Boxes
from .formats.coco_file import summarise_coco_file
from .formats.records import DataFolder, Split, box_problem

_SMALLEST_SIDE = 2.0  # pixels
_LARGEST_ASPECT = 30.0
_DUPLICATE_IOU = 0.95


@dataclass
class Findings:
    """Of one data set; messages by split, the empty string for what concerns several."""

    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def check_folder(folder: DataFolder, *, decode: bool = True) -> Findings:
    """Looks at every annotation, and with ``decode`` at every pixel.

    Errors are what training or evaluation would leave out, or fail on; warnings what is probably
    not meant: boxes that leave their image, are tiny, very long, or there twice; classes without
    objects; an image that is in two parts.
    """
    found = Findings()
    for name, problems in _unfit(folder).items():
        found.errors[name] += problems
    seen: dict[str, tuple[str, str]] = {}  # by content of the file
    for name, split in folder.splits.items():
        errors, warnings = found.errors[name], found.warnings[name]
        errors += split.problems
        _check_images(name, split, errors, found.warnings[""], seen, decode)
        _check_boxes(split, errors, warnings)
        counts = split.count_objects()
        if empty := [label for label in counts if not counts[label]]:
            warnings.append(f"no object of the classes {empty}")
    return found


def _check_images(name, split, errors, across, seen, decode) -> None:
    for record in tqdm(split.content["images"], desc=name, unit="image", leave=False):
        path = Path(split.image_root, record["file_name"])
        try:
            digest = hashlib.sha1(path.read_bytes()).hexdigest()
            with Image.open(path) as image:
                if decode:
                    image = ImageOps.exif_transpose(image)
                    image.load()
                    size = (record["width"], record["height"])
                    if image.size != size:
                        errors.append(f"{path} is {image.size}, its annotation says {size}")
        except FileNotFoundError:
            errors.append(f"{path} does not exist")
            continue
        except Exception as error:  # decoders raise nearly anything on a damaged file
            errors.append(f"{path} cannot be read: {type(error).__name__}: {error}")
            continue
        if digest in seen:
            first, other = seen[digest]
            across.append(f"{path} ({name}) is the same picture as {other} ({first})")
        else:
            seen[digest] = (name, str(path))


def _check_boxes(split: Split, errors: list[str], warnings: list[str]) -> None:
    images = {record["id"]: record for record in split.content["images"]}
    by_image = defaultdict(list)
    for item in split.content["annotations"]:
        record = images.get(item["image_id"])
        if record is None:
            errors.append(
                f"annotation {item['id']} is of image {item['image_id']}, which is not listed"
            )
            continue
        where = f"{record['file_name']}, annotation {item['id']}: box {item['bbox']} (x, y, w, h)"
        x, y, w, h = item["bbox"]
        problem = box_problem((x, y, x + w, y + h), record["width"], record["height"])
        if problem == "empty":
            errors.append(f"{where} is empty")
        elif problem == "outside":
            errors.append(f"{where} lies outside of its image")
        else:
            by_image[record["id"]].append(item)
            if min(x, y, record["width"] - x - w, record["height"] - y - h) < -1:
                size = f"{record['width']} x {record['height']}"
                warnings.append(f"{where} leaves its image, {size}")
            elif min(w, h) < _SMALLEST_SIDE:
                warnings.append(f"{where} is less than {_SMALLEST_SIDE:g} pixels wide or high")
            elif max(w / h, h / w) > _LARGEST_ASPECT:
                warnings.append(f"{where} is more than {_LARGEST_ASPECT:g} times as long as wide")
    for image_id, items in by_image.items():
        for first, second in _duplicates(items):
            where = images[image_id]["file_name"]
            warnings.append(f"{where}: annotations {first} and {second} are nearly the same box")


def _duplicates(items: list[dict]) -> Iterator[tuple[int, int]]:
    corners = Boxes([(x, y, x + w, y + h) for x, y, w, h in (item["bbox"] for item in items)])
    classes = np.array([item["category_id"] for item in items])
    overlap = box_iou(corners.tensor, corners.tensor).numpy() > _DUPLICATE_IOU
    overlap &= classes[:, None] == classes
    for first, second in np.argwhere(np.triu(overlap, 1)):
        yield items[first]["id"], items[second]["id"]


def check_trainable(folder: DataFolder) -> None:
    """Raises a ValueError for what would stop training, or make its AP wrong, later on."""
    found = _unfit(folder)
    if problems := found[""] + found["val"]:
        raise ValueError("; ".join(problems))


def _unfit(folder: DataFolder) -> dict[str, list[str]]:
    """By part, what the whole of it cannot be trained or evaluated for."""
    found = defaultdict(list)
    first, *others = ((name, split.class_names) for name, split in folder.splits.items())
    found[""] = [
        f"{first[0]} has the classes {first[1]}, {name} has {listed}"
        for name, listed in others
        if listed != first[1]
    ]
    for name, split in folder.splits.items():
        # What was read from other formats has all that is needed.
        if name != "train" and split.json_file is not None:
            summary = summarise_coco_file(split.json_file)
            if problem := summary.why_not_evaluable(split.json_file):
                found[name].append(problem)
    return found
