"""Data sets as people keep them: what a folder holds is recognised, read, and may be written."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from ..untrusted.files import is_within
from ..writing import write_text
from .formats import yolo
from .formats.files import IMAGE_SUFFIXES, Files, describe_unused, split_name
from .formats.recognition import FORMATS, is_inner, kind_of, read_source
from .formats.source import Source, no_collection
from .reading import DataFolder, Split, normalise

__all__ = ["FORMATS", "DataFolder", "Split", "describe", "read_folder", "split_name", "write_coco"]


def read_folder(
    path: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    annotations: str | os.PathLike | None = None,
    format: str | None = None,
    allow_outside: bool | None = False,
    cache_file: str | None = None,
) -> DataFolder:
    """Recognises and reads a data set.

    - YOLO: a YAML file with ``names`` and ``train``, ``val``; Darknet's ``obj.data``; or label
      files beside the pictures or in ``labels/``, with a ``classes.txt``, ``obj.names`` or
      ``_darknet.labels``.
    - Pascal VOC: an XML file for each picture, anywhere; ``ImageSets/Main/train.txt`` ... or the
      names of folders divide them.
    - COCO: JSON files, with a part in their names or their folders', or one for all.
    - CSV with a head or RetinaNet's; VIA, labelme, CVAT for images; the text files of Keras' YOLO.

    Paths of another machine are followed by their last parts. Pictures are looked for by name in
    all of the folder; a name that fits several is never guessed.

    Args:
        path: a folder, or the file that describes the data set.
        images: the folder of the pictures, if they are not below ``path``.
        annotations: the file or folder of the annotations, if others are not meant.
        format: one of ``FORMATS``, if it is not to be guessed.
        allow_outside: names in its files may lead to pictures elsewhere; those in a description
            of YOLO's that is named itself may in any case. Where they lead is in the notes.
        cache_file: where sizes of pictures are kept for the next time.

    Raises:
        FileNotFoundError: there is no such folder or file.
        OutsideName: a name in one of its files leads out of it.
        ValueError: it holds no data set, several, or one that contradicts itself.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    for place in (path, images, annotations):
        if place is not None and not Path(place).expanduser().exists():
            raise FileNotFoundError(f"{place}: there is no such folder or file")
    if images is not None and not Path(images).expanduser().is_dir():
        raise ValueError(f"--images {images}: it must be the folder of the pictures")
    root = Path(path).expanduser()
    told = root
    if root.is_file():
        annotations, root = annotations or root, root.parent
        # Beside annotations/ lie the pictures.
        root = root.parent if is_inner(root.name) else root
    labels = _labels(root, annotations)
    pictures = labels if images is None else Files(Path(images).expanduser())
    pictures.restricted |= images is not None
    if images is None and labels.restricted:
        pictures = Files(root)
    named = Path(annotations).suffix.lower() if annotations else ""
    anywhere = allow_outside or named in (".yaml", ".yml", ".data")
    within = None if anywhere else [os.fspath(root), labels.root, pictures.root]
    labels.within = pictures.within = within
    with no_collection():
        source = read_source(told, labels, pictures, format)
        source.notes += _told_outside(source, [os.fspath(root), labels.root, pictures.root])
        if unused := describe_unused(_told_unused(labels, pictures)):
            source.notes.append(f"not used: {unused}")
        return normalise(source, str(told), cache_file=cache_file)


def _told_outside(source: Source, folders: Sequence[str]) -> Iterator[str]:
    """Which pictures lie elsewhere, by part."""
    for name, part in source.parts.items():
        paths = [entry.path for entry in part.labelled]
        outside = [path for path in paths if not any(is_within(path, at) for at in folders)]
        if outside:
            count = f"{len(outside)} of {len(paths)} pictures of {name}"
            yield f"{count} lie outside of {folders[0]}, such as {outside[0]}"


def _labels(root: Path, annotations: str | os.PathLike | None) -> Files:
    if annotations is None:
        return Files(root)
    place = Path(annotations).expanduser()
    if place.is_dir():
        labels = Files(place)
        beside = (name for name in os.listdir(root) if yolo.is_names_file(name))
        labels.paths += [labels.relative(root / name) for name in beside]
        labels.paths = list(dict.fromkeys(labels.paths))
    else:
        inside = place.resolve().is_relative_to(root.resolve())
        base = root if inside else place.parent
        name = Path(os.path.relpath(place, base)).as_posix()
        labels = Files(base, [name])
        if place.suffix.lower() in (".txt", ".names", ".data", ".labels", ".yaml", ".yml"):
            labels = Files(base)  # YOLO's boxes are in files of their own
            labels.paths = [p for p in labels.paths if kind_of(labels, p) is None or p == name]
            return labels
    labels.restricted = True
    return labels


def _told_unused(labels: Files, pictures: Files) -> dict[str, list[str]]:
    """Annotations and pictures that nothing was read from; other files are not worth a word."""
    used = {os.path.normpath(files.absolute(path)) for files in (labels, pictures)
            for path in files.used}  # fmt: skip
    unused: dict[str, dict[str, str]] = {}
    for files, suffixes in (
        (labels, (".json", ".xml", ".csv", ".txt")),
        (pictures, IMAGE_SUFFIXES),
    ):
        for path in files.with_suffix(*suffixes):
            whole = os.path.normpath(files.absolute(path))
            if whole not in used:
                unused.setdefault(os.path.splitext(path)[1].lower(), {})[whole] = path
    return {suffix: list(paths.values()) for suffix, paths in unused.items()}


def write_coco(folder: DataFolder, output_dir: str | os.PathLike) -> dict[str, str]:
    """Writes all parts as COCO files; returns their paths."""
    paths = {}
    os.makedirs(output_dir, exist_ok=True)
    for name, split in folder.splits.items():
        paths[name] = os.path.join(output_dir, f"{name}.json")
        write_json(split, paths[name])
    return paths


def write_json(split: Split, path: str) -> None:
    """Writes a part as a COCO file, whose sizes need not be compared with the pictures again."""
    content = {"info": {"sizes_of_pictures": True}, **split.content}
    write_text(path, json.dumps(content))


def describe(folder: DataFolder) -> str:
    """What was read, as a table of objects by class and part."""
    counts = {name: split.count_objects() for name, split in folder.splits.items()}
    rows = [
        [label, *(part.get(label, 0) for part in counts.values())] for label in folder.class_names
    ]
    rows.append(["all", *(sum(part.values()) for part in counts.values())])
    crowds = [
        sum(item["iscrowd"] for item in split.content["annotations"])
        for split in folder.splits.values()
    ]
    if any(crowds):
        rows.append(["regions not to be scored", *crowds])
    rows.append(["images", *(len(split.content["images"]) for split in folder.splits.values())])
    notes = "".join(f"\n- {note}" for note in folder.notes)
    table = tabulate(rows, ["objects", *counts], disable_numparse=True)
    return f"{folder.path}: {folder.kind}{notes}\n{table}"
