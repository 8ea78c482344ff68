"""Of a report: how matches wander while a detector learns, and why an object was missed."""

import io
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..untrusted.files import require_regular_file
from . import charts
from .matching import IOU, ImageResult
from .object_trace import ObjectTrace
from .page import section

# Of each object, by the names of what is in a file; see ObjectTrace for the last five.
ROWS = ("image", "boxes", "classes", "query", "iou", "nearest", "score", "labels")

_LARGEST = 2**28  # bytes of the arrays of a file
_FARTHEST = 1.5  # pixels between a box of the data and what a mapper made of it and back
_MOST_ROWS, _MOST_STAGES = 200, 100
_PLAIN = re.compile(r"flight(_\d{7,12})?\.npz")

UNSURE = "its query is not sure enough of the class"
TAKEN = "its query's box counts for another object, or loses to another box"
OTHERS = "a box is near enough, of a query that matching does not give it"
LOST = "an earlier stage had it, the last one does not"
FAR = "no query came near enough"


def file_name(iteration: int | None) -> str:
    """Of an evaluation after an iteration, from 0, of a training; or of one without a training."""
    return "flight.npz" if iteration is None else f"flight_{iteration:07d}.npz"


class Flight(NamedTuple):
    """What a flight recorder kept of T objects on L stages, at one evaluation.

    Arrays are those of :class:`~stage_interactor.pages.object_trace.ObjectTrace` with the objects
    on the first axis; boxes are xyxy in pixels of the picture.
    """

    image_ids: np.ndarray  # (I,) text
    class_names: np.ndarray  # (C,) text
    image: np.ndarray  # (T,) index of the image
    boxes: np.ndarray  # (T, 4)
    classes: np.ndarray  # (T,) index of the class
    query: np.ndarray  # (T, L)
    iou: np.ndarray  # (T, L)
    nearest: np.ndarray  # (T, L)
    score: np.ndarray  # (T, L)
    labels: np.ndarray  # (T, L, L)

    @property
    def queries_labelled(self) -> np.ndarray:
        """(T, L) how many queries of a stage carry the object as a label."""
        of_objects = (torch.from_numpy(getattr(self, name)) for name in ObjectTrace._fields)
        trace = ObjectTrace(*(values.movedim(0, -1) for values in of_objects))
        return trace.queries_labelled.T.numpy()

    def has_objects_of(self, other: "Flight") -> bool:
        """Whether another one is of the same objects, in the same order."""
        return (
            self.query.shape == other.query.shape
            and np.array_equal(self.image_ids, other.image_ids)
            and np.array_equal(self.image, other.image)
            and np.array_equal(self.boxes, other.boxes)
        )


def read_flight(path: str) -> Flight:
    """A file of a flight recorder; nothing in it is unpickled.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    try:
        require_regular_file(path)
    except OSError as error:
        raise OSError(f"{path}: {error}") from error
    try:
        flight = Flight(**_arrays(path))
        objects, stages = flight.query.shape
        shapes = {
            "image": (objects,), "boxes": (objects, 4), "classes": (objects,),
            "iou": (objects, stages), "nearest": (objects, stages), "score": (objects, stages),
            "labels": (objects, stages, stages),
        }  # fmt: skip
        right = (
            0 < stages <= _MOST_STAGES
            and all(getattr(flight, name).shape == shape for name, shape in shapes.items())
            and all(getattr(flight, name).dtype.kind in "if" for name in ROWS)
            and all(
                getattr(flight, name).dtype.kind == "i"
                for name in ("image", "classes", "query", "labels")
            )
            and flight.image_ids.dtype.kind == flight.class_names.dtype.kind == "U"
            and flight.image_ids.ndim == flight.class_names.ndim == 1
            and _within(flight.image, len(flight.image_ids))
            and _within(flight.classes, len(flight.class_names))
            and bool(np.isfinite(flight.boxes).all())
        )
    except (
        zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, KeyError, EOFError, TypeError,
        SyntaxError, MemoryError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} is not what a flight recorder writes ({error})") from error
    if not right:
        raise ValueError(f"{path} is not what a flight recorder writes")
    return flight


def _arrays(path: str) -> dict[str, np.ndarray]:
    """Of a file, each no larger than what its part of the file holds."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        if sum(item.file_size for item in archive.infolist()) > _LARGEST:
            raise ValueError("it holds more than a run can have")
        for name in Flight._fields:
            content = archive.read(f"{name}.npy")
            with io.BytesIO(content) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"{name} is of another version")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                values = content[file.tell() :]
            if dtype.hasobject:
                raise ValueError(f"{name} holds more than numbers or text")
            order: Any = "F" if fortran else "C"
            arrays[name] = np.frombuffer(values, dtype).reshape(shape, order=order).copy()
    return arrays


