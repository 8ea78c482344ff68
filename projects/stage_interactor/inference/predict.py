"""Predicting on files: images and videos, folders of them, with annotated copies if wanted."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EISDIR
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..d2.detections import UnusableDetectionsError
from ..data import ImageReadError, read_image
from ..data.grouping import batches_by_size
from ..errors import UserError
from ..modeling.batches import padded_size
from ..ops.memory import kept_memory
from ..pages.page import save_picture
from ..untrusted.pictures import PictureTooLargeError
from ..writing import inside
from .detector import Detections, Detector
from .frames import Drawing, FrameDetector
from .results import FILES, Found, Results
from .selection import Selection, Threshold
from .sources import Source, VideoWriter, find_sources, open_video
from .tiles import Tiling, tiling_of
from .tracking import Tracker
from .values import whole

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_LONGEST_NAME = 255  # bytes, of a file
_MISSING = 1.0  # seconds, and a tenth, that a video may be shorter than it says


@kept_memory()
def predict_files(
    detector: Detector,
    places: Iterable[str | os.PathLike] | str | os.PathLike,
    *,
    threshold: Threshold = None,
    batch_size: int = 1,
    tiles: int | None = None,
    overlap: float | None = None,
    track: bool = False,
    output_dir: str | os.PathLike | None = None,
    pictures: bool = True,
    progress: bool = True,
    **options: Any,
) -> Results:
    """Finds objects in files.

    Those that cannot be read, or whose detections are NaN or infinite, are named in the results and
    skipped.

    Args:
        detector: finds them.
        places: image, video, folder (and all below it) or glob, or several of these.
        threshold: detections with a lower score are left out: one for all classes, or for some by
            their names; see :class:`Detector`.
        batch_size: pictures that the model gets at once, where there are as many of one size among
            those that are read next; or tiles of one.
        tiles, overlap: look at larger pictures, and frames, in tiles; see :meth:`Detector.detect`.
        track: give the objects of videos ids, see :class:`.tracking.Tracker`; they count on from
            one video to the next.
        output_dir: where predictions.json (COCO), predictions.csv and, with ``pictures``, annotated
            copies are written; nothing is written by default.
        progress: show a bar.
        options: ``classes``, ``multi_label``, ``nms``, ``agnostic``, ``max_detections``, see
            :meth:`Detector.select`.

    Raises:
        FileNotFoundError: there is no such file, or no image or video in a folder.
        ValueError: a value is out of its range, a class is unknown, an annotated copy would
            overwrite its original, or the objects of a picture are to be tracked.
        UserError: they are to be tracked without the package trackers.
    """
    batch_size = whole(batch_size, "batch_size (--batch-size)")
    select = detector.select(threshold, **options)
    if track:
        require_tracking(select)
    tiling = tiling_of(tiles, overlap, batch_size)
    sources, passed_over = find_sources(
        [places] if isinstance(places, (str, os.PathLike)) else places
    )
    if track and (still := next((item for item in sources if not item.is_video), None)):
        raise ValueError(
            f"{still.path} is a picture, and objects are tracked (track, --track) in videos and "
            "live sources: name these alone"
        )
    copies: dict[Source, str] = {}
    if output_dir is not None:
        require_places(output_dir)
        if pictures:
            copies = _places_of_copies(sources, os.fspath(output_dir))
    results = Results(detector.categories, len(sources), passed_over)
    task = _Prediction(detector, select, batch_size, tiling, track, copies, progress, results)
    try:
        task.predict_images([source for source in sources if not source.is_video])
        for source in sources:
            if source.is_video:
                task.predict_video(source)
    finally:  # what was found is kept also when a later file is the end of it
        if output_dir is not None:
            results.save(output_dir)
    return results


def require_tracking(select: Selection) -> None:
    """Raises an error where objects cannot be tracked: before anything is looked at."""
    if select.multi_label:
        raise ValueError(
            "multi_label (--multi-label) gives an object several boxes, which cannot be tracked "
            "(track, --track): leave one of the two out"
        )
    Tracker()


def require_places(folder: str | os.PathLike) -> None:
    """Raises an IsADirectoryError where predictions.json or predictions.csv is a folder."""
    for name in FILES:
        if os.path.isdir(path := os.path.join(folder, name)):
            raise IsADirectoryError(EISDIR, "a file of this name is to be written", path)


def _places_of_copies(sources: Sequence[Source], folder: str) -> dict[Source, str]:
    """Where the annotated copies go, each to a place of its own.

    Raises:
        ValueError: to the place of an original.
        OSError: out of the folder, through a link in it.
    """
    originals = {os.path.realpath(source.path) for source in sources}
    places: dict[Source, str] = {}
    # Others are changed where they would be the same, so these come first.
    taken = {source.name for source in sources if source.annotated == source.name}
    for source in sources:
        top, slash, rest = source.annotated.partition(os.sep)
        wanted = f"{top}_{slash}{rest}" if top in FILES else source.annotated
        name, number = _short(wanted), 1
        while name != source.name and name in taken:
            number += 1
            name = _short(wanted, f"_{number}")
        taken.add(name)
        path = places[source] = inside(folder, name)
        if os.path.realpath(path) in originals:
            raise ValueError(
                f"output folder {folder}: {path} would be overwritten by an annotated copy; name "
                "another folder"
            )
    return places


def _short(path: str, number: str = "") -> str:
    """With a number in it, and a name that is not longer than file systems take."""
    stem, suffix = os.path.splitext(path)
    folder, stem = os.path.split(stem)
    while len(os.fsencode(f"{stem}{number}{suffix}")) > _LONGEST_NAME:
        stem = stem[:-1]
    return os.path.join(folder, f"{stem}{number}{suffix}")


class _Read(NamedTuple):
    number: int  # of its source
    picture: np.ndarray | None  # (H, W, 3); None where it is not needed any more
    prepared: dict[str, Any] | None  # None where it is to be looked at in tiles

    def size(self, divisibility: int) -> tuple[int, int]:
        """Pictures of the same one go through the model together."""
        if self.prepared is None:
            return 0, 0
        return padded_size(self.prepared["image"], divisibility)

    def num_bytes(self) -> int:
        drawn = 0 if self.picture is None else self.picture.nbytes
        return drawn + (0 if self.prepared is None else self.prepared["image"].nbytes)


def detect_images(
    detector: Detector,
    files: Sequence[str],
    select: Selection,
    *,
    batch_size: int = 1,
    tiling: Tiling | None = None,
    read: Callable[[str], np.ndarray] = read_image,
    kept: Callable[[int], bool] = lambda number: False,
) -> Iterator[tuple[int, Detections | str, np.ndarray | None]]:
    """Finds objects in pictures, as :func:`predict_files` does, in batches of one size.

    Args:
        read: gives the picture of a file, uint8 (H, W, 3) RGB, or raises an ImageReadError.
        kept: whether the picture of this number is wanted as well.

    Yields:
        The number of each file, once and in whatever order; its detections, or what is wrong with
        it; the picture, or None.
    """
    divisibility = getattr(detector.model, "size_divisibility", 1)
    wrong: list[tuple[int, str]] = []

    def prepared() -> Iterator[_Read]:
        for number, file in enumerate(files):
            try:
                picture = read(file)
                if tiling:
                    yield _Read(number, picture, None)
                else:
                    drawn = picture if kept(number) else None
                    yield _Read(number, drawn, detector.prepare(picture))
            except PictureTooLargeError as error:
                wrong.append((number, str(error)))
            except ImageReadError as error:
                wrong.append((number, str(error.reason)))

    for batch in batches_by_size(
        prepared(),
        1 if tiling else batch_size,
        size=lambda item: item.size(divisibility),
        num_bytes=_Read.num_bytes,
    ):
        for item, found in zip(batch, _detect(detector, batch, select, tiling)):
            if isinstance(found, UserError):
                yield item.number, str(found), None
            else:
                yield item.number, found, item.picture if kept(item.number) else None
        while wrong:
            yield *wrong.pop(0), None
    yield from ((number, told, None) for number, told in wrong)


def _detect(
    detector: Detector, batch: Sequence[_Read], select: Selection, tiling: Tiling | None
) -> Iterable[Detections | UnusableDetectionsError | PictureTooLargeError]:
    """Of each picture, or what is wrong with it."""
    if tiling is None:
        prepared = [item.prepared for item in batch if item.prepared]
        yield from detector.detect_prepared(prepared, select)
        return
    for item in batch:
        assert item.picture is not None
        try:
            yield detector.detect_tiled(item.picture, tiling, select)
        except PictureTooLargeError as error:
            yield error


@dataclass
class _Prediction:
    """One call of :func:`predict_files`, whose arguments these are."""

    detector: Detector
    select: Selection
    batch_size: int
    tiling: Tiling | None
    track: bool
    copies: Mapping[Source, str]  # paths of the annotated copies, if there are to be any
    progress: bool
    results: Results
    next_id: int = 1  # of an object that is tracked

    def predict_images(self, sources: Sequence[Source]) -> None:
        done: dict[int, Found | str] = {}  # by number; or what is wrong
        hidden = not (sources and self.progress)
        draw = Drawing(self.detector.class_names)
        with tqdm(total=len(sources), unit="image", disable=hidden) as progress:
            try:
                for number, found, picture in detect_images(
                    self.detector,
                    [source.path for source in sources],
                    self.select,
                    batch_size=self.batch_size,
                    tiling=self.tiling,
                    kept=lambda number: sources[number] in self.copies,
                ):
                    source = sources[number]
                    progress.update()
                    if isinstance(found, str):
                        done[number] = f"{source.path}: {found}"
                        continue
                    done[number] = Found(*source, frame=None, detections=found)
                    if picture is not None:
                        drawn = Image.fromarray(draw(picture, found))
                        save_picture(drawn, self.copies[source])
            finally:
                for _, result in sorted(done.items()):
                    if isinstance(result, str):
                        self.results.unreadable.append(result)
                    else:
                        self.results.found.append(result)

    def predict_video(self, source: Source) -> None:
        number, end = 0, 0.0
        problems: list[str] = []
        unusable: list[str] = []  # frames
        tracker = None
        try:
            with ExitStack() as stack:
                video = stack.enter_context(open_video(source.path))
                bar = tqdm(
                    total=video.length, unit="frame", desc=source.name, disable=not self.progress
                )
                progress = stack.enter_context(bar)
                copy = None
                if source in self.copies:
                    copy = stack.enter_context(VideoWriter(self.copies[source], video.rate))
                tracker = Tracker(float(video.rate), self.next_id) if self.track else None
                detect = FrameDetector(self.detector, self.select, self.tiling, tracker)
                draw = Drawing(self.detector.class_names)
                for batch in _batches(video.frames, 1 if self.tiling else self.batch_size):
                    for frame, found in zip(batch, detect(batch)):
                        if isinstance(found, UserError):
                            unusable.append(f"frame {number}: {found}")
                        else:
                            time = round(float(frame.time), 6)
                            self.results.found.append(Found(*source, number, found, time))
                            if copy is not None:
                                frame = frame._replace(picture=draw(frame.picture, found))
                        number, end = number + 1, float(frame.time + frame.duration)
                        if copy is not None:
                            copy.write(frame)
                        progress.update()
                # FFmpeg says nothing of a file that has lost its end. One frame is a sound's cover.
                seconds = video.seconds or 0
                if number > 1 and end < min(seconds - _MISSING, 0.9 * seconds):
                    told = f"its pictures end after {end:.1f} of the {seconds:.1f} s"
                    problems.append(f"{told} that it says it has")
        except (av.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.filename == self.copies.get(source, ""):
                raise  # of writing
            reason = getattr(error, "strerror", None) or str(error)
            problems.append(f"{reason} (after {number} frames)" if number else reason)
        if tracker is not None:
            self.next_id = tracker.next_id
        if unusable:
            problems.append(
                f"{len(unusable)} of {number} frames are left out, such as {unusable[0]}"
            )
        if problems:
            self.results.unreadable.append(f"{source.path}: {'; '.join(problems)}")


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
