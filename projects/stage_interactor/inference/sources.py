"""What to predict on: image and video files, found by path, folder and glob, and read."""

import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np

from ..data.images import IMAGE_SUFFIXES
from ..untrusted.files import require_regular_file
from ..untrusted.pictures import max_pixels, open_image, require_pixels
from ..writing import growing_file, new_file
from .live_addresses import live_address

# Annotated copies of pictures in these formats are of the same one, of others PNG.
_WRITTEN = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
# FFmpeg's names of the formats that are read. Others are lists that open further files, or the
# network's, and it tells formats by what is in a file, not by its name.
_VIDEO_FORMATS = "asf,avi,dv,flv,h264,hevc,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,ogg,webm"
_DURATION = re.compile(r"(\d+):(\d+):(\d+\.\d+)")  # a tag of Matroska's streams
_LARGE_FRAME = 2**25  # pixels; of such frames not several are decoded at the same time


# Of FFmpeg, for a file that can be played while it is written.
_FRAGMENTS = {"movflags": "empty_moov+default_base_moof", "frag_duration": "1000000"}
_AT_ONCE = {"preset": "veryfast", "tune": "zerolatency"}


class Source(NamedTuple):
    """A file, and the name of what is written for it: a path inside the output folder."""

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        return self.name.lower().endswith(VIDEOS)

    @property
    def annotated(self) -> str:
        """The name of its annotated copy."""
        suffixes, default = ((".mp4",), ".mp4") if self.is_video else (_WRITTEN, ".png")
        return self.name if self.name.lower().endswith(suffixes) else f"{self.name}{default}"


def require_some(found: Collection) -> None:
    """Raises a FileNotFoundError where nothing was named: of nothing there is no result."""
    if not found:
        raise FileNotFoundError("no picture or video is named: the list of them is empty")


def find_sources(
    places: Iterable[str | os.PathLike],
) -> tuple[list[Source], Counter[str]]:
    """The image and video files that paths, folders (with all below them) and globs name.

    Returns:
        Each once, in order; and how many other files lie in the folders, by their suffix in lower
        case ("" where there is none).

    Raises:
        FileNotFoundError: one of them names nothing, or a folder without images and videos; or
            there is none.
        ValueError: one is a live source.
        TypeError: one is no path.
    """
    files: dict[str, str] = {}  # by their absolute paths
    passed_over: dict[str, None] = {}
    for place in (os.fspath(place) for place in places):
        if isinstance(place, str) and (address := live_address(place)):
            raise ValueError(
                f"{address.shown}: a live source is named alone, on the command line itself, and "
                "not among files; in Python by detector.stream()"
            )
        matches = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
        if not matches:
            raise FileNotFoundError(f"{place}: there is no such file or folder")
        found = []
        for match in matches:
            if not os.path.isdir(match):
                found.append(match)
                continue
            for path in _files_below(match):
                if path.lower().endswith(IMAGE_SUFFIXES + VIDEOS):
                    found.append(path)
                else:
                    passed_over[path] = None
        if not found:
            suffixes = " ".join(IMAGE_SUFFIXES + VIDEOS)
            raise FileNotFoundError(f"{place}: no image or video in it ({suffixes})")
        for path in found:
            files.setdefault(os.path.abspath(path), path)
    require_some(files)
    folders = [os.path.dirname(path) for path in files]
    root = os.path.commonpath(folders) if folders else ""
    sources = [Source(path, os.path.relpath(whole, root)) for whole, path in files.items()]
    others = (
        os.path.splitext(path)[1].lower()
        for path in passed_over
        if os.path.abspath(path) not in files
    )
    return sources, Counter(others)


def _files_below(folder: str) -> Iterator[str]:
    """All files in a folder and the folders in it, those that are linked after the others.

    Each folder once, under the first of its names: links may lead to one another, and back.
    """
    waiting, seen = [folder], set()
    while waiting:
        for path, folders, names in os.walk(waiting.pop(0)):
            real = os.path.realpath(path)
            links = sorted(name for name in folders if os.path.islink(os.path.join(path, name)))
            folders[:] = sorted(set(folders) - set(links)) if real not in seen else []
            if real not in seen:
                seen.add(real)
                waiting += [os.path.join(path, name) for name in links]
                yield from (os.path.join(path, name) for name in sorted(names))


class Frame(NamedTuple):
    """One picture of a video."""

    picture: np.ndarray  # RGB (H, W, 3), upright
    time: Fraction  # seconds from the start of the file
    duration: Fraction  # seconds; 0 where the file does not say so


class Video(NamedTuple):
    """An open video."""

    frames: Iterator[Frame]
    length: int | None  # frames, where the file says so
    rate: Fraction  # frames a second, in the mean
    seconds: float | None  # where the file says so


# Metadata that are no UTF-8 are no errors: PyAV below 19 has to be told, later ones are so always.
ANY_METADATA: dict[str, Any] = (
    {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "replace"}
)


