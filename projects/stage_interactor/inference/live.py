"""Predicting on live sources, and frame by frame: cameras, streams of the network, video files."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from tqdm import tqdm

from ..errors import UserError, signals_wait
from ..ops.memory import kept_memory
from ..writing import inside
from .detector import Detections, Detector
from .frames import Drawing, FrameDetector
from .live_addresses import Address, live_address
from .predict import require_places, require_tracking
from .results import Found, GrowingResults
from .selection import Threshold
from .sources import Frame, VideoWriter, open_video
from .streams import RECONNECT, TIMEOUT, LiveFrames, LiveSourceError
from .tiles import tiling_of
from .tracking import Tracker
from .values import whole

_RATE = 25  # frames a second, of a live source, which does not say; times are those of the frames


@dataclass
class LiveResult:
    """What came of a live source.

    Attributes:
        shown: the source, without user, password and path.
        num_frames: that were looked at.
        num_objects: in them.
        dropped: frames that came while another one was looked at.
        unusable: what is wrong with frames that were looked at in vain, the first of them.
        num_unusable: how many those are.
        problem: why the source has ended by itself; None where it was ended here.
        copies: paths of the annotated videos, one for each size of frames in turn.
    """

    shown: str
    num_frames: int = 0
    num_objects: int = 0
    dropped: int = 0
    unusable: str = ""
    num_unusable: int = 0
    problem: str | None = None
    copies: list[str] = field(default_factory=list)


def predict_stream(
    detector: Detector,
    source: str | int | os.PathLike,
    *,
    threshold: Threshold = None,
    tiles: int | None = None,
    overlap: float | None = None,
    batch_size: int = 1,
    track: bool = False,
    seconds: float | None = None,
    frames: int | None = None,
    reconnect: int = RECONNECT,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Iterator[tuple[Frame, Detections]]:
    """Finds objects in the frames of a camera, a stream or a video, as they come.

    Of a live source each is the newest frame: those that come while another one is looked at are
    dropped, so that what is given is never late. Of a file none is.

    Args:
        detector: finds them.
        source: index of a camera, address that begins with ``rtsp://``, ``rtsps://``, ``http://``
            or ``https://``, or path of a video.
        threshold, options: as in :func:`stage_interactor.inference.predict.predict_files`.
        tiles, overlap, batch_size: look at large frames in tiles, so many at once.
        track: give objects ids, see :class:`.tracking.Tracker`.
        seconds, frames: the end: so long after the first frame, or after so many of them.
        reconnect, timeout: see :class:`.streams.LiveFrames`.

    Yields:
        A frame, RGB, with its time in seconds from the first one, and what is found in it.

    Raises:
        LiveSourceError: it cannot be opened, or is lost for good.
        UnusableDetectionsError: detections of a frame are NaN or infinite.
        ValueError: a value is out of its range, or an address cannot be read.
    """
    address = live_address(os.fspath(source) if not isinstance(source, int) else str(source))
    look = _look(detector, threshold, tiles, overlap, batch_size, track, frames, options)
    limits: dict[str, Any] = dict(reconnect=reconnect, timeout=timeout, seconds=seconds)
    live = None if address is None else LiveFrames(address, **limits)

    def generate() -> Iterator[tuple[Frame, Detections]]:
        with ExitStack() as stack:
            if live is not None:
                rate, coming = Fraction(_RATE), iter(stack.enter_context(live))
            else:
                video = stack.enter_context(open_video(os.fspath(source)))  # type: ignore[arg-type]
                rate, coming = video.rate, video.frames
            detect = look(float(rate))
            for frame in itertools.islice(coming, frames):
                if live is None and seconds is not None and frame.time >= seconds:
                    return
                (found,) = detect([frame])
                if isinstance(found, UserError):
                    raise found
                yield frame, found

    return generate()


@kept_memory()
def predict_live(
    detector: Detector,
    source: str | Address,
    *,
    threshold: Threshold = None,
    tiles: int | None = None,
    overlap: float | None = None,
    batch_size: int = 1,
    track: bool = False,
    output_dir: str | os.PathLike,
    pictures: bool = True,
    progress: bool = True,
    seconds: float | None = None,
    frames: int | None = None,
    reconnect: int = RECONNECT,
    timeout: float = TIMEOUT,
    **options: Any,
) -> LiveResult:
    """Finds objects in a live source, and writes what is found as it comes, until Ctrl-C.

    predictions.csv, and the annotated MP4 by a second or so, can be read while it goes on, and stay
    if the process is killed; predictions.json is written at the end. Times are those at which
    frames came, in seconds from the first one.

    Args:
        source: index of a camera, or address; see :func:`predict_stream`, as of all others.
        output_dir: where they are written.
        pictures: write the annotated MP4.
        progress: show how many frames have been looked at.

    Raises:
        LiveSourceError: it cannot be opened. One that is lost for good is told in the result.
        ValueError: a value is out of its range, or this is no live source.
        OSError: something cannot be written.
    """
    address = live_address(source) if isinstance(source, str) else source
    if address is None:
        raise ValueError(f"{source} is no live source, but a file: predict_files takes these")
    look = _look(detector, threshold, tiles, overlap, batch_size, track, frames, options)
    live = LiveFrames(address, reconnect=reconnect, timeout=timeout, seconds=seconds)
    require_places(output_dir)
    detect, draw = look(float(_RATE)), Drawing(detector.class_names)
    result = LiveResult(address.shown)
    with ExitStack() as stack:
        coming = stack.enter_context(live)
        bar = stack.enter_context(tqdm(unit="frame", desc=address.shown, disable=not progress))
        written: GrowingResults | None = None
        copy = _Copies(os.fspath(output_dir), address.name, result.copies) if pictures else None
        if copy is not None:
            stack.callback(copy.close)
        try:
            for frame in itertools.islice(coming, frames):
                if written is None:  # only now: a source that is not there writes over nothing
                    new = GrowingResults(output_dir, detector.categories, track)
                    with signals_wait():
                        written = stack.enter_context(new)
                (found,) = detect([frame])
                with signals_wait():  # a frame is in all files, or in none
                    if isinstance(found, UserError):
                        result.num_unusable += 1
                        told = f"frame {result.num_frames}: {found}"
                        result.unusable = result.unusable or told
                    else:
                        time = round(float(frame.time), 6)
                        name = address.name
                        written.add(Found(address.shown, name, result.num_frames, found, time))
                        result.num_objects = written.num_objects
                        if copy is not None:
                            frame = frame._replace(picture=draw(frame.picture, found))
                    if copy is not None:
                        copy.write(frame)
                    result.num_frames += 1
                bar.update()
        except LiveSourceError as error:
            if written is None:
                raise
            result.problem = str(error)
        except KeyboardInterrupt:
            if written is None:
                raise
        finally:
            result.dropped = live.dropped
    return result


def _look(
    detector: Detector,
    threshold: Threshold,
    tiles: int | None,
    overlap: float | None,
    batch_size: int,
    track: bool,
    frames: int | None,
    options: dict[str, Any],
) -> Callable[[float], FrameDetector]:
    """Checks what is asked for; the rest is known when the rate of the frames is."""
    if frames is not None:
        whole(frames, "frames (--frames)")
    if tiles is None and batch_size != 1:
        raise ValueError(
            "batch_size (--batch-size) is of tiles here: frames of a live source are looked at one "
            "by one, as they come"
        )
    select = detector.select(threshold, **options)
    tiling = tiling_of(tiles, overlap, batch_size)
    if track:
        require_tracking(select)
    return lambda rate: FrameDetector(detector, select, tiling, Tracker(rate) if track else None)


class _Copies:
    """Annotated videos of a live source: another one, with a number, whenever its size changes."""

    def __init__(self, folder: str, name: str, paths: list[str]):
        self._folder, self._name, self._paths = folder, name, paths
        self._writer: VideoWriter | None = None
        self._size: tuple[int, ...] = ()
        self._start = Fraction(0)

    def write(self, frame: Frame) -> None:
        if frame.picture.shape != self._size:
            self.close()
            number = f"_{len(self._paths) + 1}" if self._paths else ""
            path = inside(self._folder, f"{self._name}{number}.mp4")
            self._writer = VideoWriter(path, Fraction(_RATE), grows=True)
            self._size, self._start = frame.picture.shape, frame.time
            self._paths.append(path)
        assert self._writer is not None
        self._writer.write(frame._replace(time=frame.time - self._start))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None
