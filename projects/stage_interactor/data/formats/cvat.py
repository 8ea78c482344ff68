"""CVAT for images: one XML file of the shapes of all pictures."""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from .files import Files, split_name, split_of_file, split_of_path
from .source import Labelled, Object, Part, Source, around, corners, find_picture, read_xml


def read_cvat(xml_files: Sequence[str], labels: Files, pictures: Files) -> Source:
    """Parts are its subsets, where it has some; else those of the names of files and folders."""
    source = Source("CVAT", {})
    names: dict[str, None] = {}
    tags = 0
    for path in xml_files:
        where = labels.absolute(path)
        root = read_xml(where)
        labels.used.add(path)
        names |= dict.fromkeys(
            (item.findtext("name") or "").strip() for item in root.iterfind(".//labels/label")
        )
        own = split_of_file(path)
        if tracks := len(root.findall("track")):
            raise ValueError(
                f"{where} has {tracks} tracks of a video: export it as 'CVAT for images', with the "
                "frames as pictures"
            )
        pictures.expect((image.get("name") or "" for image in root.iterfind("image")), path)
        for image in root.iterfind("image"):
            name = image.get("name") or ""
            subset = split_name(image.get("subset") or "") or own or split_of_path(name)
            part = source.parts.setdefault(subset or "train", Part())
            picture = find_picture(pictures, name, path, part.problems, subset)
            if picture is None:
                continue
            objects = []
            tags += len(image.findall("tag"))
            for number, shape in enumerate(image):
                told = f"{name}, shape {number}"
                try:
                    box = _box(shape)
                except (TypeError, ValueError) as error:
                    part.problems.append(f"{where}, {told}: {error}")
                    continue
                if box is not None:
                    objects.append(Object((shape.get("label") or "").strip(), box, told))
            size = _size(image)
            part.labelled.append(Labelled(pictures.absolute(picture), objects, where, size))
    used = {item.label for part in source.parts.values() for entry in part.labelled
            for item in entry.objects}  # fmt: skip
    if tags and not used:
        raise ValueError(
            f"{labels.absolute(xml_files[0])} has {tags} tags of whole pictures and no shapes: it "
            "is a data set for classification"
        )
    if tags:
        source.notes.append(f"{tags} tags of whole pictures are no objects")
    source.class_names = [name for name in names if name] or None
    if source.class_names and (unknown := sorted(used - set(source.class_names))):
        raise ValueError(
            f"{labels.absolute(xml_files[0])}: labels {unknown} are not in its <labels>"
        )
    return source


def _size(image: ElementTree.Element) -> tuple[int, int] | None:
    width, height = image.get("width", ""), image.get("height", "")
    fit = all(side.isdecimal() and len(side) < 10 for side in (width, height))
    return (int(width), int(height)) if fit else None


def _box(shape: ElementTree.Element) -> tuple[float, float, float, float] | None:
    """None for what is no shape: attributes and tags of the picture."""
    if shape.tag == "box":
        x, y, w, h = corners(shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr"))
        angle = math.radians(float(shape.get("rotation") or 0))
        if angle == 0:
            return x, y, w, h
        wide = abs(w * math.cos(angle)) + abs(h * math.sin(angle))
        high = abs(w * math.sin(angle)) + abs(h * math.cos(angle))
        return x + (w - wide) / 2, y + (h - high) / 2, wide, high
    if shape.tag == "polygon":
        points = (shape.get("points") or "").split(";")
        return around([float(value) for value in point.split(",")] for point in points)
    if shape.tag == "ellipse":
        x, y, rx, ry = (float(shape.get(key) or "") for key in ("cx", "cy", "rx", "ry"))
        return x - rx, y - ry, 2 * rx, 2 * ry
    if shape.tag in ("cuboid", "mask", "points", "polyline", "skeleton"):
        raise ValueError(f"a {shape.tag} has no box")
    return None
