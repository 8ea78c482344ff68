"""The text files of YOLO for Keras: ``picture x0,y0,x1,y1,class x0,y0,x1,y1,class ...``."""

import re
from collections.abc import Sequence

from .files import SPLITS, Files, split_name, split_of_path
from .source import (
    Labelled,
    Object,
    Part,
    Source,
    corners,
    find_picture,
    read_lines,
    read_names,
)

_NUMBER = r"-?\d+(?:\.\d+)?"
_BOX = re.compile(rf"\s+({_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER},\d+)\s*$")


def is_keras(first_line: str) -> bool:
    return _BOX.search(first_line) is not None


def read_keras(
    text_files: Sequence[str], names_files: Sequence[str], labels: Files, pictures: Files
) -> Source:
    """``names_files``: of the classes, where no ``_classes.txt`` is beside the boxes."""
    beside = [f"{path.rpartition('/')[0]}/_classes.txt".lstrip("/") for path in text_files]
    names_files = [path for path in beside if path in labels] or names_files[:1]
    if not names_files:
        raise ValueError(
            f"{labels.absolute(text_files[0])} numbers the classes of its boxes: put a classes.txt "
            "beside it, with a name in each line"
        )
    names = read_names(names_files, labels)
    source = Source("Keras", {}, names, [f"classes from {names_files[0]}"])
    labels.used.update(text_files)
    for path in text_files:
        where = labels.absolute(path)
        stem = path.rpartition("/")[2].rpartition(".")[0]
        own = split_name(stem) or split_of_path(path) or "train"
        if own in source.parts:
            raise ValueError(f"{where} and another file could both be {own!r}: use --annotations")
        part = source.parts[own] = Part()
        for number, line in enumerate(read_lines(where), start=1):
            boxes: list[str] = []
            while match := _BOX.search(line):
                boxes.append(match[1])
                line = line[: match.start()]
            picture = find_picture(pictures, line, path, part.problems, own)
            if picture is None:
                continue
            objects = []
            for box in reversed(boxes):
                *values, index = box.split(",")
                if int(index) < len(names):
                    objects.append(Object(names[int(index)], corners(values), f"line {number}"))
                else:
                    told = f"class {index}, but there are {len(names)} classes"
                    part.problems.append(f"{where}, line {number}: {told}")
            part.labelled.append(Labelled(pictures.absolute(picture), objects, where))
    source.parts = {name: source.parts[name] for name in SPLITS if name in source.parts}
    return source
