"""The one reading of a data set: what every format says becomes COCO's records, or is refused.

Checking, training, evaluation and the pages all work from these records and never look into the
annotation files again, so what is left out is left out everywhere, from AP as well. Each thing that
is left out is named in ``problems``; how the rest was understood is in ``notes``.

It is not left to a library: supervision stops at the first line that it does not understand, and
knows neither EXIF's turned pictures nor VOC's difficult objects; datumaro 1.13 read none of 28
public data sets as they lie in their repositories, and needs 464 MB; globox wants to be told the
format, the folders and the classes.
"""

import itertools
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .formats.source import WEIGHT, Labelled, Object, Part, Source
from .sizes import Size, read_sizes

_LONGEST_NAME = 1000  # letters, of a class; checkpoints have none that are longer

# Kinds of what is left out, told by number.
_KINDS = {
    "said": "entries of the annotations cannot be used",
    "picture": "pictures cannot be read",
    "twice": "pictures are labelled twice; the second time does not count",
    "size": "pictures are of another size than their annotations say",
    "empty": "boxes have a zero, negative or non-finite width or height",
    "outside": "boxes lie wholly outside of their image",
    "far": "boxes leave their image by more than that is large",
}


@dataclass
class Split:
    """One part of a data set.

    Attributes:
        content: as a COCO file: ``images`` that exist, with their upright ``width`` and ``height``;
            ``annotations`` with a finite ``bbox`` (x, y, width, height in pixels) that is at least
            partly inside of its image, its ``area``, and ``iscrowd``; ``categories``. All ids are
            whole numbers; those of annotations from 1.
        image_root: where the images' file names start.
        left_out: what was left out, and why, by kind.
        written: of each annotation, where it stands in the files.
        as_written: a COCO file says all of this word for word.
    """

    content: dict[str, list[dict[str, Any]]]
    image_root: str
    left_out: dict[str, list[str]] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    as_written: bool = False

    @property
    def problems(self) -> list[str]:
        """What was left out, each in words."""
        return [text for texts in self.left_out.values() for text in texts]

    def summary(self) -> list[str]:
        """What was left out, by number, with an example of each kind."""
        return [
            f"{len(texts)} {_KINDS[kind]} and are left out (e.g. {texts[0]})"
            if len(texts) > 1 or kind != "said"
            else texts[0]
            for kind, texts in self.left_out.items()
        ]

    @property
    def categories(self) -> list[dict]:
        """By class index: their ids in order."""
        return sorted(self.content["categories"], key=lambda category: category["id"])

    @property
    def class_names(self) -> list[str]:
        return [category["name"] for category in self.categories]

    def count_objects(self) -> dict[str, int]:
        """Objects of each class, crowds apart."""
        counts = Counter(
            item["category_id"] for item in self.content["annotations"] if not item["iscrowd"]
        )
        return {category["name"]: counts[category["id"]] for category in self.categories}


