"""The text files of YOLO for Keras: ``picture x0,y0,x1,y1,class x0,y0,x1,y1,class ...``."""

import re
from collections.abc import Sequence

from .files import IMAGE_SUFFIXES, Files, split_of_file
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
_BOX = re.compile(rf"({_NUMBER}),({_NUMBER}),({_NUMBER}),({_NUMBER}),(\d{{1,15}})")
_SUFFIXES = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_LINE = re.compile(rf"(.+?\.(?:{_SUFFIXES}))(?:\s+(.*))?$", re.IGNORECASE)


def is_keras(line: str) -> bool:
    match = _LINE.match(line.strip())
    return match is not None and any(map(_BOX.fullmatch, (match[2] or "").split()))


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
        own = split_of_file(path) or "train"
        if own in source.parts:
            raise ValueError(f"{where} and another file could both be {own!r}: use --annotations")
        part = source.parts[own] = Part()
        lines = [(line, _LINE.match(line)) for line in read_lines(where)]
        pictures.expect((match[1] if match else line for line, match in lines), path)
        for number, (line, match) in enumerate(lines, start=1):
            told = f", line {number}"
            name, boxes = (match[1], match[2] or "") if match else (line, "")
            picture = find_picture(pictures, name, path, part.problems, own, told)
            if picture is None:
                continue
            objects = []
            for word in boxes.split():
                box = _BOX.fullmatch(word)
                if box is None:
                    part.problems.append(f"{where}{told}: {word[:60]!r} is no box and class")
                elif int(box[5]) >= len(names):
                    count = f"there are {len(names)} classes"
                    part.problems.append(f"{where}{told}: class {box[5]}, but {count}")
                else:
                    box_of = corners(box.groups()[:4])
                    objects.append(Object(names[int(box[5])], box_of, f"line {number}"))
            part.labelled.append(Labelled(pictures.absolute(picture), objects, where))
    return source
