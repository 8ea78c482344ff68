"""Which format a folder holds, and where in it."""

import itertools
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...untrusted.files import OutsideName, read_head
from . import coco, csv_rows, cvat, keras, labelme, via, voc, yolo
from .files import IMAGE_SUFFIXES, SPLITS, AmbiguousName, Files, split_name, split_of_path
from .source import Source, read_text

# By the name that --format knows; where a folder holds several, the first is read.
FORMATS = ("yolo", "voc", "coco", "cvat", "via", "labelme", "csv", "keras")
_KINDS = ("yaml", "darknet", "voc", "coco", "cvat", "via", "labelme", "csv", "keras", "names")
_WEAK = {"csv", "keras", "names"}
_FORMAT_OF = {"yaml": "yolo", "darknet": "yolo", "names": "yolo"}
_PARTS = ("train", "val", "valid", "validation", "test", "train2017", "val2017")
# Folders that are part of a data set's layout; what is above them is where the data set lies.
_INNER = re.compile(
    r"annotations?|annots?|anns?|labels?|labeltxt|xmls?|images?|imgs?|jpegimages|imagesets|main|"
    r"jsons?|csvs?|txts?|via"
)


def read_source(path: Path, labels: Files, pictures: Files, format: str | None) -> Source:
    """The format that is found in the folder nearest to the top.

    A file that alone says little, such as a classes.txt, may belong to something else: where it is
    of no use, what lies deeper is looked at.
    """
    found, broken = _recognise(labels, format)
    if not found:
        raise ValueError(broken[0] if broken else _nothing(path, labels, pictures, format))
    errors: list[str] = []
    empty: Source | None = None  # the first that has no objects
    sure = {home for home, kinds in found.items() if kinds.keys() - _WEAK}
    for depth in sorted({_depth(home) for home in found}):
        homes = sorted(home for home in found if _depth(home) == depth)
        certain = [home for home in homes if home in sure]
        labelled = [home for home in homes if home not in sure and "names" in found[home]]
        homes = [*certain, *labelled] if certain else homes
        if sum(home in sure for home in homes) <= 1:
            read = {home: _read_home(home, found, sure, labels, pictures, errors) for home in homes}
            homes = [home for home in homes if read[home] is not None]
        if len(homes) > 1:
            shown = ", ".join(os.path.join(labels.root, home) for home in homes[:5])
            raise ValueError(f"{path} holds several data sets, {shown}: name one of them")
        source = read[homes[0]] if homes else None
        if source is not None and not _count_objects(source):
            empty = empty or source
            first = next(iter(next(iter(found[homes[0]].values()))))
            errors.append(f"{labels.absolute(first)}: the {source.kind} annotations name no object")
        elif source is not None:
            _require_alone(path, homes[0], found)
            source.notes += [f"not read: {text}" for text in (*errors, *broken)]
            return source
        elif sure & {home for home in found if _depth(home) == depth}:
            break
    if empty is not None:
        empty.notes += errors
        return empty
    raise ValueError(errors[-1] if sure else errors[0])


def _count_objects(source: Source) -> int:
    return sum(len(entry.objects) for part in source.parts.values() for entry in part.labelled)


def _depth(home: str) -> int:
    return home.count("/") + bool(home)


def _read_home(
    home: str,
    found: Mapping[str, Any],
    sure: set[str],
    labels: Files,
    pictures: Files,
    errors: list[str],
) -> Source | None:
    """What a folder holds; None, and errors, if that cannot be read.

    ``sure`` are the folders of which it is sure that they hold a data set.
    """
    told = []
    start = f"{home}/" if home else ""
    apart = [other for other in sure if other != home and other.startswith(start)]
    for kind in _in_order(found[home], labels, pictures, home, apart):
        for files in (labels, pictures):
            files.reset()
        try:
            source = _READERS[kind](found[home][kind], found[home], labels, pictures, home, apart)
        except ValueError as error:
            told.append(str(error))
            if isinstance(error, OutsideName):
                raise
            if isinstance(error, AmbiguousName) or isinstance(error.__cause__, AmbiguousName):
                break  # a question, which another format is no answer to
            continue
        except RecursionError:
            names = ", ".join(labels.absolute(path) for path in [*found[home][kind]][:3])
            told.append(f"{names}: something in it is nested too deeply for annotations")
            continue
        source.parts = {name: source.parts[name] for name in SPLITS if name in source.parts}
        if any(part.labelled for part in source.parts.values()):
            paths = (entry.path for part in source.parts.values() for entry in part.labelled)
            pictures.used.update(map(pictures.relative, paths))
            if home:
                source.notes.insert(0, f"in {home}")
            source.notes += [f"not read: {text}" for text in told]
            if changed := pictures.exchanged:
                source.notes.append(
                    f"{len(changed)} pictures have another suffix than is written "
                    f"({changed[0][0]} is {changed[0][1]}{', ...' * (len(changed) > 1)})"
                )
            return source
        problems = [text for part in source.parts.values() for text in part.problems]
        told.append(problems[0] if problems else f"{home or '.'}: no picture is named")
    errors.append("; ".join(told[:2]))
    return None


