"""Detections of many pictures, as objects, as COCO JSON and as CSV."""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..writing import write_text
from .detector import Detections

FILES = ("predictions.json", "predictions.csv")
FIELDS = ("file", "frame", "class", "score", "left", "top", "right", "bottom", "time")


@dataclass(frozen=True)
class Found:
    """The detections of one picture of a file.

    ``path, name, frame, detections = found`` unpacks the first four.
    """

    path: str
    name: str  # that it is written under: the path within what all files have in common
    frame: int | None  # of a video, from 0
    detections: Detections
    time: float | None = None  # of a video's frame, in seconds from the start

    def __iter__(self) -> Iterator[Any]:
        return iter((self.path, self.name, self.frame, self.detections))


class Results:
    """What was found, picture by picture.

    Attributes:
        found: in order; iterating over the results gives the same.
        unreadable: what is wrong with the files that could not be read, or whose detections are
            NaN or infinite.
        num_files: that were asked for, readable or not.
        passed_over: how many files of folders are no images or videos, by suffix, "" for none.
    """

    def __init__(
        self,
        categories: Sequence[Mapping[str, Any]],
        num_files: int = 0,
        passed_over: Mapping[str, int] | None = None,
    ):
        self.categories = categories  # COCO's, by class index
        self.found: list[Found] = []
        self.unreadable: list[str] = []
        self.num_files = num_files
        self.passed_over = Counter(passed_over or {})

    def __iter__(self) -> Iterator[Found]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def num_objects(self) -> int:
        return sum(len(item.detections) for item in self.found)

    def to_coco(self) -> dict[str, list]:
        """As the content of a COCO file, with scores; boxes in pixels of the original picture."""
        images: list[dict] = []
        annotations: list[dict] = []
        for image_id, item in enumerate(self.found, start=1):
            height, width = item.detections.image_size
            image = {"id": image_id, "file_name": item.name, "width": width, "height": height}
            if item.frame is not None:
                image |= {"frame": item.frame, "time": item.time}
            images.append(image)
            for index, score, _, (left, top, right, bottom) in rounded_objects(item.detections):
                size = round(right - left, 2), round(bottom - top, 2)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": self.categories[index]["id"],
                        "bbox": [left, top, *size],
                        "area": round(size[0] * size[1], 2),
                        "iscrowd": 0,
                        "score": score,
                    }
                )
        return {
            "images": images,
            "categories": list(self.categories),
            "annotations": annotations,
        }

    def to_rows(self) -> list[tuple]:
        """A row of :data:`FIELDS` for each object."""
        return [
            (item.name, item.frame, name, score, *corners, item.time)
            for item in self.found
            for _, score, name, corners in rounded_objects(item.detections)
        ]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes predictions.json and predictions.csv.

        Names that a spreadsheet would take for a formula, and run, are changed in the CSV alone:
        files as ``./=name.jpg``, which is the same path, classes as ``'=name``.

        Raises:
            OSError: one of them cannot be written; see :func:`stage_interactor.writing.new_file`.
        """
        os.makedirs(folder, exist_ok=True)
        content = json.dumps(self.to_coco(), allow_nan=False)
        write_text(os.path.join(folder, "predictions.json"), content)
        table = io.StringIO(newline="")
        rows = (
            (_harmless(name, "./"), frame, _harmless(label, "'"), *rest)
            for name, frame, label, *rest in self.to_rows()
        )
        csv.writer(table).writerows([FIELDS, *rows])
        write_text(os.path.join(folder, "predictions.csv"), table.getvalue())


def _harmless(text: str, prefix: str) -> str:
    """With a prefix, if a spreadsheet would take it for a formula; a number is none."""
    is_number = re.fullmatch(r"[+-]?[\d.]+", text)
    if is_number or not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    return f"{prefix}{text}"


def rounded_objects(found: Detections) -> Iterator[tuple[int, float, str, tuple[float, ...]]]:
    """Class index, score, name and corners of each object, rounded as they are written."""
    for box, score, index, name in zip(
        found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), found.names
    ):
        yield index, round(score, 4), name, tuple(round(value, 2) for value in box)
