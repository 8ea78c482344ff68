"""Pascal VOC: one XML file for each image, lists of images for the parts."""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path

from .records import IMAGE_SUFFIXES, DataFolder, Object, image_size, split_name, split_of


def find_xml(root: Path) -> dict[str, list[Path]]:
    """XML files by split; all are "train" where nothing divides them.

    Raises:
        ValueError: there are several folders of annotations and no telling which is which.
    """
    if (root / "Annotations").is_dir():
        return _listed_xml(root / "Annotations")
    folders = [path for path in sorted(root.glob("*/Annotations")) if path.is_dir()]
    if len(folders) == 1 and split_name(folders[0].parent.name) is None:  # VOCdevkit/VOC2007
        return _listed_xml(folders[0])
    if not folders:  # XML files beside the images
        found = {
            name: sorted(path.glob("*.xml"))
            for path in sorted(root.iterdir())
            if path.is_dir() and (name := split_name(path.name))
        }
        return {name: files for name, files in found.items() if files}
    names = [split_name(path.parent.name) for path in folders]
    known = [name for name in names if name is not None]
    if len(set(known)) < len(names):
        raise ValueError(
            f"{root} holds several data sets, {', '.join(str(path.parent) for path in folders)}: "
            "name one of them, or call them train and val"
        )
    return {name: sorted(path.glob("*.xml")) for name, path in zip(known, folders)}


def _listed_xml(annotations: Path) -> dict[str, list[Path]]:
    """The parts that ImageSets/Main lists."""
    sets = annotations.parent / "ImageSets" / "Main"
    found = {}
    for name in ("train", "val", "test", "trainval"):
        if (sets / f"{name}.txt").is_file():
            lines = (sets / f"{name}.txt").read_text(encoding="utf-8").splitlines()
            stems = [line.split()[0] for line in lines if line.strip()]
            found[name] = [annotations / f"{stem}.xml" for stem in stems]
    both = found.pop("trainval", [])
    if both and "train" not in found:
        found["train"] = [path for path in both if path not in found.get("val", [])]
    return found or {"train": sorted(annotations.glob("*.xml"))}


def read_voc(root: Path, xml_files: Mapping[str, list[Path]]) -> DataFolder:
    notes: list[str] = []
    problems: dict[str, list[str]] = {name: [] for name in xml_files}
    parsed = {
        name: [entry for path in files if (entry := _parse_voc(path, problems[name]))]
        for name, files in xml_files.items()
    }
    entries = [entry for part in parsed.values() for entry in part]
    found = {item["name"] for entry in entries for item in entry["objects"]}
    names = _voc_class_order(root, found, notes)
    zero_based = any(min(item["box"][:2]) < 1 for entry in entries for item in entry["objects"])
    first = 0 if zero_based else 1
    notes.append(
        "corners start at 0 (one of them is 0)"
        if zero_based
        else "corners start at 1 and are inclusive, as in Pascal VOC"
    )

    def as_object(item: dict) -> Object:
        left, top, right, bottom = item["box"]
        box = left - first, top - first, right - left + first, bottom - top + first
        return Object(names.index(item["name"]), box, item["difficult"])

    splits = {}
    for name, part in parsed.items():
        image_root = (
            os.path.commonpath([entry["image"].parent for entry in part]) if part else str(root)
        )
        labelled = (
            (entry["image"], entry["size"], map(as_object, entry["objects"])) for entry in part
        )
        splits[name] = split_of(labelled, image_root, names, problems[name])
    return DataFolder(str(root), "Pascal VOC", splits, notes)


def _parse_voc(path: Path, problems: list[str]) -> dict | None:
    try:
        tree = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        problems.append(f"{path} does not exist, but ImageSets lists it")
        return None
    except ElementTree.ParseError as error:
        problems.append(f"{path} is not XML: {error}")
        return None
    image = _voc_image(path, tree.findtext("filename") or "")
    if image is None:
        problems.append(f"{path}: its image {tree.findtext('filename')!r} was not found")
        return None
    size = image_size(image, problems)
    if size is None:
        return None
    objects = []
    for item in tree.iter("object"):
        name, box = (item.findtext("name") or "").strip(), item.find("bndbox")
        try:
            if box is None:
                raise ValueError
            keys = ("xmin", "ymin", "xmax", "ymax")
            corners = [float(box.findtext(key) or "") for key in keys]
        except ValueError:
            problems.append(f"{path}: an object {name!r} has no box of four numbers")
            continue
        if not name:
            problems.append(f"{path}: an object has no name")
            continue
        objects.append(
            {"name": name, "box": corners, "difficult": item.findtext("difficult") == "1"}
        )
    return {"image": image, "size": size, "objects": objects}


def _voc_image(path: Path, file_name: str) -> Path | None:
    folders = [path.parent.parent / "JPEGImages", path.parent.parent / "images", path.parent]
    names = [file_name] * bool(file_name) + [path.stem + suffix for suffix in IMAGE_SUFFIXES]
    candidates = (folder / name for name in names for folder in folders)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _voc_class_order(root: Path, found: set[str], notes: list[str]) -> list[str]:
    for name in ("classes.txt", "labels.txt", "labelmap.txt"):
        if (root / name).is_file():
            lines = (root / name).read_text(encoding="utf-8").splitlines()
            listed = [line.split(":")[0].strip() for line in lines if not line.startswith("#")]
            listed = [item for item in listed if item and (item in found or item != "background")]
            if missing := sorted(found - set(listed)):
                raise ValueError(f"{root / name} lacks the classes {missing}, which objects have")
            notes.append(f"order of the classes from {name}")
            return listed
    notes.append("classes in alphabetical order (a classes.txt would give another)")
    return sorted(found)
