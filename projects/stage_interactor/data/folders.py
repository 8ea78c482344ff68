"""Data sets as people keep them, COCO, YOLO and Pascal VOC, read as COCO's records.

What cannot be meant is named in ``problems`` and left out; nothing on disk is changed.
"""

import glob
import json
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from PIL import Image
from tqdm import tqdm

from .coco_check import summarise_coco_file

SPLITS = ("train", "val", "test")
_ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_EXIF_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)


@dataclass
class Split:
    """One part of a data set."""

    content: dict  # as a COCO file: images, annotations, categories
    image_root: str  # where the images' file names start
    json_file: str | None = None  # the file that the content is, where it is one
    problems: list[str] = field(default_factory=list)

    @property
    def categories(self) -> list[dict]:
        """By class index: their ids in order."""
        return sorted(self.content["categories"], key=lambda category: category["id"])

    @property
    def class_names(self) -> list[str]:
        return [category["name"] for category in self.categories]


@dataclass
class DataFolder:
    """A data set in one of the formats that are read."""

    path: str
    kind: str  # "COCO", "YOLO" or "Pascal VOC"
    splits: dict[str, Split]  # "train", "val", "test"; those that are there
    notes: list[str] = field(default_factory=list)  # how it was understood

    @property
    def class_names(self) -> list[str]:
        return next(iter(self.splits.values())).class_names