@dataclass
class DataFolder:
    """A data set, read.

    Attributes:
        path: of its folder or file.
        kind: the format.
        splits: "train", "val", "test"; those that are there.
        notes: how it was understood.
    """

    path: str
    kind: str
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Of the part that is trained on, or of the first."""
        return next(iter(self.splits.values())).class_names


def normalise(source: Source, path: str, *, cache_file: str | None = None) -> DataFolder:
    """Of what a format says.

    Args:
        source: of a format's reader.
        path: of the data set.
        cache_file: where sizes of pictures are kept.

    Raises:
        ValueError: no part has a picture, or the classes have no name.
    """
    paths = [item.path for part in source.parts.values() for item in part.labelled]
    sizes = read_sizes(paths, cache_file)
    folder = DataFolder(path, source.kind, {}, list(source.notes))
    names = source.class_names
    if names is None:
        names = sorted(
            {item.label for part in source.parts.values() for entry in part.labelled
             for item in entry.objects}
        )  # fmt: skip
    for part in source.parts.values():
        _require_text([*names, *(part.categories or {}).values()], path)
    shared: dict[str, int] = {}  # ids of the classes of the first part, which others lack
    for name, part in source.parts.items():
        categories = part.categories or dict(enumerate(names, start=1))
        missing = [label for label in shared if label not in categories.values()]
        if shared and missing and set(categories.values()) < shared.keys():
            folder.notes.append(f"{name} has no object of {', '.join(map(repr, missing))}")
            top = max(*categories, *shared.values())
            for n, label in enumerate(missing, start=1):
                free = shared[label] not in categories
                categories[shared[label] if free else top + n] = label
        shared = shared or {label: key for key, label in categories.items()}
        notes: list[str] = []
        split = to_split(part, categories, sizes, notes)
        folder.notes += [*(f"{name}: {note}" for note in notes), *part.notes]
        if split.content["images"] or split.problems:
            folder.splits[name] = split
    folder.notes += _overlaps(source)
    folder.notes = list(dict.fromkeys(folder.notes))
    if not any(split.content["images"] for split in folder.splits.values()):
        left_out = [found for split in folder.splits.values() for found in split.left_out.values()]
        most = max(left_out, key=len, default=["there is none"])
        more = f" (as {len(most) - 1} more)" * (len(most) > 1)
        raise ValueError(f"{path}: no picture can be used: {most[0]}{more}")
    return folder


def _require_text(names: Iterable[str], path: str) -> None:
    """Raises a ValueError for names of classes that are no names: too long, or with no letters."""
    for name in names:
        if len(name) > _LONGEST_NAME:
            told = f"has {len(name):,} letters, more than {_LONGEST_NAME:,}"
            raise ValueError(f"{path}: a class {told}: {name[:80]!r}...")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise ValueError(f"{path}: a class is called {name!r:.80}, which is no text")


def _overlaps(source: Source) -> list[str]:
    """Pictures that two parts share, which makes AP one of what was learned by heart."""
    paths = {
        name: {os.path.realpath(item.path) for item in part.labelled}
        for name, part in source.parts.items()
    }
    return [
        f"{len(both)} of the {len(paths[second])} pictures of {second} are in {first} as well"
        for first, second in itertools.combinations(paths, 2)
        if (both := paths[first] & paths[second])
    ]


def to_split(
    part: Part, categories: Mapping[int, str], sizes: Mapping[str, Size | str], notes: list[str]
) -> Split:
    """Records of a part; ``categories`` are names by id, ``sizes`` of the pictures by path."""
    left_out: dict[str, list[str]] = {"said": list(part.problems)} if part.problems else {}
    kept = list(_usable_pictures(part, sizes, left_out, notes))
    as_written = part.as_written and all(item.size == size for item, size, _ in kept)
    root = part.image_root or _common_folder([item.path for item, _, _ in kept])
    ids = {name: key for key, name in categories.items()}
    images: list[dict] = []
    annotations: list[dict] = []
    written: list[str] = []
    for item, (width, height), objects in kept:
        image_id = len(images) + 1 if item.id is None else item.id
        name = os.path.relpath(item.path, root) if item.name is None else item.name
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        if item.weight is not None:
            images[-1][WEIGHT] = item.weight
        images[-1].update(item.federated or {})
        where = item.where if item.id is None else f"{item.where}, {os.path.basename(item.path)}"
        for one in objects:
            x, y, w, h = box = _in_pixels(one, width, height)
            if problem := box_problem((x, y, x + w, y + h), width, height):
                told = f"{where}, {one.where}: box {_short(box)} (x, y, w, h)"
                told += f" {_WRONG[problem].format(width, height)}"
                left_out.setdefault(problem, []).append(told)
                continue
            # COCO's are all in one file, by an id.
            written.append(f"{item.where}, {one.where}" if item.id is None else one.where)
            area = one.area
            if area is None or not 0 < area <= width * height:  # NaN as well
                area, as_written = round(w * h, 4), False
            annotations.append(
                {
                    "id": len(annotations) + 1 if one.id is None else one.id,
                    "image_id": image_id,
                    "category_id": ids[one.label],
                    "bbox": list(box),
                    "area": area,
                    "iscrowd": int(one.is_crowd),
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": key, "name": name}
            | ({"frequency": part.frequencies[key]} if key in part.frequencies else {})
            for key, name in sorted(categories.items())
        ],
    }
    return Split(content, root, left_out, written, as_written and not left_out)


def _usable_pictures(
    part: Part,
    sizes: Mapping[str, Size | str],
    left_out: dict[str, list[str]],
    notes: list[str],
) -> Iterator[tuple[Labelled, tuple[int, int], Sequence[Object]]]:
    """Pictures with their upright widths and heights, and their objects, in that frame."""
    seen: dict[str, str] = {}
    doubles = 0
    frames = _frames(part.labelled, sizes, notes)
    for item in part.labelled:
        size = sizes.get(item.path, "it was not looked at")
        frame = frames.get(item.path, "upright")
        if isinstance(size, str):
            told = f"{item.path} cannot be read as an image: {size}"
            left_out.setdefault("picture", []).append(told)
        elif item.id is None and item.path in seen:
            told = f"{item.path} is labelled by {seen[item.path]} and {item.where}"
            left_out.setdefault("twice", []).append(told)
        elif isinstance(frame, _Contradiction):
            left_out.setdefault("size", []).append(frame.text)
        else:
            doubles += item.path in seen
            seen[item.path] = item.where
            turned = frame == "stored"
            objects = [_turned(one, size) for one in item.objects] if turned else item.objects
            yield item, size.upright, objects
    if doubles:
        notes.append(f"{doubles} pictures are listed again, with another id")


def _in_pixels(one: Object, width: int, height: int) -> tuple[float, float, float, float]:
    if not one.relative:
        return one.box
    x, y, w, h = one.box
    # Six decimals, as the files have, tell a hundredth of a pixel.
    x, y, w, h = (
        round(value, 2) if math.isfinite(value) else value
        for value in (x * width, y * height, w * width, h * height)
    )
    return x, y, w, h


_WRONG = {
    "empty": "has no width or height",
    "outside": "lies outside of its image, {} x {}",
    "far": "leaves its image, {} x {}, by more than that is large",
}


def box_problem(box: Iterable[float], width: float, height: float) -> str | None:
    """What makes a box, xyxy in pixels of its image, useless; None if nothing does."""
    x0, y0, x1, y1 = box
    # Written so that a NaN, which no comparison is true of, is caught as well.
    if not (0 < x1 - x0 < math.inf and 0 < y1 - y0 < math.inf):
        return "empty"
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return "outside"
    if x0 < -width or y0 < -height or x1 > 2 * width or y1 > 2 * height:
        return "far"
    return None


class _Contradiction:
    def __init__(self, text: str):
        self.text = text


def _frames(
    labelled: Sequence[Labelled], sizes: Mapping[str, Size | str], notes: list[str]
) -> dict[str, Any]:
    """By path, where a stated size is not that of the upright picture, what the boxes are of.

    "upright" or "stored" (before the picture is turned by its EXIF tag), or a contradiction. Sizes
    that are swapped are decided by the boxes where these fit one way only; by the other pictures
    of the part where all that tell anything tell the same; and by the stated size where that is
    the size of the stored pixels.
    """
    found: dict[str, Any] = {}
    swapped: list[tuple[Labelled, Size, str | None]] = []
    unclear = 0
    for item in labelled:
        size = sizes.get(item.path)
        if not isinstance(size, Size):
            continue
        if item.size is None or item.size == size.upright:
            # Upside down or mirrored, or a square, it has the same size as it is stored.
            same = size.orientation <= 4 or size.width == size.height
            unclear += size.orientation > 1 and (item.size is None or same)
            continue
        if item.size[::-1] == size.upright:
            swapped.append((item, size, _told_by_boxes(item, size)))
        else:
            found[item.path] = _Contradiction(_told_sizes(item, size))
    verdicts = {told for *_, told in swapped if told is not None}
    common = verdicts.pop() if len(verdicts) == 1 else None
    counts: Counter[str] = Counter()
    for item, size, told in swapped:
        verdict = told or common
        stored = (size.width, size.height) == item.size
        if verdict is None and stored:
            verdict = "stated"
        if verdict == "upright":
            found[item.path] = "upright"
            counts["swapped"] += 1
        elif verdict == "stated" and stored:
            found[item.path] = "stored"
            counts["turned"] += 1
        else:
            found[item.path] = _Contradiction(_told_sizes(item, size))
    if counts["turned"]:
        notes.append(
            f"{counts['turned']} pictures are turned by their EXIF tag, their annotations are not: "
            "the boxes are turned"
        )
    if counts["swapped"]:
        notes.append(
            f"width and height of {counts['swapped']} pictures are swapped in the annotations; the "
            "boxes fit the pictures"
        )
    if unclear:
        notes.append(
            f"{unclear} pictures are turned by their EXIF tag; boxes are taken to be those of the "
            "upright picture"
        )
    return found


def _told_by_boxes(item: Labelled, size: Size) -> str | None:
    """ "stated" or "upright": the frame that alone holds all boxes; None if that tells nothing."""
    assert item.size is not None

    def holds(width: int, height: int) -> bool:
        boxes = (one.box for one in item.objects if not one.relative)
        return all(x + w <= width + 1.5 and y + h <= height + 1.5 for x, y, w, h in boxes)

    stated, upright = holds(*item.size), holds(*size.upright)
    if stated == upright:
        return None
    return "stated" if stated else "upright"


def _told_sizes(item: Labelled, size: Size) -> str:
    assert item.size is not None
    (width, height), (stated_width, stated_height) = size.upright, item.size
    told = (
        f"{item.path} is {width} x {height} pixels"
        + " (turned upright by its EXIF tag)" * (size.orientation > 1)
        + f", but its annotation in {item.where} says {stated_width} x {stated_height}"
    )
    factor = width / stated_width
    if abs(height - factor * stated_height) < 1.01 and factor != 1:
        return (
            f"{told}: it was resized by {factor:.4g} after it was labelled; scale boxes and sizes "
            "by that, or put the original in its place"
        )
    return f"{told}; correct width and height in the annotations, or replace the image"


def _turned(one: Object, size: Size) -> Object:
    """Its box in the upright picture, of a box in the stored pixels."""
    x, y, w, h = one.box
    left, top = x, y
    right, bottom = size.width - x - w, size.height - y - h
    start = {5: (top, left), 6: (bottom, left), 7: (bottom, right), 8: (top, right)}
    return one._replace(box=(*start[size.orientation], h, w))


def _common_folder(paths: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else "."


def _short(box: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.10g}" for value in box) + "]"


def count_by_image(split: Split) -> dict[int, int]:
    """Objects of each image, crowds apart, by its id."""
    counts: defaultdict[int, int] = defaultdict(int)
    for item in split.content["annotations"]:
        if not item["iscrowd"]:
            counts[item["image_id"]] += 1
    return {image["id"]: counts[image["id"]] for image in split.content["images"]}
