"""YOLO: a description in YAML, images, and beside them one text file of boxes for each."""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from tqdm import tqdm

from .records import (
    IMAGE_SUFFIXES,
    SPLITS,
    DataFolder,
    Object,
    image_size,
    require_distinct_names,
    split_of,
)


def find_yaml(root: Path) -> Path | None:
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


def read_yolo(path: Path) -> DataFolder:
    content = _load_yaml(path) or {}
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise ValueError(f"{path}: the keys of 'names' must be 0, 1, ..., got {list(names)}")
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: 'names' must be the list of the classes, got {names!r}")
    require_distinct_names(map(str, names), path)
    base = Path(os.path.normpath(path.parent / Path(content.get("path") or ".").expanduser()))
    splits = {}
    for name in SPLITS:
        places = content.get(name) or (content.get("valid") if name == "val" else None)
        if not places:
            continue
        problems: list[str] = []
        images = _yolo_images(path, base, [places] if isinstance(places, str) else places)
        root = os.path.commonpath([image.parent for image in images]) if images else str(base)
        bar = tqdm(images, desc=f"{path.parent.name} {name}", unit="image", leave=False)
        labelled = (
            (image, size, _yolo_objects(image, size, len(names), problems, "kpt_shape" in content))
            for image in bar
            if (size := image_size(image, problems))
        )
        splits[name] = split_of(labelled, root, map(str, names), problems)
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


def _yolo_objects(
    image: Path,
    size: tuple[int, int],
    num_classes: int,
    problems: list[str],
    has_keypoints: bool,
) -> Iterator[Object]:
    """Of an image's label file; without one there is no object."""
    path = _label_file(image)
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
            yield Object(int(index), box)
        elif len(values) >= 6 and len(values) % 2 == 0:  # the outline of a segment
            xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
            box = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
            yield Object(int(index), box)
        else:
            problems.append(f"{where}: {len(values)} numbers after the class; a box has 4")
