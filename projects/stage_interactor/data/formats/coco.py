"""COCO: one JSON file for each part, found by its name, and the folder that its images lie in."""

import json
from collections.abc import Mapping
from pathlib import Path

from .coco_file import summarise_coco_file
from .records import SPLITS, DataFolder, Split, split_name


def find_json(root: Path) -> dict[str, Path]:
    if root.is_file():
        return {split_name(root.stem) or "train": root} if root.suffix == ".json" else {}
    patterns = ("annotations/*.json", "*/_annotations.coco.json", "*.json", "*/*.json")
    files = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    found: dict[str, Path] = {}
    for path in dict.fromkeys(files):
        name = split_name(path.stem) or split_name(path.parent.name)
        of_boxes = "keypoints" not in path.stem and "captions" not in path.stem
        if name and name not in found and of_boxes and _is_coco(path):
            found[name] = path
    return {name: found[name] for name in SPLITS if name in found}


def _is_coco(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read_coco(root: Path, json_files: Mapping[str, Path]) -> DataFolder:
    splits = {}
    for name, path in json_files.items():
        summarise_coco_file(path)  # says what is wrong with it
        content = json.loads(path.read_text(encoding="utf-8"))
        content.setdefault("annotations", [])
        files = [image["file_name"] for image in content["images"][:20] if "file_name" in image]
        top = root if root.is_dir() else root.parent
        stem = path.stem.removeprefix("instances_")
        candidates = [path.parent]
        candidates += (top / part for part in (".", "images", name, stem))
        candidates += (top / "images" / part for part in (name, stem))
        candidates += (path.parent.parent / part for part in (stem, "images"))
        present = {c: sum((c / file).is_file() for file in files) for c in candidates if c.is_dir()}
        best = max(present, key=present.__getitem__)
        splits[name] = Split(content, str(best), str(path))
        if files and not present[best]:
            splits[name].problems.append(
                f"{path}: its images, such as {files[0]}, are in none of the folders "
                f"{', '.join(map(str, present))}"
            )
    return DataFolder(str(root), "COCO", splits)
