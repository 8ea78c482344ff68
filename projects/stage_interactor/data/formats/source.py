"""What every format is read into: pictures by path, objects by the name of their class."""

import gc
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from ...untrusted.files import OutsideName, read_bytes, require_memory
from .files import AmbiguousName, Files

WEIGHT = "sampling_weight"  # of an image in a COCO file, and of a record
NO_CLASSES = ("__ignore__", "_background_")  # labelme's


class Object(NamedTuple):
    """An object as an annotation file tells of it.

    Attributes:
        label: the name of its class.
        box: x, y, width and height in pixels; or as shares of the picture's size.
        relative: it is shares.
        where: in the annotation file.
    """

    label: str
    box: tuple[float, float, float, float]
    where: str
    is_crowd: bool = False
    relative: bool = False
    area: float | None = None  # square pixels, where the format has one
    id: int | None = None  # COCO's


class Labelled(NamedTuple):
    """A picture and its objects, as an annotation file tells of them."""

    path: str
    objects: Sequence[Object]
    where: str  # the file that says so
    size: tuple[int, int] | None = None  # width and height that it states
    id: int | None = None  # COCO's
    name: str | None = None  # COCO's file_name
    weight: float | None = None  # how often it comes in training, beside others
    federated: Mapping[str, list[int]] | None = None  # LVIS's: classes that were looked for


@dataclass
class Part:
    """ "train", "val" or "test" of a data set, as a format has it."""

    labelled: list[Labelled] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    image_root: str | None = None  # where COCO's file names start
    categories: dict[int, str] | None = None  # COCO's own, by id
    frequencies: dict[int, str] = field(default_factory=dict)  # LVIS's, of categories by id
    empty_parents: list[str] = field(default_factory=list)  # of COCO's; classes if used
    notes: list[str] = field(default_factory=list)
    as_written: bool = False  # nothing of a COCO file had to be understood otherwise


@dataclass
class Source:
    """A data set, as a format has it.

    Attributes:
        kind: of the format.
        parts: by name.
        class_names: in order; None if only the objects name them.
        notes: how it was understood.
        no_labels: by part, where label files of YOLO were looked for in vain.
        owners: of label files, the pictures.
    """

    kind: str
    parts: dict[str, Part]
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    no_labels: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)


def require_distinct_names(names: Iterable[str], source: object) -> None:
    """Raises a ValueError if two classes have one name: nothing that is told of them is clear."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{source}: several classes have the name {', '.join(map(repr, repeated))}; give each "
            "a name of its own, or make them one class"
        )


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the search for unreachable objects, half of the time where millions are made."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_text(path: str | os.PathLike) -> str:
    """Of a file in UTF-8, or in UTF-16 with its mark; without the mark that Windows puts first.

    Raises:
        ValueError: it is no text.
    """
    content = _read(path)
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_xml(path: str | os.PathLike) -> ElementTree.Element:
    """Raises a ValueError for what is no XML.

    The parser opens no other file, and nothing stands for more than is written: no annotations
    declare entities.
    """
    content = _read(path)
    if b"<!ENTITY" in content.replace(b"\0", b""):  # also of two bytes for each letter
        raise ValueError(f"{path} declares entities, which annotations do not: write out the text")
    try:
        require_memory(path, content)
        return ElementTree.fromstring(content)
    except (ValueError, LookupError, ElementTree.ParseError, RecursionError) as error:
        raise ValueError(f"{path} is not XML: {error}") from error


def _read(path: str | os.PathLike) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines that are not empty, without space around them; see :func:`read_text`."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_names(paths: Sequence[str], files: Files) -> list[str]:
    """Names of classes, one a line, of files that must agree.

    Raises:
        ValueError: they do not, or two classes have one name.
    """
    listed = {}
    for path in paths:
        lines = [line.strip() for line in read_text(files.absolute(path)).rstrip().splitlines()]
        if not lines or lines == [""]:
            raise ValueError(f"{files.absolute(path)} is empty: it must name the classes")
        if "" in lines:
            raise ValueError(
                f"{files.absolute(path)}: line {lines.index('') + 1} is empty, so that the numbers "
                "of the classes behind it are not clear; delete it, or write a name"
            )
        listed[path] = lines
    first, *others = listed
    for path in others:
        if listed[path] != listed[first]:
            raise ValueError(
                f"{files.absolute(first)} has the classes {listed[first]}, but "
                f"{files.absolute(path)} has {listed[path]}"
            )
    require_distinct_names(listed[first], files.absolute(first))
    files.used.update(paths)
    return listed[first]


def own_name(stem: str, written: str, files: Files) -> str:
    """What to look for as the picture of an annotation file that is called ``stem``.

    The file's own name decides over the one that is written in it: pictures and their files are
    renamed together, and what is in them is forgotten.
    """
    name = written.replace("\\", "/").rpartition("/")[2]
    if not written or (files.has_picture(stem) and os.path.splitext(name)[0] != stem):
        return stem
    return written


def find_picture(
    files: Files,
    name: str,
    near: str,
    problems: list[str],
    split: str | None = None,
    place: str = "",
) -> str | None:
    """The picture's path, below ``files``; None, and a problem, if it is not to be found.

    ``place`` is that of the name in the file ``near``. Where it may lead elsewhere, it is absolute.

    Raises:
        OutsideName: it leads to a file elsewhere, and may not.
    """
    where = files.absolute(near) + place
    try:
        found = files.picture(name, near, split) if "\0" not in name else None
    except AmbiguousName as error:
        files.doubtful.update(error.found)
        problems.append(f"{where}: the picture {error}; name its folder with --images")
        return None
    if found is None:
        if outside := files.outside(name, near):
            if not files.may_read(outside):
                raise OutsideName(where, "image", name, files.root)
            return outside
        problems.append(f"{where}: the picture {name[:200]!r} is not below {files.root}")
        return None
    files.used.add(found)
    return found


def corners(box: Iterable[object]) -> tuple[float, float, float, float]:
    """xywh of two corners, x and y each, in any order.

    Raises:
        TypeError, ValueError: they are not four numbers.
    """
    x0, y0, x1, y1 = map(float, box)  # type: ignore[arg-type]
    return min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0)


def around(points: Iterable[Sequence[float]]) -> tuple[float, float, float, float]:
    """The box xywh around points (x, y).

    Raises:
        TypeError, ValueError: there are none, or they are not pairs of numbers.
    """
    xs, ys = zip(*((float(x), float(y)) for x, y in points))
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
