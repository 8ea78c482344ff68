"""One part of a job: its pictures are read, objects found in them, and its file is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...data.images import ImageReadError
from ...errors import UserError
from ...ops.memory import kept_memory
from ...untrusted.files import digest_of
from ...untrusted.pictures import limit_pixels
from ..detector import Detections, Detector
from ..predict import detect_images
from ..results import rounded_objects
from ..selection import Selection
from ..tiles import Tiling
from .addresses import UnreachableError, read_address
from .part_files import Manifest, Store, decode_rows, encode_rows

_MOST_UNREACHABLE = 20  # pictures in a row


class Part(NamedTuple):
    """What one process does at a time."""

    number: int
    pictures: list[str]  # paths and addresses


class Done(NamedTuple):
    """What came of a part."""

    number: int
    num_pictures: int
    num_objects: int
    unreadable: list[str]  # what is wrong with those of its pictures that have no detections


@dataclass(frozen=True)
class Task:
    """What all processes of a job do; it can be sent to them.

    Attributes:
        loading: arguments of :meth:`Detector.from_checkpoint`, but the device.
        digest: of the checkpoint.
        max_pixels: see :func:`stage_interactor.untrusted.pictures.limit_pixels`.
    """

    store: Store
    manifest: Manifest
    loading: dict[str, Any]
    digest: str
    select: Selection
    tiling: Tiling | None
    batch_size: int
    max_pixels: int | None

    def load(self, device: str | None) -> "PartWriter":
        """In a process of its own, which may be on another machine.

        Raises:
            UserError: the checkpoint is another one there; and what ``from_checkpoint`` raises.
        """
        path = self.loading["path"]
        if digest_of(path) != self.digest:
            raise UserError(f"{path} is another file than where the job was begun")
        limit_pixels(self.max_pixels)
        return PartWriter(self, Detector.from_checkpoint(**self.loading, device=device))


@dataclass(frozen=True)
class PartWriter:
    """Does parts, one after the other."""

    task: Task
    detector: Detector
    # The last pictures, of parts before as well, which it is the place's fault not to have.
    _unreachable: list[str] = field(default_factory=list, init=False, repr=False)
    # A picture of each place, such as a bucket, that could be fetched.
    _reached: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @kept_memory()
    def __call__(self, part: Part) -> Done:
        """
        Raises:
            UserError: a picture could not be fetched, and it is the place that is at fault, see
                :meth:`read`.
            OSError: the part cannot be written.
        """
        task = self.task
        rows: dict[int, dict[str, Any]] = {}
        for number, found, _ in detect_images(
            self.detector,
            part.pictures,
            task.select,
            batch_size=task.batch_size,
            tiling=task.tiling,
            read=self.read,
        ):
            rows[number] = _row(part.pictures[number], found)
        ordered = [rows[number] for number in range(len(part.pictures))]
        output_format = task.manifest.output_format
        task.store.write(task.manifest.name(part.number), encode_rows(ordered, output_format))
        return _counted(part.number, ordered)

    def read(self, address: str) -> np.ndarray:
        """See :func:`read_address`.

        A picture that cannot be fetched is an error of its own, and so a row of its part for good,
        where another one of that place still can.

        Raises:
            UserError: none can any more, or so many in a row cannot that it is not up to them.
        """
        try:
            picture = read_address(address)
        except UnreachableError as error:
            picture = self._read_again(address, error)
        except ImageReadError:  # it was fetched, or is not there
            self._unreachable.clear()
            raise
        self._unreachable.clear()
        self._reached[_place_of(address)] = address
        return picture

    def _read_again(self, address: str, error: UnreachableError) -> np.ndarray:
        if known := self._reached.get(_place_of(address)):
            try:
                read_address(known)
            except UnreachableError:
                told = f"{address}: {error.reason}; and {known} cannot any more, either"
                raise UserError(told) from error
            except ImageReadError:
                pass  # the place has answered
            try:
                return read_address(address)
            except UnreachableError as again:
                error = again
        self._unreachable.append(address)
        if (number := len(self._unreachable)) == _MOST_UNREACHABLE:
            raise UserError(f"{address}: {error.reason}, as {number - 1} before it") from error
        raise error


def _place_of(address: str) -> str:
    """What all pictures of a server or a bucket have in common."""
    return "/".join(address.rpartition("::")[2].split("/", 3)[:3])  # of an archive, where it lies


def _row(file: str, found: Detections | str) -> dict[str, Any]:
    # Names of files need not be text, which what reads the rows asks for.
    row: dict[str, Any] = {"file": file.encode("utf-8", "backslashreplace").decode()}
    if isinstance(found, str):
        told = found.encode("utf-8", "backslashreplace").decode()
        nothing: dict[str, list] = {"boxes": [], "scores": [], "classes": [], "names": []}
        return {**row, "width": None, "height": None, **nothing, "error": told}
    height, width = found.image_size
    objects = [*rounded_objects(found)]
    return {
        **row,
        "width": width,
        "height": height,
        "boxes": [list(corners) for _, _, _, corners, _ in objects],
        "scores": [score for _, score, *_ in objects],
        "classes": [index for index, *_ in objects],
        "names": [name for _, _, name, *_ in objects],
        "error": None,
    }


def _counted(number: int, rows: Sequence[dict[str, Any]]) -> Done:
    unreadable = [f"{row['file']}: {row['error']}" for row in rows if row["error"] is not None]
    return Done(number, len(rows), sum(len(row["scores"]) for row in rows), unreadable)


def read_done(store: Store, manifest: Manifest, number: int) -> Done:
    """Of a part that was written before.

    Raises:
        UserError: the file is not what this job has written there.
    """
    name, chosen = manifest.name(number), manifest.slice(number)
    try:
        columns = ("file", "scores", "error")
        rows = decode_rows(store.read(name), manifest.output_format, columns)
        if len(rows) != chosen.stop - chosen.start:
            raise ValueError(f"it has {len(rows)} rows, not {chosen.stop - chosen.start}")
        return _counted(number, rows)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{store.path(name)} is no part of this job ({error}): remove it, and the same command "
            "makes it anew"
        ) from error
