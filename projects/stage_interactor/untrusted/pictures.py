"""Pictures of others: which are opened, and how large they may be."""

import io
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from .files import read_head, require_regular_file

# Of damaged tags, and of sizes below the limit here: what cannot be read is told.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow's names of the formats that are read: those of pictures that it decodes in this process.
# It hands others, such as PostScript, to programs that it finds, which a picture from anywhere
# should not reach.
IMAGE_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI",
    "TGA", "TIFF", "WEBP",
)  # fmt: skip
# In the environment, where the workers of data loaders and the processes of a run find it too.
_VARIABLE = "STAGE_INTERACTOR_MAX_PIXELS"
_MAX_PIXELS = 178_956_970  # of which Pillow does not read more either
_MAX_PIXELS_OF_MODEL = 2**25  # for which a detector takes about 3 GB
# Bytes of a file for each pixel that may be read: four channels of 16 bits, or of formats that are
# read whole before anything is known of them, and are never that large.
_MOST_BYTES, _MOST_COMPRESSED = 8, 4
_READ_WHOLE = re.compile(rb"RIFF|....ftyp", re.DOTALL)
# Its comments are read byte by byte.
_ENDLESS_COMMENT = re.compile(rb"P\w(?:[\s0-9]|#[^\r\n]*[\r\n])*#[^\r\n]*\Z")
_HEAD = 2**16  # bytes
_LARGE_FILE = 2**26  # bytes; such files are opened one after the other
_MOST_SCANS = 100  # of a progressive JPEG, each of all of its pixels; programs write about 10
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_UNTIL_ROOM = 0.005  # seconds
_opening = threading.Lock()


class PictureTooLargeError(UserError, ValueError):
    """A picture with more pixels than are read, or a file that says so much of itself."""

    def __init__(self, told: str, limit: int | None = None):
        super().__init__(
            f"{told}, more than the limit of {limit or max_pixels():,}; if it may be so large, set "
            "train.max_pixels (--max-pixels)"
        )


def max_pixels(default: int = _MAX_PIXELS) -> int:
    """How many pixels a picture, or a frame of a video, may have."""
    return int(os.environ.get(_VARIABLE) or default)


def limit_pixels(number: int | None) -> None:
    """Sets how many pixels a picture may have, here and in the processes that are started.

    Args:
        number: None is the default, 178,956,970.

    Raises:
        ValueError: it is no whole number above 0.
    """
    if number is None:
        os.environ.pop(_VARIABLE, None)
    elif isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"max_pixels must be a whole number above 0, got {number!r}")
    else:
        os.environ[_VARIABLE] = str(number)


@contextmanager
def limit_restored() -> Iterator[None]:
    """What :func:`limit_pixels` sets in the ``with`` is gone after it."""
    before = os.environ.get(_VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before


def require_pixels(width: int, height: int) -> None:
    """Raises a PictureTooLargeError for too many."""
    if width * height > max_pixels():
        raise PictureTooLargeError(f"it is {width} x {height} pixels large, {width * height:,}")


def require_pixels_for_model(width: int, height: int) -> None:
    """The same of a picture that a detector is to take, as large as its resizing has left it."""
    limit = max_pixels(_MAX_PIXELS_OF_MODEL)
    if width * height > limit:
        told = f"it is {width} x {height} pixels large, {width * height:,}, for the detector"
        raise PictureTooLargeError(f"{told}, which does not make it smaller", limit)


def most_bytes() -> int:
    """Of a file: with more no picture is as small as pictures have to be."""
    return _MOST_BYTES * max_pixels()


def open_image(file: str | os.PathLike | bytes) -> Image.Image:
    """The picture of a regular file in one of :data:`IMAGE_FORMATS`, not decoded yet.

    Of an animation or of several pictures in a file it is the first.

    Args:
        file: its path, or what is in it.

    Raises:
        OSError: it is no file, or no such picture (PIL.UnidentifiedImageError).
        PictureTooLargeError: it has too many pixels.
    """
    size = len(file) if isinstance(file, bytes) else require_regular_file(file).st_size
    if not size:  # files of the kernel, such as below /proc, say so, and may be waited for
        raise OSError("it is empty")
    limit, head = max_pixels(), file[:_HEAD] if isinstance(file, bytes) else read_head(file, _HEAD)
    most = _MOST_COMPRESSED if _READ_WHOLE.match(head) else _MOST_BYTES
    if size > most * limit:
        raise PictureTooLargeError(f"its {size:,} bytes are those of {size // most:,} pixels")
    if size > len(head) and _ENDLESS_COMMENT.match(head):
        raise ValueError("its head is a comment without an end")
    Image.init()
    # Not every build of Pillow has all of them, and MPO, a kind of JPEG, is registered as that.
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    if Image.MAX_IMAGE_PIXELS is not None and 2 * Image.MAX_IMAGE_PIXELS < limit:
        Image.MAX_IMAGE_PIXELS = limit  # for the check of Pillow's own, which comes first
    try:
        with _opening if size > _LARGE_FILE else nullcontext():
            opened = io.BytesIO(file) if isinstance(file, bytes) else file
            image = Image.open(opened, formats=formats)
    except UnidentifiedImageError as error:
        if isinstance(file, bytes):  # its message would name an object in memory
            raise UnidentifiedImageError(f"it is none of {', '.join(formats)}") from error
        raise UnidentifiedImageError(f"{error} as any of {', '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        told = "".join(letter for letter in str(error).split(" pixels")[0] if letter.isdigit())
        raise PictureTooLargeError(f"it is {int(told or 0):,} pixels large") from error
    try:
        require_pixels(*image.size)
        if image.format == "TIFF":
            tags = getattr(image, "tag_v2", {})
            require_pixels(int(tags.get(_TILE_WIDTH, 1)), int(tags.get(_TILE_LENGTH, 1)))
            # A file with a name is mapped into memory, which Pillow does with exchanged sides
            # where the picture lies on its side.
            image.filename = ""
        elif image.info.get("progressive") and _count_scans(image) > _MOST_SCANS:
            raise ValueError(f"it is a JPEG of more than {_MOST_SCANS} scans")
    except BaseException:
        image.close()
        raise
    return image


def _count_scans(image: Image.Image) -> int:
    file: BinaryIO = image.fp  # type: ignore[attr-defined]
    start = file.tell()
    file.seek(0)
    count, last = 0, b""
    while block := file.read(2**20):
        count += (last + block).count(b"\xff\xda")
        last = block[-1:]
    file.seek(start)
    return count


class _Decoding:
    """Threads decode no more pixels at the same time than one picture may have.

    Ctrl-C may come between any two steps of this, in a notebook that goes on, and then the next
    picture must not wait for ever: ``with`` takes and gives back a Lock in one step each, which it
    does not with a Condition.
    """

    def __init__(self):
        self._pixels: dict[int, int] = {}  # by thread
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, image: Image.Image) -> Iterator[None]:
        thread = threading.get_ident()
        try:
            try:
                while not self._has_room_for(thread, image.width * image.height):
                    time.sleep(_UNTIL_ROOM)
                yield
            finally:
                self._pixels.pop(thread, None)
        finally:  # again, if it has been interrupted
            self._pixels.pop(thread, None)

    def _has_room_for(self, thread: int, pixels: int) -> bool:
        with self._lock:
            others = sum(list(self._pixels.values())) - self._pixels.get(thread, 0)
            if others and others + pixels > max_pixels():
                return False
            self._pixels[thread] = pixels
            return True


decoding = _Decoding()
