"""The form that every format is read into, COCO's records, and what the readers share."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

SPLITS = ("train", "val", "test")
_ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_EXIF_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)


@dataclass
class Split:
    """One part of a data set."""

    content: dict  # as a COCO file: images, annotations, categories
    image_root: str  # where the images' file names start
    json_file: str | None = None  # the file that the content is, where it is one
    problems: list[str] = field(default_factory=list)

    @property
    def categories(self) -> list[dict]:
        """By class index: their ids in order."""
        return sorted(self.content["categories"], key=lambda category: category["id"])

    @property
    def class_names(self) -> list[str]:
        return [category["name"] for category in self.categories]

    def count_objects(self) -> dict[str, int]:
        """Objects of each class."""
        counts = Counter(item["category_id"] for item in self.content["annotations"])
        return {category["name"]: counts[category["id"]] for category in self.categories}


@dataclass
class DataFolder:
    """A data set in one of the formats that are read."""

    path: str
    kind: str  # "COCO", "YOLO" or "Pascal VOC"
    splits: dict[str, Split]  # "train", "val", "test"; those that are there
    notes: list[str] = field(default_factory=list)  # how it was understood

    @property
    def class_names(self) -> list[str]:
        return next(iter(self.splits.values())).class_names


def split_name(text: str) -> str | None:
    """The split that a file or folder name speaks of: ``instances_val2017`` is "val"."""
    words = text.lower().replace("-", "_").replace(".", "_").split("_")
    for word in words:
        word = word.rstrip("0123456789")
        word = _ALIASES.get(word, word)
        if word in SPLITS:
            return word
    return None


def image_size(path: Path, problems: list[str]) -> tuple[int, int] | None:
    """Width and height, turned upright; None, and a problem, if the file cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
    except Exception as error:  # decoders raise nearly anything on a damaged file
        problems.append(f"{path} cannot be read as an image: {type(error).__name__}: {error}")
        return None
    return (height, width) if turned else (width, height)


def annotation_record(annotation_id: int, image_id: int, class_index: int, box: list) -> dict:
    """Of a box xywh in pixels."""
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": class_index + 1,
        "bbox": box,
        "area": round(box[2] * box[3], 4),
        "iscrowd": 0,
    }


def require_distinct_names(names: Iterable[str], source: object) -> None:
    """Raises a ValueError if two classes have one name: nothing that is told of them is clear."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{source}: several classes have the name {', '.join(map(repr, repeated))}; give each "
            "a name of its own, or make them one class"
        )


class Object(NamedTuple):
    """An object of an image, as other formats than COCO's have it."""

    class_index: int
    box: tuple[float, float, float, float]  # xywh in pixels
    is_crowd: bool = False


def split_of(
    labelled: Iterable[tuple[Path, tuple[int, int], Iterable[Object]]],
    image_root: str,
    names: Iterable[str],
    problems: list[str],
) -> Split:
    """Of images, their widths and heights, and their objects; ``names`` are those of the classes.

    Boxes are rounded to a hundredth of a pixel, which is what the six decimals of YOLO's files can
    tell.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for path, (width, height), objects in labelled:
        image_id = len(images) + 1
        file_name = os.path.relpath(path, image_root)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for class_index, box, is_crowd in objects:
            rounded = [round(value, 2) for value in box]
            record = annotation_record(len(annotations) + 1, image_id, class_index, rounded)
            annotations.append(record | {"iscrowd": int(is_crowd)})
    categories = [{"id": index, "name": name} for index, name in enumerate(names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return Split(content, image_root, None, problems)


def box_problem(box: Iterable[float], width: float, height: float) -> str | None:
    """What makes a box, xyxy in pixels of its image, useless; None if nothing does."""
    x0, y0, x1, y1 = box
    # Written so that a NaN, which no comparison is true of, is caught as well.
    if not (0 < x1 - x0 < float("inf") and 0 < y1 - y0 < float("inf")):
        return "empty"
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return "outside"
    return None