def _within(indices: np.ndarray, count: int) -> bool:
    return not len(indices) or bool(0 <= indices.min() and indices.max() < count)


def read_flights(folder: str) -> dict[int, Flight]:
    """Those of a run by their iterations, in ascending order; -1 is that of an evaluation alone.

    Raises:
        OSError, ValueError: see :func:`read_flight`.
    """
    names = sorted(filter(_PLAIN.fullmatch, os.listdir(folder)))
    numbered = [name for name in names if name != file_name(None)]
    return {
        int(name[7:-4]) if name != file_name(None) else -1: read_flight(os.path.join(folder, name))
        for name in numbered or names
    }


def matching_section(flights: Mapping[int, Flight]) -> dict:
    """Charts of a training; at one evaluation a table is enough."""
    last = flights[max(flights)]
    stages = range(last.query.shape[1])
    text = (
        "Of the objects of the images that are evaluated, and the queries that one-to-one matching "
        "gives to them on each stage."
    )
    if max(flights) >= 0:
        text += f" The table is of iteration {max(flights)}."
    rows: list[tuple] = [("stage", "mean IoU", "labels an object", "another query than before, %")]
    iou, labels, wandered = _mean_iou(last), _mean_labels(last), _changed(last)
    for stage in stages:
        moved = f"{wandered[stage - 1]:.1f}" if stage else ""
        figures = (f"{iou[stage]:.3f}", f"{labels[stage]:.2f}", moved)
        rows.append((stage + 1, *(figures if len(last.query) else ("", "", ""))))
    drawn = []
    if len(flights) > 1:
        x = [*flights]
        of = [flights[iteration] for iteration in x]
        pairs = [
            (at, _another(now.query, before.query))
            for at, before, now in zip(x[1:], of, of[1:])
            if now.has_objects_of(before) and len(now.query)
        ]
        if pairs:
            curves = {
                f"stage {stage + 1}": (
                    [at for at, _ in pairs],
                    [float(shares[stage]) for _, shares in pairs],
                )
                for stage in stages
            }
            title = "Objects with another query than at the evaluation before"
            drawn.append((title, charts.lines(curves, x="iteration", y="%", bottom=0)))
        if all(f.query.shape[1] == len(stages) and len(f.query) for f in of):
            for title, y, values in (
                ("Objects with another query than on the stage before", "%", _changed),
                ("Mean IoU of the objects with their queries", "IoU", _mean_iou),
                ("Queries that carry an object as a label", "queries", _mean_labels),
            ):
                found = [values(flight) for flight in of]
                first = len(stages) - len(found[0])
                curves = {
                    f"stage {first + stage + 1}": (x, [float(row[stage]) for row in found])
                    for stage in range(len(found[0]))
                }
                if curves:
                    drawn.append((title, charts.lines(curves, x="iteration", y=y, bottom=0)))
    return section("Matching", text=text, charts=drawn, table=rows)


def _changed(flight: Flight) -> np.ndarray:
    """(L - 1,) per cent of the objects that another query has than on the stage before."""
    return _another(flight.query[:, 1:], flight.query[:, :-1])


