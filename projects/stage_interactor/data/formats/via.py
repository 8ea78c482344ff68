"""VGG Image Annotator: a JSON file of regions for each folder of pictures."""

from collections.abc import Iterable, Mapping
from typing import Any

from .files import Files, splits_of_files
from .source import Labelled, Object, Part, Source, around, find_picture

_CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category", "object", "class_name")


def is_via(content: Any) -> bool:
    """Of a project, or of the annotations alone."""
    entries = _entries(content)
    return bool(entries) and all(
        isinstance(entry, dict)
        and "filename" in entry
        and isinstance(entry.get("regions"), (dict, list))
        for entry in entries.values()
    )


def read_via(json_files: Mapping[str, Any], labels: Files, pictures: Files) -> Source:
    source = Source("VIA", {})
    only = _only_label(json_files.values(), source)
    read: list[Any] = []
    for path, own in splits_of_files(json_files).items():
        content, own = json_files[path], own or "train"
        where = labels.absolute(path)
        labels.used.add(path)
        if any(_entries(content) == _entries(other) for other in read):
            source.notes.append(f"{path} says the same as another file")  # a project, and its data
            continue
        read.append(content)
        part = source.parts.setdefault(own, Part())
        entries = _entries(content).values()
        pictures.expect((e["filename"] for e in entries if isinstance(e["filename"], str)), path)
        for entry in entries:
            name = entry["filename"]
            if not isinstance(name, str):
                part.problems.append(f"{where}: filename is {name!r:.80}, not text")
                continue
            picture = find_picture(pictures, name, path, part.problems, own)
            if picture is None:
                continue
            objects = []
            for number, region in enumerate(_regions(entry)):
                told = f"{name}, region {number}"
                try:
                    box = _box(region["shape_attributes"])
                    label = _label(region["region_attributes"], only)
                    objects.append(Object(label, box, told))
                except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
                    part.problems.append(f"{where}, {told}: {type(error).__name__}: {error}")
            part.labelled.append(Labelled(pictures.absolute(picture), objects, where))
    return source


def _entries(content: Any) -> dict:
    if isinstance(content, dict) and isinstance(content.get("_via_img_metadata"), dict):
        content = content["_via_img_metadata"]
    return content if isinstance(content, dict) else {}


def _regions(entry: Mapping) -> list:
    regions = entry["regions"]
    return list(regions.values()) if isinstance(regions, dict) else regions


def _box(shape: Mapping) -> tuple[float, float, float, float]:
    kind = shape["name"]
    if kind == "rect":
        x, y, w, h = (float(shape[key]) for key in ("x", "y", "width", "height"))
        return x, y, w, h
    if kind in ("circle", "ellipse"):
        x, y = float(shape["cx"]), float(shape["cy"])
        w, h = (float(shape[key]) for key in (("r", "r") if kind == "circle" else ("rx", "ry")))
        return x - w, y - h, 2 * w, 2 * h
    if kind in ("polygon", "polyline"):
        return around(zip(shape["all_points_x"], shape["all_points_y"]))
    raise ValueError(f"a {kind} has no box")


def _only_label(contents: Iterable[Any], source: Source) -> str | None:
    """What regions without attributes are, if the others are all one class, or there are none."""
    unique: list[Any] = []
    unique += (content for content in contents if content not in unique)
    regions = [
        region
        for content in unique
        for entry in _entries(content).values()
        for region in _regions(entry)
    ]
    found = set()
    empty = 0
    for region in regions:
        attributes = region.get("region_attributes") if isinstance(region, dict) else None
        if attributes == {}:
            empty += 1
            continue
        try:
            found.add(_label(attributes or {}, None))
        except (AttributeError, TypeError, ValueError):
            return None
    if not empty or len(found) > 1:
        return None
    only = found.pop() if found else "object"
    source.notes.append(f"{empty} regions have no attributes: they are taken as {only!r}")
    return only


def _label(attributes: Mapping, only: str | None) -> str:
    """Of the attribute that is called like a class, or of the only value; ``only`` without one."""
    if only is not None and not attributes:
        return only
    known = {str(key).lower(): value for key, value in attributes.items()}
    value = next((known[key] for key in _CLASS_ATTRIBUTES if known.get(key)), None)
    if value is None and known and all(other == [*known.values()][0] for other in known.values()):
        value = [*known.values()][0]
    if isinstance(value, dict):  # of boxes that were ticked
        ticked = [str(key) for key, on in value.items() if on]
        value = ticked[0] if len(ticked) == 1 else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its class is not to be told from {dict(attributes)!r:.100}")
    return value.strip()
