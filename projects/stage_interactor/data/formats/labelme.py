"""labelme: a JSON file of shapes for each picture."""

import math
from collections.abc import Mapping
from typing import Any

from .files import Files, split_of_path
from .source import NO_CLASSES, Labelled, Object, Part, Source, around, find_picture, own_name


def is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys()


def read_labelme(json_files: Mapping[str, Any], labels: Files, pictures: Files) -> Source:
    source = Source("labelme", {})
    ignored = 0
    splits = {path: split_of_path(path) for path in json_files}
    divided = any(splits.values())
    for path, content in json_files.items():
        name = splits[path] or (None if divided else "train")
        if name is None:  # told as a file that is not used
            continue
        part = source.parts.setdefault(name, Part())
        labels.used.add(path)
        where = labels.absolute(path)
        stem = path.rpartition("/")[2].rpartition(".")[0]
        written = content["imagePath"] if isinstance(content["imagePath"], str) else stem
        picture = find_picture(pictures, own_name(stem, written, pictures), path, part.problems)
        if picture is None:
            continue
        objects = []
        shapes = content["shapes"] if isinstance(content["shapes"], list) else []
        for number, shape in enumerate(shapes):
            try:
                label = shape["label"].strip()
                box = _box(shape)
            except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
                part.problems.append(f"{where}, shape {number}: {type(error).__name__}: {error}")
                continue
            if label in NO_CLASSES:
                ignored += 1
            elif label:
                objects.append(Object(label, box, f"shape {number}"))
            else:
                part.problems.append(f"{where}, shape {number} has no label")
        size = content.get("imageWidth"), content.get("imageHeight")
        stated = size if all(type(side) is int and side > 0 for side in size) else None
        part.labelled.append(Labelled(pictures.absolute(picture), objects, where, stated))
    if ignored:
        source.notes.append(f"{ignored} shapes of {' and '.join(NO_CLASSES)} are no objects")
    left = [path for path in pictures.pictures if path not in pictures.used]
    if left:
        source.notes.append(f"{len(left)} pictures have no JSON file ({left[0]}, ...): left out")
    return source


def _box(shape: Mapping) -> tuple[float, float, float, float]:
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind == "circle":
        (x, y), (x1, y1) = ((float(a), float(b)) for a, b in points)
        radius = math.dist((x, y), (x1, y1))
        return x - radius, y - radius, 2 * radius, 2 * radius
    if kind in ("point", "line", "linestrip"):
        raise ValueError(f"a {kind} has no box")
    return around(points)