def read_folder(path: str | os.PathLike) -> DataFolder:
    """Recognises and reads a data set.

    - YOLO: a folder with a ``data.yaml`` (``names``, ``train``, ``val``), or that file.
    - Pascal VOC: ``Annotations/*.xml`` with ``ImageSets/Main/train.txt`` ..., or XML files beside
      the images in ``train/``, ``valid/`` ... Classes have an order only if ``classes.txt``,
      ``labels.txt`` or ``labelmap.txt`` gives one; otherwise they are sorted. Corners are 1-based
      and inclusive, as in VOC, unless one of them is 0. Difficult objects become crowd regions.
    - COCO: ``annotations/*train*.json`` ..., ``train/_annotations.coco.json``, ``train.json``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none of these, or its description of itself cannot be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{path}: there is no such folder")
    yaml_file = root if root.suffix in (".yaml", ".yml") else _find_yaml(root)
    if yaml_file is not None:
        found = _read_yolo(yaml_file)
    elif root.is_dir() and (xml_files := _find_xml(root)):
        found = _read_voc(root, xml_files)
    elif json_files := _find_json(root):
        found = _read_coco(root, json_files)
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
        paths[name] = split.json_file
        if split.json_file is None:
            os.makedirs(output_dir, exist_ok=True)
            paths[name] = os.path.join(output_dir, f"{name}.json")
            with open(paths[name], "w", encoding="utf-8") as file:
                json.dump(split.content, file)
    return paths


def split_name(text: str) -> str | None:
    """The split that a file or folder name speaks of: ``instances_val2017`` is "val"."""
    words = text.lower().replace("-", "_").replace(".", "_").split("_")
    for word in words:
        word = word.rstrip("0123456789")
        word = _ALIASES.get(word, word)
        if word in SPLITS:
            return word
    return None


# YOLO


def _find_yaml(root: Path) -> Path | None:
    candidates = [*root.glob("*.yaml"), *root.glob("*.yml")] if root.is_dir() else []
    for path in sorted(candidates, key=lambda path: (path.stem != "data", path)):
        if "names" in (_load_yaml(path) or {}):
            return path
    return None


def _load_yaml(path: Path) -> dict | None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    return content if isinstance(content, dict) else None


def _read_yolo(path: Path) -> DataFolder:
    content = _load_yaml(path) or {}
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise ValueError(f"{path}: the keys of 'names' must be 0, 1, ..., got {list(names)}")
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: 'names' must be the list of the classes, got {names!r}")
    base = Path(os.path.normpath(path.parent / Path(content.get("path") or ".").expanduser()))
    categories = _categories(map(str, names))
    splits = {}
    for name in SPLITS:
        places = content.get(name) or (content.get("valid") if name == "val" else None)
        if not places:
            continue
        problems: list[str] = []
        images = _yolo_images(path, base, [places] if isinstance(places, str) else places)
        root = os.path.commonpath([image.parent for image in images]) if images else str(base)
        records, annotations = [], []
        for image in tqdm(images, desc=f"{path.parent.name} {name}", unit="image", leave=False):
            size = _image_size(image, problems)
            if size is None:
                continue
            record = _record(len(records) + 1, os.path.relpath(image, root), size)
            records.append(record)
            labels = _yolo_boxes(
                _label_file(image), size, len(names), problems, "kpt_shape" in content
            )
            for box, index in labels:
                annotations.append(_annotation(len(annotations) + 1, record, index, box))
        content_of_split = _content(records, annotations, categories)
        splits[name] = Split(content_of_split, str(root), None, problems)
    return DataFolder(str(path.parent), "YOLO", splits)


def _yolo_images(yaml_file: Path, base: Path, places: Iterable[str]) -> list[Path]:
    images: list[Path] = []
    for place in places:
        # Relative to `path`; some exports write ../train/images and mean the file's own folder.
        tried = [base / place, yaml_file.parent / place, base / str(place).removeprefix("../")]
        found = next((candidate for candidate in tried if candidate.exists()), None)
        if found is None:
            raise ValueError(f"{yaml_file}: {place} does not exist (looked for {tried[0]})")
        if found.is_dir():
            images += (p for p in found.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            lines = found.read_text(encoding="utf-8").split("\n")
            images += (found.parent / line.strip() for line in lines if line.strip())
    return sorted(Path(os.path.normpath(image)) for image in images)


def _label_file(image: Path) -> Path:
    """labels/x.txt of images/x.jpg; the last folder of that name counts."""
    parts = list(image.with_suffix(".txt").parts)
    for index in reversed(range(len(parts) - 1)):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts)


def _yolo_boxes(
    path: Path,
    size: tuple[int, int],
    num_classes: int,
    problems: list[str],
    has_keypoints: bool,
) -> Iterator[tuple[list[float], int]]:
    """Boxes xywh in pixels and class indices of a label file; without one there is no object."""
    if not path.exists():
        return
    width, height = size
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        problems.append(f"{path} is not text: {error}")
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            index, *values = (float(value) for value in line.split())
        except ValueError:
            problems.append(f"{where}: not numbers: {line.strip()[:60]!r}")
            continue
        if not all(map(math.isfinite, (index, *values))):
            problems.append(f"{where}: not finite: {line.strip()[:60]!r}")
            continue
        values = values[:4] if has_keypoints else values
        if index != int(index) or not 0 <= index < num_classes:
            problems.append(f"{where}: class {index:g}, but there are {num_classes} classes")
        elif len(values) == 4:
            x, y, w, h = values
            box = (x - w / 2) * width, (y - h / 2) * height, w * width, h * height
            yield _rounded(*box), int(index)
        elif len(values) >= 6 and len(values) % 2 == 0:  # the outline of a segment
            xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
            box = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
            yield _rounded(*box), int(index)
        else:
            problems.append(f"{where}: {len(values)} numbers after the class; a box has 4")


def _rounded(*box: float) -> list[float]:
    """To a hundredth of a pixel, which is what the six decimals of such files can tell."""
    return [round(value, 2) for value in box]


# Pascal VOC


def _find_xml(root: Path) -> dict[str, list[Path]]:
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
        folders = [
            path for path in sorted(root.iterdir()) if path.is_dir() and split_name(path.name)
        ]
        found = {split_name(path.name): sorted(path.glob("*.xml")) for path in folders}
        return {name: files for name, files in found.items() if files}
    names = [split_name(path.parent.name) for path in folders]
    if None in names or len(set(names)) < len(names):
        raise ValueError(
            f"{root} holds several data sets, {', '.join(str(path.parent) for path in folders)}: "
            "name one of them, or call them train and val"
        )
    return {name: sorted(path.glob("*.xml")) for name, path in zip(names, folders)}


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


def _read_voc(root: Path, xml_files: Mapping[str, list[Path]]) -> DataFolder:
    notes: list[str] = []
    problems = {name: [] for name in xml_files}
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
    categories = _categories(names)
    splits = {}
    for name, part in parsed.items():
        image_root = (
            os.path.commonpath([entry["image"].parent for entry in part]) if part else str(root)
        )
        records, annotations = [], []
        for entry in part:
            file_name = os.path.relpath(entry["image"], image_root)
            record = _record(len(records) + 1, file_name, entry["size"])
            records.append(record)
            for item in entry["objects"]:
                left, top, right, bottom = item["box"]
                box = [left - first, top - first, right - left + first, bottom - top + first]
                annotation = _annotation(
                    len(annotations) + 1, record, names.index(item["name"]), _rounded(*box)
                )
                annotations.append(annotation | {"iscrowd": int(item["difficult"])})
        content = _content(records, annotations, categories)
        splits[name] = Split(content, str(image_root), None, problems[name])
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
    size = _image_size(image, problems)
    if size is None:
        return None
    objects = []
    for item in tree.iter("object"):
        name, box = (item.findtext("name") or "").strip(), item.find("bndbox")
        try:
            corners = [float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")]
        except (AttributeError, TypeError, ValueError):
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


# COCO


def _find_json(root: Path) -> dict[str, Path]:
    if root.is_file():
        return {split_name(root.stem) or "train": root} if root.suffix == ".json" else {}
    patterns = ("annotations/*.json", "*/_annotations.coco.json", "*.json", "*/*.json")
    files = [Path(path) for pattern in patterns for path in sorted(glob.glob(str(root / pattern)))]
    found: dict[str, Path] = {}
    for path in dict.fromkeys(files):
        name = split_name(path.stem) or split_name(path.parent.name)
        if (
            name
            and name not in found
            and "keypoints" not in path.stem
            and "captions" not in path.stem
        ):
            if _is_coco(path):
                found[name] = path
    return {name: found[name] for name in SPLITS if name in found}


def _is_coco(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def _read_coco(root: Path, json_files: Mapping[str, Path]) -> DataFolder:
    splits = {}
    for name, path in json_files.items():
        summarise_coco_file(path)  # says what is wrong with it
        content = json.loads(path.read_text(encoding="utf-8"))
        content.setdefault("annotations", [])
        files = [image["file_name"] for image in content["images"][:20] if "file_name" in image]
        top = root if root.is_dir() else root.parent
        stem = path.stem.removeprefix("instances_")
        candidates = [
            path.parent,
            top,
            top / "images",
            top / name,
            top / stem,
            top / "images" / name,
        ]
        candidates += [
            top / "images" / stem,
            path.parent.parent / stem,
            path.parent.parent / "images",
        ]
        present = {c: sum((c / file).is_file() for file in files) for c in candidates if c.is_dir()}
        best = max(present, key=present.get)
        splits[name] = Split(content, str(best), str(path))
        if files and not present[best]:
            splits[name].problems.append(
                f"{path}: its images, such as {files[0]}, are in none of the folders "
                f"{', '.join(map(str, present))}"
            )
    return DataFolder(str(root), "COCO", splits)


# Common


def _image_size(path: Path, problems: list[str]) -> tuple[int, int] | None:
    """Width and height, turned upright; None, and a problem, if the file cannot be read."""
    try:
        with Image.open(path) as image:
            size = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
    except Exception as error:  # decoders raise nearly anything on a damaged file
        problems.append(f"{path} cannot be read as an image: {type(error).__name__}: {error}")
        return None
    return size[::-1] if turned else size


def _record(image_id: int, file_name: str, size: tuple[int, int]) -> dict:
    return {"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]}


def _categories(names: Iterable[str]) -> list[dict]:
    return [{"id": index, "name": name} for index, name in enumerate(names, start=1)]


def _annotation(annotation_id: int, record: dict, class_index: int, box: list[float]) -> dict:
    return {
        "id": annotation_id,
        "image_id": record["id"],
        "category_id": class_index + 1,
        "bbox": box,
        "area": round(box[2] * box[3], 4),
        "iscrowd": 0,
    }


def _content(images: list[dict], annotations: list[dict], categories: list[dict]) -> dict:
    return {"images": images, "annotations": annotations, "categories": categories}
