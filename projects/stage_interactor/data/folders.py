"""Data sets as people keep them, COCO, YOLO and Pascal VOC, read as COCO's records.

What cannot be meant is named in ``problems`` and left out; nothing on disk is changed.
"""

import json
import os
from pathlib import Path

from tabulate import tabulate

from .formats.coco import find_json, read_coco
from .formats.records import DataFolder, Split, split_name
from .formats.voc import find_xml, read_voc
from .formats.yolo import find_yaml, read_yolo

__all__ = [
    "DataFolder",
    "Split",
    "describe",
    "hold_out",
    "read_folder",
    "split_name",
    "write_coco",
]

HELD_OUT = 10  # every so manieth image, where nothing is there to evaluate on


def read_folder(path: str | os.PathLike) -> DataFolder:
    """Recognises and reads a data set.

    - YOLO: a folder with a ``data.yaml`` (``names``, ``train``, ``val``), or that file.
    - Pascal VOC: ``Annotations/*.xml`` with ``ImageSets/Main/train.txt`` ..., or XML files beside
      the images in ``train/``, ``valid/`` ... Classes have an order only if ``classes.txt``,
      ``labels.txt`` or ``labelmap.txt`` gives one; otherwise they are sorted. Corners are 1-based
      and inclusive, as in VOC, unless one of them is 0. Difficult objects become crowd regions.
    - COCO: ``annotations/instances_train2017.json`` ..., ``train/_annotations.coco.json``,
      ``train.json``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none of these, or its description of itself cannot be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{path}: there is no such folder")
    yaml_file = root if root.suffix in (".yaml", ".yml") else find_yaml(root)
    if yaml_file is not None:
        found = read_yolo(yaml_file)
    elif root.is_dir() and (xml_files := find_xml(root)):
        found = read_voc(root, xml_files)
    elif json_files := find_json(root):
        found = read_coco(root, json_files)
    else:
        raise ValueError(
            f"{path} is no data set that is known: neither a data.yaml with 'names' (YOLO), nor "
            "Annotations/*.xml (Pascal VOC), nor a JSON file with 'images', 'annotations' and "
            "'categories' (COCO) was found in it"
        )
    if not found.splits:
        raise ValueError(f"{path}: a {found.kind} data set without a part to train or evaluate on")
    return found


def write_coco(folder: DataFolder, output_dir: str | os.PathLike) -> dict[str, str]:
    """Paths of COCO files of all splits; those that are none yet are written to ``output_dir``."""
    paths = {}
    for name, split in folder.splits.items():
        if split.json_file is not None:
            paths[name] = split.json_file
            continue
        os.makedirs(output_dir, exist_ok=True)
        paths[name] = os.path.join(output_dir, f"{name}.json")
        # Renamed when it is whole: several processes of a run may write it at the same time.
        temporary = f"{paths[name]}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(split.content, file)
        os.replace(temporary, paths[name])
    return paths


def hold_out(folder: DataFolder) -> None:
    """Takes every tenth image out of "train" for "val".

    Raises:
        ValueError: there is only one image.
    """
    whole = folder.splits["train"]
    images = sorted(whole.content["images"], key=lambda image: str(image["file_name"]))
    held = {image["id"] for image in images[HELD_OUT - 1 :: HELD_OUT] or images[-1:]}
    if len(held) == len(images):
        raise ValueError(f"{folder.path}: one image alone is not enough to train and to evaluate")

    def part(is_held: bool) -> Split:
        content = {
            **whole.content,
            "images": [item for item in images if (item["id"] in held) == is_held],
            "annotations": [
                item
                for item in whole.content["annotations"]
                if (item["image_id"] in held) == is_held
            ],
        }
        return Split(content, whole.image_root, None, [] if is_held else whole.problems)

    folder.splits["val"], folder.splits["train"] = part(True), part(False)


def describe(folder: DataFolder) -> str:
    """What was read, as a table of objects by class and part."""
    counts = {name: split.count_objects() for name, split in folder.splits.items()}
    rows = [
        [label, *(part.get(label, 0) for part in counts.values())] for label in folder.class_names
    ]
    rows.append(["all", *(sum(part.values()) for part in counts.values())])
    rows.append(["images", *(len(split.content["images"]) for split in folder.splits.values())])
    notes = "".join(f"; {note}" for note in folder.notes)
    return f"{folder.path}: {folder.kind}{notes}\n" + tabulate(rows, ["objects", *counts])
