"""What is wrong, or looks wrong, in a data set: for ``stage-interactor data check``."""

import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from torchvision.ops import box_iou
from tqdm import tqdm

from ..d2.structures import Boxes
from ..untrusted.files import read_head
from .images import ImageReadError, read_image
from .reading import DataFolder, Split, count_by_image
from .splitting import hold_out

_SMALLEST_SIDE = 2.0  # pixels
_LARGEST_ASPECT = 30.0
_DUPLICATE_IOU = 0.95
_MOST_COMPARED = 2000  # boxes of an image, of which all pairs are compared
_MOST_PAIRS_TOLD = 100  # of boxes of an image that are nearly the same
_FEW_OBJECTS = 10
_HASHED = 2**26  # bytes of a file that it is told by, and their number
COUNTED = 100  # detections of a class in an image that COCO's AP looks at


@dataclass
class Findings:
    """Of one data set; messages by split, the empty string for what concerns several."""

    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def check_folder(
    folder: DataFolder, *, decode: bool = True, num_queries: int = COUNTED
) -> Findings:
    """Looks at every annotation, and with ``decode`` at every pixel.

    ``num_queries`` is how many objects of an image a model can find.

    Errors are what was left out, or what training or evaluation would fail on; warnings what is
    probably not meant: boxes that leave their image, are tiny, very long, or there twice; classes
    without objects or with few; images with more objects than are scored; an image that is in two
    parts.
    """
    found = Findings()
    found.errors[""] += why_not_trainable(folder)
    for name, text in doubts(folder, num_queries):
        found.warnings[name].append(text)
    seen: dict[str, tuple[str, str]] = {}  # by content of the file
    for name, split in folder.splits.items():
        errors, warnings = found.errors[name], found.warnings[name]
        errors += split.problems
        _check_images(name, split, errors, found.warnings[""], seen, decode)
        warnings += _suspicious_boxes(split)
    return found


def doubts(folder: DataFolder, num_queries: int | None) -> Iterator[tuple[str, str]]:
    """What is likely to make a worse detector than is hoped for: by part, in words.

    ``num_queries`` are those of the model; None says nothing of images with many objects.
    """
    trained = folder.splits["train"].count_objects() if "train" in folder.splits else {}
    for name, split in folder.splits.items():
        counts = split.count_objects()
        if empty := [label for label in counts if not counts[label]]:
            yield name, f"no object of the classes {empty}"
        if name == "train":
            few = [f"{n} of {label!r}" for label, n in counts.items() if 0 < n < _FEW_OBJECTS]
            if few:
                yield name, f"few objects: {', '.join(few)}"
        elif trained:
            new = [label for label, n in counts.items() if n and not trained.get(label)]
            if new:
                yield name, f"objects of {new}, of which there are none to train on"
        if num_queries is None:
            continue
        most = min(num_queries, COUNTED)
        if crowded := [n for n in count_by_image(split).values() if n > most]:
            yield (
                name,
                (
                    f"{len(crowded)} images have more than {most} objects, up to {max(crowded)}: a "
                    f"model finds as many as it has queries, {num_queries}, and AP looks at "
                    f"{COUNTED} of a class (stage-interactor train raises both to fit)"
                ),
            )


def why_not_trainable(folder: DataFolder) -> list[str]:
    """What would stop a training on a data set, or make its AP mean nothing."""
    splits = dict(folder.splits)
    found = []
    if "train" not in splits:
        return [f"there is no part to train on, only {', '.join(splits)}"]
    names = {name: sorted(split.class_names) for name, split in splits.items()}
    found += [
        f"train has the classes {splits['train'].class_names}, {name} has others: "
        f"{splits[name].class_names}"
        for name in splits
        if names[name] != names["train"]
    ]
    for name in ("train", "val"):
        if name in splits and not any(splits[name].count_objects().values()):
            found.append(f"{name} has no objects")
    if "val" in splits and len(splits["val"].content["images"]) < 2:
        found.append("val has a single image: an AP of it means nothing; name more, or none")
    if "val" not in splits and not found:
        whole = DataFolder(folder.path, folder.kind, splits)
        try:
            hold_out(whole)
        except ValueError as error:
            return [str(error)]
        return [f"held out of train, {text}" for text in why_not_trainable(whole)]
    return found


def _check_images(
    name: str,
    split: Split,
    errors: list[str],
    across: list[str],
    seen: dict[str, tuple[str, str]],
    decode: bool,
) -> None:
    records = split.content["images"]
    paths = [os.path.join(split.image_root, record["file_name"]) for record in records]

    def look(path: str) -> tuple[str, str | None]:
        """Digest of the file, and what is wrong with it."""
        try:
            content = read_head(path, _HASHED)
            digest = hashlib.sha1(content).hexdigest() + str(os.path.getsize(path))
            if decode:
                read_image(path)
        except ImageReadError as error:
            return digest, f"{path} cannot be read: {error.reason}"
        except OSError as error:
            return "", f"{path} cannot be read: {error}"
        return digest, None

    with ThreadPoolExecutor() as pool:
        looked = pool.map(look, paths)
        bar = tqdm(looked, total=len(paths), desc=name, unit="image", leave=False)
        for path, (digest, problem) in zip(paths, bar):
            if problem is not None:
                errors.append(problem)
            elif digest in seen:
                first, other = seen[digest]
                across.append(f"{path} ({name}) is the same picture as {other} ({first})")
            else:
                seen[digest] = (name, path)


def _suspicious_boxes(split: Split) -> Iterator[str]:
    images = {record["id"]: record for record in split.content["images"]}
    by_image = defaultdict(list)
    for item, written in zip(split.content["annotations"], split.written):
        record = images[item["image_id"]]
        by_image[record["id"]].append((item, written))
        x, y, w, h = item["bbox"]
        where = f"{record['file_name']}, {written}: box {item['bbox']} (x, y, w, h)"
        if min(x, y, record["width"] - x - w, record["height"] - y - h) < -1:
            yield f"{where} leaves its image, {record['width']} x {record['height']}"
        elif min(w, h) < _SMALLEST_SIDE:
            yield f"{where} is less than {_SMALLEST_SIDE:g} pixels wide or high"
        elif max(w / h, h / w) > _LARGEST_ASPECT:
            yield f"{where} is more than {_LARGEST_ASPECT:g} times as long as wide"
    for image_id, items in by_image.items():
        pairs = _duplicates(items[:_MOST_COMPARED])
        where = images[image_id]["file_name"]
        for first, second in itertools.islice(pairs, _MOST_PAIRS_TOLD):
            yield f"{where}: {first} and {second} are nearly the same box"
        if more := sum(1 for _ in pairs):
            yield f"{where}: {more} more pairs of boxes are nearly the same"


def _duplicates(items: list[tuple[dict, str]]) -> Iterator[tuple[str, str]]:
    corners = Boxes([(x, y, x + w, y + h) for x, y, w, h in (item["bbox"] for item, _ in items)])
    classes = np.array([item["category_id"] for item, _ in items])
    overlap = box_iou(corners.tensor, corners.tensor).numpy() > _DUPLICATE_IOU
    overlap &= classes[:, None] == classes
    for first, second in np.argwhere(np.triu(overlap, 1)):
        yield items[first][1], items[second][1]


def check_trainable(folder: DataFolder) -> None:
    """Raises a ValueError for what would stop training, or make its AP wrong, later on."""
    if problems := why_not_trainable(folder):
        raise ValueError(f"{folder.path}: {'; '.join(problems)}")
