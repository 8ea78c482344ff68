"""Pascal VOC: an XML file for each picture, and lists of them for the parts."""

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence

from .files import SPLITS, Files, split_name, split_of_path
from .source import (
    Labelled,
    Object,
    Part,
    Source,
    corners,
    find_picture,
    own_name,
    read_lines,
    read_xml,
)

_CLASS_FILES = ("classes.txt", "labels.txt", "labelmap.txt")


def read_voc(xml_files: Sequence[str], labels: Files, pictures: Files, home: str) -> Source:
    """Of XML files, which are in no order of parts unless lists or folders divide them.

    Corners are 1-based and inclusive, as in VOC, unless one of them is below 1.
    Difficult objects become crowd regions. Classes have an order only if a file gives one.
    """
    source = Source("Pascal VOC", {})
    listed = _by_lists(xml_files, labels, home, source)
    found = []  # part, object's name, its two corners, and where
    pending: list[tuple[Part, Labelled, list]] = []
    for name, paths in listed.items():
        part = source.parts.setdefault(name, Part())
        for path in paths:
            labels.used.add(path)
            item, objects = _parse(path, labels, pictures, part.problems)
            found += [box for _, box, *_ in objects]
            if item is not None:
                pending.append((part, item, objects))
    first = 1 if all(min(box) >= 1 for box in found) else 0
    for part, item, objects in pending:
        read = []
        for label, (x0, y0, x1, y1), where, difficult in objects:
            x, y, w, h = corners((x0, y0, x1, y1))
            box = (x - first, y - first, w + first, h + first)
            read.append(Object(label, box, where, is_crowd=difficult))
        part.labelled.append(item._replace(objects=read))
    crowds = sum(difficult for *_, objects in pending for *_, difficult in objects)
    if crowds:
        source.notes.append(f"{crowds} difficult objects are regions that are not scored")
    source.notes.append(
        "corners start at 1 and are inclusive, as in Pascal VOC"
        if first
        else "corners start at 0 (one of them is 0)"
    )
    labelled = {
        label
        for _, _, objects in pending
        for label, (x0, y0, x1, y1), *_ in objects
        if abs(x1 - x0) + first > 0 and abs(y1 - y0) + first > 0  # others are left out
    }
    source.class_names = _class_order(labels, home, labelled, source.notes)
    source.parts = {name: part for name, part in source.parts.items() if listed[name]}
    return source


def _by_lists(
    xml_files: Sequence[str], labels: Files, home: str, source: Source
) -> dict[str, list[str]]:
    """By ``ImageSets/Main/train.txt`` ..., else by the names of the folders."""
    start = f"{home}/" if home else ""
    by_stem: dict[str, str] = {}
    for path in xml_files:
        by_stem.setdefault(path.rpartition("/")[2].rpartition(".")[0], path)
    texts = [path for path in labels.with_suffix(".txt") if path.startswith(start)]
    usual = [path for path in texts if path.lower().split("/")[-3:-1] == ["imagesets", "main"]]
    others = [path for path in texts if _are_stems(labels.absolute(path), by_stem)]
    there = {path.rpartition("/")[2][: -len(".txt")].lower(): path for path in usual or others}
    parts = ("train", "val", "test", "trainval")
    lists = {key: [there[key]] for key in parts if key in there} or {
        name: [there[key] for key in there if split_name(key) == name] for name in SPLITS
    }  # or of one class each: cat_train.txt
    found: dict[str, list[str]] = {}
    missing: list[str] = []
    for key, path in ((key, path) for key, paths in lists.items() for path in paths):
        labels.used.add(path)
        found.setdefault(key, [])
        for line in read_lines(labels.absolute(path)):
            xml = by_stem.get(_stem(line, by_stem))
            if xml is None:
                missing.append(f"{labels.absolute(path)}: there is no {line}.xml")
            elif xml not in found[key]:
                found[key].append(xml)
    both = found.pop("trainval", [])
    if both and not found.get("train"):
        elsewhere = {path for paths in found.values() for path in paths}
        found["train"] = [path for path in both if path not in elsewhere]
    if empty := [key for key, paths in found.items() if not paths]:
        source.notes.append(f"the lists of {' and '.join(empty)} in ImageSets/Main are empty")
    found = {key: found[key] for key in SPLITS if found.get(key)}
    if found:
        if missing:
            part = source.parts.setdefault(next(iter(found)), Part())
            part.problems += missing
        return found
    by_folder: dict[str, list[str]] = {}
    for path in xml_files:
        by_folder.setdefault(split_of_path(path[len(start) :]) or "", []).append(path)
    if "" in by_folder and len(by_folder) == 1:
        return {"train": by_folder[""]}
    by_folder.pop("", None)
    return {name: by_folder[name] for name in SPLITS if name in by_folder}