def _in_order(
    of_home: Mapping[str, Any], labels: Files, pictures: Files, home: str, apart: list[str]
) -> list[str]:
    """The kinds that a folder holds, the first to be tried first."""
    kinds = [kind for kind in _KINDS if kind in of_home]
    if "keras" in kinds and "names" in kinds:
        # Roboflow's _annotations.txt beside label files of YOLO: what has more pictures counts.
        with suppress(ValueError):
            boxes = _READERS["names"](of_home["names"], of_home, labels, pictures, home, apart)
            lines = _READERS["keras"](of_home["keras"], of_home, labels, pictures, home, apart)
            count, other = (
                sum(len(part.labelled) for part in source.parts.values())
                for source in (boxes, lines)
            )
            if count >= other:
                kinds.remove("keras")
    return kinds


def _require_alone(path: Path, home: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises a ValueError for another data set beside folders of parts."""
    start = f"{home}/" if home else ""
    for other, kinds in found.items():
        beside = other != home and other.startswith(start) and "/" not in other[len(start) :]
        for kind in kinds.keys() & found[home].keys() if beside else ():
            if all(split_of_path(name[len(start) :]) for name in found[home][kind]):
                raise ValueError(
                    f"{path} holds several data sets, {home or 'its own parts'} and {other}: name "
                    "one of them"
                )


def _recognise(
    labels: Files, format: str | None
) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """Annotation files with what is in them, by folder and kind; and what could not be read.

    Raises:
        ValueError: a file that is called like a part of the data cannot be read.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    broken = []
    stems = {os.path.splitext(name)[0] for name in labels.pictures}
    sniffed: dict[tuple[str, str], str | None] = {}
    for path in labels.paths:
        folder, _, name = path.rpartition("/")
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in IMAGE_SUFFIXES or (suffix == ".txt" and os.path.splitext(path)[0] in stems):
            continue
        content: Any = None
        try:
            if suffix == ".xml":  # those of a folder are alike
                if (folder, suffix) not in sniffed:
                    sniffed[folder, suffix] = _kind_of_xml(labels.absolute(path))
                kind = sniffed[folder, suffix]
            elif suffix == ".txt" and sniffed.get((folder, suffix)) == "boxes":
                kind = "names" if yolo.is_names_file(path) else None
            else:
                kind, content = kind_of(labels, path) or (None, None)
                if suffix == ".txt" and kind is None and not split_name(stem):
                    sniffed[folder, suffix] = "boxes"
        except ValueError as error:
            if suffix == ".json" and (split_name(stem) or labels.restricted):
                raise
            broken.append(str(error))
            continue
        except OSError as error:
            broken.append(f"{labels.absolute(path)}: {error}")
            continue
        if kind is None or format not in (None, _FORMAT_OF.get(kind, kind)):
            continue
        found.setdefault(_home(folder), {}).setdefault(kind, {})[path] = content
    return found, broken


def is_inner(name: str) -> bool:
    """Whether a folder of this name holds annotations or pictures of a data set."""
    return _INNER.fullmatch(name.lower()) is not None


def _home(folder: str) -> str:
    """The folder that a data set lies in, of one that its annotations lie in."""
    parts = [part for part in folder.split("/") if part not in ("", "..")]
    while parts and (is_inner(parts[-1]) or split_name(parts[-1])):
        parts.pop()
    return "/".join(parts)


def kind_of(labels: Files, path: str) -> tuple[str, Any] | None:
    """What a file is, and its content where that had to be read for it."""
    whole = labels.absolute(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".yaml", ".yml"):
        content = yolo.load_yaml(whole) or {}
        parts = {"train", "val", "valid", "test"} & content.keys()
        if parts and ("names" in content or "nc" in content):
            return "yaml", None
        return ("names", None) if "names" in content else None
    if suffix == ".json":
        if coco.of_other_task(path) and not labels.restricted:
            return None
        content = coco.load_json(whole)
        for kind, fits in (
            ("coco", coco.is_coco), ("via", via.is_via), ("labelme", labelme.is_labelme)
        ):  # fmt: skip
            if fits(content):
                return kind, content
        if isinstance(content, list) and content and isinstance(content[0], dict):
            if {"image", "annotations"} <= content[0].keys():
                raise ValueError(f"{whole}: CreateML's format is not read; export it as COCO")
        stem = path.rpartition("/")[2].removesuffix(".json").lower()
        if stem.removeprefix("instances_") in _PARTS or labels.restricted:
            coco.parse(content, whole)  # says what it is not
        return None
    if suffix == ".csv":
        return ("csv", None) if csv_rows.columns_of(whole) else None
    if suffix == ".data":
        words = read_text(whole)
        return ("darknet", None) if "names" in words and "train" in words else None
    if yolo.is_names_file(path):
        return "names", None
    if suffix == ".txt":
        head = read_head(whole).decode("utf-8", "replace")
        first = next((line for line in head.splitlines() if line.strip()), "")
        return ("keras", None) if keras.is_keras(first) else None
    return None


def _kind_of_xml(path: str) -> str | None:
    parser: Any = ElementTree.XMLPullParser(("start",))
    try:
        parser.feed(read_head(path))
        for _, element in parser.read_events():
            return {"annotation": "voc", "annotations": "cvat"}.get(element.tag)
    except (ElementTree.ParseError, ValueError, LookupError):
        return "voc" if split_of_path(path) or "annot" in path.lower() else None
    return None


def _read_yaml(found: Iterable[str], of_home, labels, pictures, home, apart) -> Source:
    """Of several descriptions the one that is called data.yaml, or the only one that works."""
    paths = sorted(
        found, key=lambda path: (not path.lower().rpartition("/")[2].startswith("data."), path)
    )
    sources, errors = {}, []
    for path in paths:
        try:
            sources[path] = yolo.read_yaml(labels.absolute(path), labels, pictures)
        except ValueError as error:
            errors.append(str(error))
            continue
        if path.lower().rpartition("/")[2].startswith("data."):
            break
    if not sources:
        raise ValueError(errors[0])
    if len(sources) > 1:
        shown = ", ".join(labels.absolute(path) for path in sources)
        raise ValueError(f"{shown} all describe a data set: name one of them")
    ((path, source),) = sources.items()
    labels.used.add(path)
    source.notes += [f"not read: {text}" for text in errors]
    return source


def _read_darknet(found: Iterable[str], of_home, labels, pictures, home, apart) -> Source:
    path, *others = sorted(found)
    if others:
        raise ValueError(f"{path} and {others[0]} both describe a data set: name one of them")
    labels.used.add(path)
    return yolo.read_darknet(labels.absolute(path), labels, pictures)


# Each takes the files of its kind with their contents, those of all kinds in the folder, where
# annotations and pictures are looked for, the folder, and folders in it that are apart.
_READERS: Mapping[str, Callable[..., Source]] = {
    "yaml": _read_yaml,
    "darknet": _read_darknet,
    "voc": lambda found, _, *where: voc.read_voc(list(found), *where[:3]),
    "coco": lambda found, _, *where: coco.read_coco(found, *where[:2]),
    "cvat": lambda found, _, *where: cvat.read_cvat(list(found), *where[:2]),
    "via": lambda found, _, *where: via.read_via(found, *where[:2]),
    "labelme": lambda found, _, *where: labelme.read_labelme(found, *where[:2]),
    "csv": lambda found, _, *where: csv_rows.read_csv(list(found), *where[:2]),
    "keras": lambda found, of_home, *where: keras.read_keras(
        list(found), list(of_home.get("names", ())), *where[:2]
    ),
    "names": lambda found, _, *where: yolo.read_plain(list(found), *where),
}


def _nothing(path: Path, labels: Files, pictures: Files, format: str | None) -> str:
    """What was seen, and what to name."""
    seen = {
        os.path.abspath(files.absolute(path)) for files in (labels, pictures)
        for path in files.paths
    }  # fmt: skip
    counts = Counter(os.path.splitext(path)[1].lower() for path in seen)
    lines = (path for path in labels.paths if path.endswith(".txt"))
    if any(_is_box(labels.absolute(path)) for path in itertools.islice(lines, 100)):
        return (
            f"{path} holds label files of YOLO, but nothing names their classes: put a classes.txt "
            "with a name in each line beside them, or a data.yaml"
        )
    ranked = counts.most_common(6)
    holds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in ranked)
    wanted = f"{format} data set" if format else "data set that is known"
    return (
        f"{path} is no {wanted}; it holds {holds or 'no files'}. Looked for: a data.yaml with "
        "'names', obj.data or classes.txt (YOLO), XML files (Pascal VOC, CVAT), a JSON file with "
        "'images', 'annotations' and 'categories' (COCO), VIA's or labelme's, a CSV of boxes. "
        "--images DIR, --annotations FILE_OR_DIR and --format NAME say what is meant"
    )


def _is_box(path: str) -> bool:
    """Whether the first line of a file is a class and a box as YOLO writes them."""
    try:
        words = read_head(path).decode().partition("\n")[0].split()
        return len(words) >= 5 and all(0 <= float(word) <= 1 for word in words[1:])
    except ValueError:
        return False
