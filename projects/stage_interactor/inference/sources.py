"""What to predict on: image and video files, found by path, folder and glob, and read."""

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")


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
        suffixes, default = ((".mp4",), ".mp4") if self.is_video else (IMAGES, ".png")
        return self.name if self.name.lower().endswith(suffixes) else f"{self.name}{default}"


def find_sources(places: Iterable[str | os.PathLike]) -> list[Source]:
    """The image and video files that paths, folders (with all below them) and globs name.

    Each once, in order.

    Raises:
        FileNotFoundError: one of them names nothing, or a folder without images and videos.
    """
    files: dict[str, None] = {}
    for place in (os.fspath(place) for place in places):
        matches = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
        if not matches:
            raise FileNotFoundError(f"{place}: there is no such file or folder")
        found = []
        for match in matches:
            if not os.path.isdir(match):
                found.append(match)
                continue
            for folder, folders, names in os.walk(match):
                folders.sort()
                known = (name for name in sorted(names) if name.lower().endswith(IMAGES + VIDEOS))
                found += [os.path.join(folder, name) for name in known]
        if not found:
            raise FileNotFoundError(f"{place}: no image or video in it ({' '.join(IMAGES)} ...)")
        files |= dict.fromkeys(found)
    folders = [os.path.dirname(os.path.abspath(path)) for path in files]
    root = os.path.commonpath(folders) if folders else ""
    return [Source(path, os.path.relpath(os.path.abspath(path), root)) for path in files]


class Video(NamedTuple):
    """An open video."""

    frames: Iterator[np.ndarray]  # RGB (H, W, 3), upright
    length: int | None  # frames, where the file says so
    rate: Fraction  # frames a second


@contextmanager
def open_video(path: str) -> Iterator[Video]:
    """Reads a video.

    Raises:
        av.FFmpegError, ValueError: it cannot be read as one.
    """
    with av.open(path) as file:
        if not file.streams.video:
            raise ValueError("it has no pictures")
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        frames = (_upright(frame) for frame in file.decode(stream))
        yield Video(frames, stream.frames or None, stream.average_rate or Fraction(25))


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB (H, W, 3), turned as a player would: telephones film on their side."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


class VideoWriter:
    """Writes frames, RGB arrays (H, W, 3) of one size, as H.264, which browsers play."""

    def __init__(self, path: str, rate: Fraction):
        self._path, self._rate = path, rate
        self._file: av.container.OutputContainer | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, picture: np.ndarray) -> None:
        """Adds a frame; the file is there from the first one on."""
        if self._file is None:
            os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
            self._file = av.open(self._path, "w")
            self._stream = self._file.add_stream("libx264", rate=self._rate)
            self._stream.pix_fmt = "yuv420p"
            # Its colours are half as fine as its pixels: both sides must be even.
            height, width = picture.shape[:2]
            self._stream.height, self._stream.width = height - height % 2, width - width % 2
        picture = np.ascontiguousarray(picture[: self._stream.height, : self._stream.width])
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._file.mux(self._stream.encode(frame))

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.mux(self._stream.encode())
            self._file.close()