def _are_stems(path: str, by_stem: Mapping[str, str]) -> bool:
    """Whether a file that is called like a part lists XML files, wherever it lies."""
    if split_name(os.path.basename(path)[: -len(".txt")]) is None:
        return False
    try:
        lines = read_lines(path)
    except ValueError:
        return False
    known = (_stem(line, by_stem) in by_stem for line in lines)
    return bool(lines) and sum(known) > len(lines) / 2


def _stem(line: str, by_stem: Mapping[str, str]) -> str:
    """Of a line of a list: a name, which may have spaces, or a path, and behind it -1, 0 or 1."""
    for text in (line, re.sub(r"\s+-?[01]$", "", line)):
        name = text.replace("\\", "/").rpartition("/")[2]
        for stem in (name, name.rpartition(".")[0]):
            if stem in by_stem:
                return stem
    return line


def _parse(
    path: str, labels: Files, pictures: Files, problems: list[str]
) -> tuple[Labelled | None, list[tuple]]:
    """A picture without objects yet, and those: name, corners, where, and whether difficult."""
    where = labels.absolute(path)
    try:
        tree = read_xml(where)
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return None, []
    objects = []
    for number, item in enumerate(tree.iter("object"), start=1):
        label, box = (item.findtext("name") or "").strip(), item.find("bndbox")
        told = f"{where}, object {number}"
        try:
            if box is None:
                raise ValueError
            keys = ("xmin", "ymin", "xmax", "ymax")
            values = [float(box.findtext(key) or "") for key in keys]
            if not all(-1e9 < value < 1e9 for value in values):
                raise ValueError
        except ValueError:
            problems.append(f"{told}, {label!r}, has no box of four numbers")
            continue
        if not label:
            problems.append(f"{told} has no name")
            continue
        difficult = (item.findtext("difficult") or "0").strip().lower() in ("1", "true", "yes")
        objects.append((label, values, f"object {number}", difficult))
    stem = path.rpartition("/")[2].rpartition(".")[0]
    written = (tree.findtext("filename") or "").strip()
    picture = find_picture(pictures, own_name(stem, written, pictures), path, problems)
    if picture is None:
        return None, objects
    return Labelled(pictures.absolute(picture), (), where, _stated_size(tree)), objects


def _stated_size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """Width and height; None where they are missing or 0, which some programs write."""
    try:
        width, height = (float(tree.findtext(f"size/{key}") or "") for key in ("width", "height"))
        return (int(width), int(height)) if width > 0 and height > 0 else None
    except (ValueError, OverflowError):
        return None


def _class_order(labels: Files, home: str, found: set[str], notes: list[str]) -> list[str]:
    start = f"{home}/" if home else ""
    for name in _CLASS_FILES:
        path = next((p for p in (start + name, name) if p in labels), None)
        if path is None:
            continue
        lines = read_lines(labels.absolute(path))
        listed = [line.split(":")[0].strip() for line in lines if not line.startswith("#")]
        listed = [item for item in listed if item and (item in found or item != "background")]
        listed = list(dict.fromkeys(listed))
        if missing := sorted(found - set(listed)):
            if path != start + name:  # of something else, further up
                continue
            raise ValueError(
                f"{labels.absolute(path)} lacks the classes {missing} of objects: add them, or "
                "take the file away"
            )
        labels.used.add(path)
        notes.append(f"order of the classes from {name}")
        return listed
    notes.append("classes in alphabetical order (a classes.txt would give another)")
    return sorted(found)
