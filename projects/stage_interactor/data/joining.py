"""Several data sets as one: their classes are joined by name."""

import math
import os
from collections.abc import Sequence
from typing import Any

from ..d2.metrics import FEDERATED
from .folders import read_folder
from .formats.source import WEIGHT
from .reading import DataFolder, Split
from .splitting import hold_out


def read_folders(
    paths: Sequence[str | os.PathLike], weights: Sequence[float] | None = None, **options: Any
) -> DataFolder:
    """:func:`~stage_interactor.data.folders.read_folder` of each, and :func:`join_folders`.

    Raises:
        ValueError: of several data sets ``images``, ``annotations`` or ``format`` is given, each
            of which is for one.
    """
    one = [f"--{key}" for key in ("images", "annotations", "format") if options.get(key)]
    if len(paths) > 1 and one:
        raise ValueError(f"{', '.join(one)}: for one data set, not for {len(paths)}")
    return join_folders([read_folder(path, **options) for path in paths], weights)


def join_folders(
    folders: Sequence[DataFolder],
    weights: Sequence[float] | None = None,
    *,
    evaluated: bool = True,
) -> DataFolder:
    """One data set of several, each of which keeps its files where they are.

    Classes of one name are one class, in the order in which they first come. A class that a data
    set does not have is background in its pictures, of which the notes tell.

    Args:
        folders: as they were read; are not changed.
        weights: of each: how often its images come in training, 1 by default.
        evaluated: where one has no "val", a tenth of its images is held out for that.

    Raises:
        ValueError: there are more or fewer weights than data sets, one is not more than 0, a data
            set has nothing to train on, or they lie where no common folder is.
    """
    if weights is not None and len(weights) != len(folders):
        raise ValueError(f"{len(weights)} weights (--weights) for {len(folders)} data sets")
    for weight in weights or ():
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"a weight (--weights) must be more than 0, got {weight}")
    if len(folders) == 1 and weights is None:
        return folders[0]
    notes = []
    parts: list[dict[str, Split]] = []
    for folder in folders:
        own = DataFolder(folder.path, folder.kind, dict(folder.splits))
        if evaluated and "val" not in own.splits and "train" in own.splits:
            hold_out(own)
            held = len(own.splits["val"].content["images"])
            notes.append(f"{folder.path} has no 'val': {held} of its images are held out for it")
        parts.append(own.splits)
        notes += [f"{folder.path}: {note}" for note in folder.notes]
    names = list(dict.fromkeys(name for folder in folders for name in folder.class_names))
    for folder in folders:
        if lacking := [name for name in names if name not in folder.class_names]:
            shown = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            notes.append(
                f"{folder.path} does not have the classes {shown}: such objects in its pictures, "
                "if there are any, are trained as background"
            )
    notes += _alike(names)
    splits = {}
    for part in dict.fromkeys(name for splits_ in parts for name in splits_):
        chosen = [
            (own[part], None if weights is None or part != "train" else weights[index])
            for index, own in enumerate(parts)
            if part in own
        ]
        splits[part], doubles = _joined(chosen, names)
        if doubles:
            notes.append(f"{doubles} pictures of {part} are in more than one of the data sets")
    path = " + ".join(folder.path for folder in folders)
    kinds = dict.fromkeys(folder.kind for folder in folders)
    return DataFolder(path, ", ".join(kinds), splits, notes)


def _alike(names: Sequence[str]) -> list[str]:
    """A note for each class that others are called like but for case and spaces."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(name.split()).casefold(), []).append(name)
    return [
        f"{', '.join(map(repr, group))} are different classes: only names that are equal to the "
        "letter are joined"
        for group in groups.values()
        if len(group) > 1
    ]


def _joined(
    splits: Sequence[tuple[Split, float | None]], names: Sequence[str]
) -> tuple[Split, int]:
    """Parts with their weights as one, and how many pictures are in several of them."""
    roots = [os.path.abspath(split.image_root) for split, _ in splits]
    try:
        root = os.path.commonpath(roots)
    except ValueError as error:  # of Windows' drives
        raise ValueError(f"the data sets lie on several drives: {', '.join(roots)}") from error
    ids = {name: number for number, name in enumerate(names, start=1)}
    content: dict[str, list[dict]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": ids[name], "name": name} for name in names]
    left_out: dict[str, list[str]] = {}
    written: list[str] = []
    seen: dict[str, int] = {}
    doubles = 0
    for number, ((split, weight), start) in enumerate(zip(splits, roots)):
        images = {}
        for image in split.content["images"]:
            place = os.path.join(start, image["file_name"])
            doubles += seen.setdefault(os.path.realpath(place), number) != number
            images[image["id"]] = len(content["images"]) + 1
            image = {key: value for key, value in image.items() if key not in FEDERATED}
            entry = {**image, "id": images[image["id"]], "file_name": os.path.relpath(place, root)}
            if weight is not None:
                entry[WEIGHT] = weight * image.get(WEIGHT, 1.0)
            content["images"].append(entry)
        known = {item["id"]: ids[item["name"]] for item in split.content["categories"]}
        for item in split.content["annotations"]:
            content["annotations"].append(
                {
                    **item,
                    "id": len(content["annotations"]) + 1,
                    "image_id": images[item["image_id"]],
                    "category_id": known[item["category_id"]],
                }
            )
        written += split.written
        for kind, texts in split.left_out.items():
            left_out[kind] = left_out.get(kind, []) + texts
    return Split(content, root, left_out, written), doubles