def _another(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Of columns the share in which they differ, in per cent, of objects that have a query."""
    counted = (now >= 0) | (before >= 0)
    return 100 * (now != before).sum(0) / np.maximum(counted.sum(0), 1)


def _mean_iou(flight: Flight) -> np.ndarray:
    """(L,) of the objects that have a query."""
    matched = flight.query >= 0
    return (flight.iou * matched).sum(0) / np.maximum(matched.sum(0), 1)


def _mean_labels(flight: Flight) -> np.ndarray:
    return flight.queries_labelled.sum(0) / max(len(flight.query), 1)


def why_missed(flight: Flight, index: int, threshold: float) -> str:
    """The reason, of an object that no detection from the threshold on finds."""
    nearest = flight.nearest[index]
    if flight.iou[index, -1] >= IOU:
        return UNSURE if flight.score[index, -1] < threshold else TAKEN
    if nearest[-1] >= IOU:
        return OTHERS
    return LOST if (nearest >= IOU).any() else FAR


def missed_section(
    flights: Mapping[int, Flight],
    evaluated: int,
    results: Sequence[ImageResult],
    names: Sequence[str],
    thresholds: Sequence[float],
) -> dict | None:
    """Why the missed objects were; None if the recorder has kept none of them.

    Args:
        evaluated: the iteration whose evaluation the results are of, -1 without a training.
        names, thresholds: of the classes of the data, by their index in ``results``.
    """
    if evaluated not in flights:
        text = (
            f"The flight recorder's last evaluation is that of iteration {max(flights)}, and the "
            "detections are of another one: they are not joined."
        )
        return section("Why missed", text=text)
    flight = flights[evaluated]
    of_image: dict[str, np.ndarray] = {}
    order = np.argsort(flight.image, kind="stable")
    for at, rows in zip(*_groups(flight.image[order], order)):
        of_image[str(flight.image_ids[at])] = rows
    reasons: Counter[str] = Counter()
    table: list[tuple[float, tuple]] = []
    others = 0
    for result in results:
        rows = of_image.get(str(result.image_id), np.empty(0, dtype=int))
        for index in np.flatnonzero(result.missed):
            box, label = result.object_boxes[index], int(result.object_classes[index])
            same = rows[flight.class_names[flight.classes[rows]] == names[label]]
            off = np.abs(flight.boxes[same] - box).max(1, initial=0)
            if not len(same) or off.min() > _FARTHEST:
                others += 1
                continue
            row = int(same[off.argmin()])
            rows = rows[rows != row]  # an object of the same box has a row of its own
            reason = why_missed(flight, row, thresholds[label])
            reasons[reason] += 1
            width, height = box[2] - box[0], box[3] - box[1]
            told = [
                f"query {query}, IoU {iou:.2f}, score {score:.2f}" if query >= 0 else "no query"
                for query, iou, score in zip(flight.query[row], flight.iou[row], flight.score[row])
            ]
            name = os.path.basename(result.file_name)
            size = f"{width:.0f} x {height:.0f}"
            table.append((width * height, (name, names[label], size, reason, *told)))
    if not reasons:
        return None
    table.sort(key=lambda item: -item[0])
    stages = [f"stage {stage + 1}" for stage in range(flight.query.shape[1])]
    head: tuple[Any, ...] = ("image", "class", "size", "why", *stages)
    text = (
        f"{sum(reasons.values())} objects that no detection finds, largest first, with the query "
        "that matching gives to each on every stage, the IoU of its box there, and its score for "
        "the object's class."
    )
    if len(table) > _MOST_ROWS:
        text += f" The table has the largest {_MOST_ROWS}."
    if others:
        text += f" Of {others} more nothing was recorded."
    bars = charts.bars(dict(reasons.most_common()), x="objects")
    rows_shown = [head, *(row for _, row in table[:_MOST_ROWS])]
    return section("Why missed", text=text, charts=[("Reasons", bars)], table=rows_shown)


def _groups(values: np.ndarray, order: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """Distinct sorted values, and of each the entries of ``order``."""
    found, starts = np.unique(values, return_index=True)
    return found.tolist(), np.split(order, starts[1:])
