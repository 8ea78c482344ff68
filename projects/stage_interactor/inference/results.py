"""Detections of many pictures, as objects, as COCO JSON and as CSV."""

import csv
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Any

from ..errors import naming, signals_wait
from ..writing import growing_file, new_file, write_text
from .detector import Detections

FILES = ("predictions.json", "predictions.csv")
FIELDS = ("file", "frame", "class", "score", "left", "top", "right", "bottom", "time")
TRACK = "track"  # one more, behind these, where objects are tracked


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
        """As the content of a COCO file, with scores; boxes in pixels of the original picture.

        Where objects are tracked, with ``videos``, ``video_id`` and ``track_id`` as in COCO-VID and
        TAO; an object that has no track yet has no ``track_id``.
        """
        entries = Entries(self.categories)
        images: list[dict] = []
        annotations: list[dict] = []
        for item in self.found:
            image, found = entries.of(item)
            images.append(image)
            annotations += found
        return {"images": images, **entries.last(), "annotations": annotations}

    def to_rows(self) -> list[tuple]:
        """A row of :data:`FIELDS` for each object; with its track, if any picture has such."""
        return [row for item in self.found for row in rows_of(item, self.tracked)]

    @property
    def tracked(self) -> bool:
        """Whether objects are tracked."""
        return any(item.detections.tracks is not None for item in self.found)

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
        rows = [head(self.tracked), *map(harmless, self.to_rows())]
        write_text(os.path.join(folder, "predictions.csv"), as_csv(rows))


class GrowingResults:
    """Detections of a live source, written as they come: memory does not grow with them.

    predictions.csv can be read at any time. predictions.json is there at the end, however that
    comes; until then its parts lie in files without a name, which end with the process.

    Attributes:
        num_objects: so far.

    Raises:
        OSError: one of them cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        categories: Sequence[Mapping[str, Any]],
        tracked: bool = False,
    ):
        self.num_objects = 0
        self._folder, self._tracked = os.fspath(folder), tracked
        self._entries = Entries(categories)
        self._open = ExitStack()

    def __enter__(self) -> "GrowingResults":
        os.makedirs(self._folder, exist_ok=True)
        table, self._json = (os.path.join(self._folder, name) for name in reversed(FILES))
        with self._open:
            self._table = self._open.enter_context(growing_file(table))
            with suppress(FileNotFoundError):  # of another table
                os.unlink(self._json)
            parts = (TemporaryFile(dir=self._folder) for _ in range(2))
            self._images, self._annotations = map(self._open.enter_context, parts)
            self._append(self._table, as_csv([head(self._tracked)]))
            self._table.flush()
            self._open = self._open.pop_all()
        return self

    def add(self, item: Found) -> None:
        """Writes what is found in the next frame."""
        self.num_objects += len(item.detections)
        rows = as_csv(map(harmless, rows_of(item, self._tracked)))
        image, annotations = self._entries.of(item)
        with naming(self._json):
            for file, entries in ((self._images, [image]), (self._annotations, annotations)):
                for entry in entries:
                    separator = ",\n" if file.tell() else ""
                    self._append(file, separator + json.dumps(entry, allow_nan=False))
        self._append(self._table, rows)
        self._table.flush()

    def __exit__(self, *exception: object) -> None:
        with signals_wait(), self._open, new_file(self._json) as whole:
            for name, file in (("images", self._images), ("annotations", self._annotations)):
                self._append(whole, f'{"," if whole.tell() else "{"}"{name}": [')
                file.seek(0)
                shutil.copyfileobj(file, whole)
                self._append(whole, "]")
            self._append(
                whole,
                "".join(
                    f", {json.dumps(name)}: {json.dumps(values)}"
                    for name, values in self._entries.last().items()
                )
                + "}",
            )

    @staticmethod
    def _append(file: IO[bytes], text: str) -> None:
        file.write(text.encode("utf-8", "backslashreplace"))


class Entries:
    """What a COCO file holds, picture by picture."""

    def __init__(self, categories: Sequence[Mapping[str, Any]]):
        self._categories = categories
        self._num_images = self._num_annotations = 0
        self._videos: dict[str, int] = {}  # ids by name, of those in which objects are tracked

    def of(self, item: Found) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The next picture, and its objects."""
        self._num_images += 1
        detections = item.detections
        height, width = detections.image_size
        image = {"id": self._num_images, "file_name": item.name, "width": width, "height": height}
        if item.frame is not None:
            image |= {"frame": item.frame, "time": item.time}
        of_video = {}
        if detections.tracks is not None:
            of_video["video_id"] = self._videos.setdefault(item.name, len(self._videos) + 1)
        annotations = []
        for index, score, _, (left, top, right, bottom), track in rounded_objects(detections):
            self._num_annotations += 1
            size = round(right - left, 2), round(bottom - top, 2)
            annotation = {
                "id": self._num_annotations,
                "image_id": self._num_images,
                "category_id": self._categories[index]["id"],
                "bbox": [left, top, *size],
                "area": round(size[0] * size[1], 2),
                "iscrowd": 0,
                "score": score,
            } | of_video
            annotations.append(annotation if track is None else annotation | {"track_id": track})
        return image | of_video, annotations

    def last(self) -> dict[str, list]:
        """What is there once in a file."""
        videos = [{"id": number, "name": name} for name, number in self._videos.items()]
        return ({"videos": videos} if videos else {}) | {"categories": list(self._categories)}


def head(tracked: bool) -> tuple[str, ...]:
    return (*FIELDS, TRACK) if tracked else FIELDS


def rows_of(item: Found, tracked: bool) -> Iterator[tuple]:
    """A row for each object of a picture."""
    for _, score, name, corners, track in rounded_objects(item.detections):
        row = (item.name, item.frame, name, score, *corners, item.time)
        yield (*row, track) if tracked else row


def harmless(row: tuple) -> tuple:
    """A row without what a spreadsheet would take for a formula, and run."""
    name, frame, label, *rest = row
    return (_harmless(name, "./"), frame, _harmless(label, "'"), *rest)


def as_csv(rows: Iterable[tuple]) -> str:
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    return table.getvalue()


def _harmless(text: str, prefix: str) -> str:
    """With a prefix, if a spreadsheet would take it for a formula; a number is none."""
    is_number = re.fullmatch(r"[+-]?[\d.]+", text)
    if is_number or not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    return f"{prefix}{text}"


def rounded_objects(
    found: Detections,
) -> Iterator[tuple[int, float, str, tuple[float, ...], int | None]]:
    """Class index, score, name, corners, rounded as they are written, and track of each object."""
    tracks = [-1] * len(found) if found.tracks is None else found.tracks.tolist()
    for box, score, index, name, track in zip(
        found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), found.names, tracks
    ):
        corners = tuple(round(value, 2) for value in box)
        yield index, round(score, 4), name, corners, None if track < 0 else track
