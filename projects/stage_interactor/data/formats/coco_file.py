"""Checks of an annotation file in COCO's instance format, with messages that say what to repair."""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from .records import require_distinct_names


@dataclass(frozen=True)
class CocoSummary:
    """What a file holds, as far as it matters before its records are loaded.

    Attributes:
        classes: from category id to name, by rising id; the position is the class index.
        num_images, num_objects: images, and annotations that are no crowds.
        num_stray: annotations of images that the file does not list; `stray_example` is the id of
            one of them.
        not_evaluable: id of an annotation without `area` or `iscrowd`, which the COCO API needs
            for AP; None if all have them.
    """

    classes: Mapping[int, str]
    num_images: int
    num_objects: int
    num_stray: int
    stray_example: object
    not_evaluable: object

    def why_not_evaluable(self, source: str) -> str | None:
        """What keeps the COCO API from computing AP, and what to do; None if nothing does."""
        if self.not_evaluable is None:
            return None
        return (
            f"{source}: annotation {self.not_evaluable} has no 'area' or no 'iscrowd', which "
            "COCO's AP needs; add them (width times height of the box, and 0)"
        )


def summarise_coco_file(json_file: str | os.PathLike) -> CocoSummary:
    """Reads and checks a file; the summary of an unchanged file is remembered.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, no COCO file, or contradicts itself: duplicate ids or class
            names, a category that is not listed, an annotation without a box of four numbers.
    """
    path = os.path.expanduser(os.fspath(json_file))
    if not path:
        raise ValueError(
            "no annotation file was given: the path of the COCO JSON is empty; set it, and the "
            "folder of its images"
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"the annotation file {path} does not exist (working folder: {os.getcwd()}); check the "
            "path of the COCO JSON"
        )
    stat = os.stat(path)
    return _summarise(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _summarise(path: str, modified: int, size: int) -> CocoSummary:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:  # also what is not even UTF-8
        raise ValueError(
            f"{path} is not a JSON file ({error}); give the COCO annotation file, and download or "
            "write it again if it was cut off"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is JSON but no COCO file: its top level is a {type(content).__name__}, not an "
            "object with the lists 'images', 'annotations' and 'categories'"
        )
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(
                f"{path} is JSON but no COCO file: it has no list {key!r} (its keys: "
                f"{', '.join(map(repr, content)) or 'none'})"
            )
    annotations = content.get("annotations", [])
    if not isinstance(annotations, list):
        raise ValueError(f"{path}: 'annotations' must be a list, not {type(annotations).__name__}")
    if not content["categories"]:
        raise ValueError(f"{path}: the list 'categories' is empty; it must name the classes")

    _require_keys(path, "categories", content["categories"], ("id", "name"))
    _require_keys(path, "images", content["images"], ("id", "file_name", "height", "width"))
    _require_keys(path, "annotations", annotations, ("id", "image_id", "category_id", "bbox"))
    for key in ("categories", "images", "annotations"):
        _require_unique_ids(path, key, content.get(key, []))

    classes = {item["id"]: item["name"] for item in content["categories"]}
    require_distinct_names(classes.values(), path)
    images = {item["id"] for item in content["images"]}
    num_objects, stray, not_evaluable = 0, [], None
    for item in annotations:
        _check_annotation(path, item, classes)
        if item["image_id"] not in images:
            stray.append(item["id"])
        elif not item.get("iscrowd", 0):
            num_objects += 1
        if not_evaluable is None and not {"area", "iscrowd"} <= item.keys():
            not_evaluable = item["id"]
    return CocoSummary(
        classes={key: classes[key] for key in sorted(classes)},
        num_images=len(images),
        num_objects=num_objects,
        num_stray=len(stray),
        stray_example=stray[0] if stray else None,
        not_evaluable=not_evaluable,
    )


def _require_keys(path: str, list_name: str, items: list, keys: tuple[str, ...]) -> None:
    for index, item in enumerate(items):
        missing = [key for key in keys if not isinstance(item, dict) or key not in item]
        if missing:
            raise ValueError(
                f"{path}: {list_name}[{index}] has no {', '.join(map(repr, missing))}; COCO's "
                f"format needs {', '.join(map(repr, keys))} in every entry"
            )


def _require_unique_ids(path: str, list_name: str, items: list) -> None:
    seen = set()
    for item in items:
        if item["id"] in seen:
            raise ValueError(
                f"{path}: id {item['id']} occurs more than once in {list_name!r}; ids must be "
                "unique, give every entry its own"
            )
        seen.add(item["id"])


def _check_annotation(path: str, item: dict, classes: Mapping[int, str]) -> None:
    if item["category_id"] not in classes:
        raise ValueError(
            f"{path}: annotation {item['id']} has category_id {item['category_id']}, which is not "
            f"in 'categories' (ids {sorted(classes)}); add the category or correct the annotation"
        )
    bbox = item["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(v, Real) for v in bbox):
        raise ValueError(
            f"{path}: bbox of annotation {item['id']} is {bbox}; it must be four numbers, "
            "[x, y, width, height] in pixels"
        )
    if item.get("ignore", 0):
        raise ValueError(
            f"{path}: annotation {item['id']} sets 'ignore', which is not supported; remove the "
            "annotation, or mark a region that is not to be scored with 'iscrowd': 1"
        )
