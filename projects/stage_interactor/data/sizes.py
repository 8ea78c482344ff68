"""Widths and heights of many pictures, read from their first bytes."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import NamedTuple

from tqdm import tqdm

from ..untrusted.pictures import decoding, open_image
from ..writing import write_text
from .images import EXIF_ORIENTATION, reason_of

_TAIL = 70_000  # bytes; where a PNG may keep its EXIF tags


class Size(NamedTuple):
    """Of a picture as it is stored, in pixels, and how it is to be turned.

    Attributes:
        width, height: of the stored pixels.
        orientation: EXIF's, 1 to 8; 1 is upright, 5 to 8 swap width and height.
    """

    width: int
    height: int
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the picture as it is looked at."""
        turned = self.orientation >= 5
        return (self.height, self.width) if turned else (self.width, self.height)


def read_sizes(
    paths: Sequence[str], cache_file: str | None = None, what: str = "pictures"
) -> dict[str, Size | str]:
    """Sizes by path; for a file that cannot be read, what is wrong with it.

    Args:
        paths: of pictures.
        cache_file: where sizes are kept, and taken from for files that did not change.
        what: for the progress bar.
    """
    paths = list(dict.fromkeys(paths))
    known = _read_cache(cache_file)
    found: dict[str, Size | str] = {}
    stamps: dict[str, list[int]] = {}

    def read(path: str) -> Size | str:
        try:
            status = os.stat(path)
            stamps[path] = stamp = [status.st_mtime_ns, status.st_size]
            entry = known.get(os.path.abspath(path))
            if entry is not None and entry[:2] == stamp:
                return Size._make(entry[2:])
            return _size(path)
        except FileNotFoundError:
            return "it does not exist"
        except Exception as error:  # decoders raise nearly anything on a damaged file
            return reason_of(error)

    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        sizes = pool.map(read, paths, chunksize=64)
        bar = tqdm(sizes, total=len(paths), desc=what, unit="image", leave=False, delay=2)
        found.update(zip(paths, bar))
    if cache_file is not None:
        _write_cache(cache_file, found, stamps)
    return found


def _size(path: str) -> Size:
    with open_image(path) as image, ExitStack() as stack:
        size = image.size
        if image.format == "TIFF":  # of which Pillow tells the upright size
            tags = getattr(image, "tag_v2", {})
            size = int(tags.get(256, size[0])), int(tags.get(257, size[1]))
        orientation = 1
        if image.format != "PNG" or "exif" in image.info or _has_late_tags(path):
            # Of a PNG this decodes all of it, hence the look for tags before.
            if image.format == "PNG":
                stack.enter_context(decoding(image))
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    valid = isinstance(orientation, int) and 1 <= orientation <= 8
    return Size(size[0], size[1], orientation if valid else 1)


def _has_late_tags(path: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(4096)
        file.seek(max(os.path.getsize(path) - _TAIL, 0))
        tail = file.read()
    return any(b"eXIf" in part or b"tiff:Orientation" in part for part in (head, tail))


def _read_cache(path: str | None) -> Mapping[str, list[int]]:
    with suppress(
        OSError, ValueError, AttributeError, RecursionError
    ):  # a cache that cannot be read is none
        if path is not None:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            return {name: entry for name, entry in content.items() if _is_entry(entry)}
    return {}


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 5
        and all(type(value) is int for value in entry)
        and min(entry[2:]) > 0
    )


def _write_cache(
    path: str, found: Mapping[str, Size | str], stamps: Mapping[str, list[int]]
) -> None:
    content = {
        os.path.abspath(name): [*stamps[name], *size]
        for name, size in found.items()
        if isinstance(size, Size)
    }
    with suppress(OSError):  # nothing is lost
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_text(path, json.dumps(content))