@contextmanager
def open_video(path: str) -> Iterator[Video]:
    """Reads a video.

    Raises:
        av.FFmpegError, OSError, ValueError: it cannot be read as one; also while its frames are
            taken.
    """
    require_regular_file(path)
    only = {"format_whitelist": _VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:  # a path from the root on: in others FFmpeg takes what is before a colon for a protocol
        file = av.open(os.path.abspath(path), options=only, **ANY_METADATA)
    except (av.ArgumentError, av.InvalidDataError) as error:
        raise ValueError(_what_instead(path)) from error
    with file:
        stream = video_stream(file)
        if stream.width * stream.height <= _LARGE_FRAME:
            stream.thread_type = "AUTO"
        rate = stream.average_rate or Fraction(25)
        start = Fraction(file.start_time or 0, av.time_base)
        frames = _frames(file.decode(stream), start, rate)
        yield Video(frames, stream.frames or None, rate, _seconds(file, stream))


def _seconds(file: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """How long the pictures last, where the head of a file says so.

    Of other formats than these FFmpeg estimates it, from what is there or from the sound.
    """
    of_file = Fraction(file.duration or 0, av.time_base)
    if "mov" in file.format.name:
        of_stream = (stream.duration or 0) * (stream.time_base or Fraction(0))
        return float(min(of_stream, of_file))  # without what was trimmed from it
    if "matroska" in file.format.name:
        start = (file.start_time or 0) / av.time_base  # it counts from 0, where nothing may be
        written = _DURATION.fullmatch(stream.metadata.get("DURATION", ""))
        if written:
            hours, minutes, seconds = map(float, written.groups())
            return 3600 * hours + 60 * minutes + seconds - start
        return float(of_file) - start if len(file.streams) == 1 else None
    return None


def _what_instead(path: str) -> str:
    """What a file that is called a video, and is of none of the formats that are read, may be."""
    try:
        with open_image(path) as image:
            return f"it is a picture ({image.format}) whose name is that of a video: rename it"
    except (OSError, ValueError):
        formats = _VIDEO_FORMATS.replace(",", ", ")
        return f"it is damaged, or no video of a format that is read ({formats})"


def video_stream(file: av.container.InputContainer) -> av.VideoStream:
    """The first one, ready to be decoded within the bounds of what is read.

    Raises:
        ValueError: there is none, or its frames are too large.
    """
    if not file.streams.video:
        raise ValueError("it has no pictures")
    stream = file.streams.video[0]
    require_pixels(stream.width, stream.height)
    stream.codec_context.options = {"max_pixels": str(max_pixels())}
    return stream


def require_frame(frame: av.VideoFrame) -> None:
    """Raises a ValueError for a frame that is too large, or too small for a video.

    Raises:
        PictureTooLargeError: the first.
    """
    require_pixels(frame.width, frame.height)
    if min(frame.width, frame.height) < 2:
        size = f"{frame.width} x {frame.height}"
        raise ValueError(f"its frames are of {size} pixels; 2 x 2 is the least of a video")


def _frames(decoded: Iterable[av.VideoFrame], start: Fraction, rate: Fraction) -> Iterator[Frame]:
    time = None
    for number, frame in enumerate(decoded):
        require_frame(frame)
        if number >= max_pixels():
            raise ValueError(f"it has more than {number:,} frames")
        if frame.pts is not None and frame.time_base:
            time = max(frame.pts * frame.time_base - start, Fraction(0))
        else:  # some files have no times
            time = Fraction(0) if time is None else time + 1 / rate
        picture = upright(frame)
        yield Frame(picture, time, (frame.duration or 0) * (frame.time_base or Fraction(0)))
    if time is None:
        raise ValueError("there is no whole frame in it")


def upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB (H, W, 3), turned as a player would: telephones film on their side."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


class VideoWriter:
    """Writes frames of one size as H.264, which browsers play, each at its time.

    Args:
        path: of the file, an MP4.
        rate: frames a second, in the mean.
        grows: the file is there under its name from the first frame on, and can be played as far as
            it is written, whatever ends this process: for what lasts for hours. It is written in
            fragments of a second, faster, and is larger.

    Raises:
        OSError: with the path as its ``filename``: it cannot be written; nothing of it is left,
            unless it grows.
    """

    _TICK = Fraction(1, 90_000)  # seconds; usual rates of frames are whole numbers of it

    def __init__(self, path: str, rate: Fraction, *, grows: bool = False):
        self.path, self._rate, self._grows = path, rate, grows
        self._open = ExitStack()
        self._file: av.container.OutputContainer | None = None
        self._last = -1  # time of the last frame, in ticks

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frame: Frame) -> None:
        """Adds a frame; the file is there from the first one on."""
        if self._file is None:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            new = growing_file(self.path) if self._grows else new_file(self.path, sync=False)
            self._written = self._open.enter_context(new)
            of_file, of_stream = (_FRAGMENTS, _AT_ONCE) if self._grows else ({}, {})
            self._file = av.open(self._written, "w", format="mp4", options=of_file)
            self._stream = self._file.add_stream("libx264", rate=self._rate, options=of_stream)
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = self._TICK
            # An MP4 file is as long as the order of decoding says: that of showing, if they agree.
            self._stream.codec_context.max_b_frames = 0
            # Its colours are half as fine as its pixels: both sides must be even.
            height, width = frame.picture.shape[:2]
            self._stream.height, self._stream.width = height - height % 2, width - width % 2
        picture = frame.picture[: self._stream.height, : self._stream.width]
        written = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        # Files in which two frames are of one time are not unheard of, and cannot be written.
        self._last = max(round(frame.time / self._TICK), self._last + 1)
        written.pts, written.time_base = self._last, self._TICK
        written.duration = round(frame.duration / self._TICK)
        self._file.mux(self._stream.encode(written))
        if self._grows:
            self._written.flush()

    def __exit__(self, *exception: object) -> None:
        # What was written before an error elsewhere, such as in the video that is read, is kept.
        with self._open:
            if self._file is not None:
                self._file.mux(self._stream.encode())
                self._file.close()
