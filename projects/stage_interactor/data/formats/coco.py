"""COCO: one JSON file for each part, checked entry by entry.

Segmentations and keypoints are passed over: a box detector does not read them.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...d2.metrics import FEDERATED, FREQUENCIES
from ...untrusted.files import require_memory
from .files import SPLITS, Files, split_name, split_of_path, splits_of_files
from .source import (
    NO_CLASSES,
    WEIGHT,
    Labelled,
    Object,
    Part,
    Source,
    find_picture,
    no_collection,
    read_text,
    require_distinct_names,
)

_OTHER_TASKS = ("person_keypoints_", "captions_", "panoptic_", "stuff_", "image_info_")


def load_json(path: str) -> Any:
    """Raises a ValueError for what is no JSON."""
    try:
        with no_collection():
            text = read_text(path)
            require_memory(path, text)
            return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is JSON that is nested too deeply for any annotations") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not a JSON file ({error}); give the COCO annotation file, and download or "
            "write it again if it was cut off"
        ) from error
    except ValueError as error:  # no text; a number of thousands of digits
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def is_coco(content: Any) -> bool:
    keys = {"images", "annotations", "categories"}
    return isinstance(content, dict) and len(keys & content.keys()) >= 2


def of_other_task(path: str) -> bool:
    """Whether COCO's name of the file says that there are no boxes in it."""
    return path.rpartition("/")[2].lower().startswith(_OTHER_TASKS)


def read_coco(json_files: Mapping[str, Any], labels: Files, pictures: Files) -> Source:
    """Of the contents of JSON files by their paths, each a part; which, its name or folder says.

    Raises:
        ValueError: two files could be one part, or what :func:`parse` raises.
    """
    source = Source("COCO", {})
    splits = splits_of_files(json_files)
    for name in (None, *SPLITS):
        paths = [path for path, split in splits.items() if split == name]
        if len(paths) > 1:
            shortest = min(paths, key=len)
            # instances_val2017_100.json is a part of instances_val2017.json.
            few = rf"{re.escape(shortest.removesuffix('.json'))}_\d+\.json"
            if not all(path == shortest or re.fullmatch(few, path) for path in paths):
                shown = " and ".join(labels.absolute(path) for path in sorted(paths)[:3])
                told = f"be {name!r}" if name else "be meant"
                raise ValueError(f"{shown} could both {told}: name one with --annotations")
            paths = [shortest]
        for path in paths:
            labels.used.add(path)
            part = parse(json_files[path], labels.absolute(path))
            _find_pictures(part, path, name, pictures)
            source.parts |= {name: part} if name else _by_folders(part, pictures)
    drop_no_classes(source)
    return source


def _by_folders(part: Part, pictures: Files) -> dict[str, Part]:
    """The parts of one file for all, if each picture lies in a folder that is called like one."""
    names = [split_of_path(pictures.relative(entry.path)) for entry in part.labelled]
    if None in names or not names:
        return {"train": part}
    first = next(name for name in SPLITS if name in names)
    return {
        name: replace(
            part,
            labelled=[entry for entry, other in zip(part.labelled, names) if other == name],
            problems=part.problems if name == first else [],
            categories=dict(part.categories or {}),
        )
        for name in SPLITS
        if name in names
    }


def parse(content: Any, path: str) -> Part:
    """Checks a file's content and reads it; its pictures are named, not looked for.

    Raises:
        ValueError: it is no COCO file, a field is missing or of another type than it must be, an
            id is there twice, or it contradicts itself.
    """
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is JSON but no COCO file: its top level is a {type(content).__name__}, not an "
            "object with the lists 'images', 'annotations' and 'categories'"
        )
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(
                f"{path} is JSON but no COCO file: it has no list {key!r} (its keys: "
                f"{', '.join(map(repr, content)) or 'none':.200})"
            )
    annotations = content.get("annotations", [])
    if not isinstance(annotations, list):
        raise ValueError(f"{path}: 'annotations' must be a list, not {type(annotations).__name__}")
    if not content["categories"]:
        raise ValueError(f"{path}: the list 'categories' is empty; it must name the classes")
    content = {**content, "images": _named_by_address(content["images"])}
    for key, items, fields in (
        ("categories", content["categories"], ("id", "name")),
        ("images", content["images"], ("id", "file_name", "height", "width")),
        ("annotations", annotations, ("id", "image_id", "category_id", "bbox")),
    ):
        _require_fields(path, key, items, fields)

    ids = {
        "categories": _ids(path, "categories", content["categories"]),
        "images": _ids(path, "images", content["images"]),
        "annotations": _ids(path, "annotations", annotations),
    }
    names = {}
    for index, item in enumerate(content["categories"]):
        name = _text(item["name"], f"{path}: categories[{index}].name")
        names[ids["categories"][item["id"]]] = name
    for key in _parents_of_their_name(content["categories"], annotations):
        del names[ids["categories"][key]]
    require_distinct_names(names.values(), path)
    part = Part(
        categories={key: names[key] for key in sorted(names)},
        empty_parents=_parents(content["categories"]),
        as_written=all(type(key) is int and key == ids[k][key] for k in ids for key in ids[k]),
    )
    for item in content["categories"]:
        if item.get("frequency") in FREQUENCIES:
            part.frequencies[ids["categories"][item["id"]]] = item["frequency"]
    objects: dict[Any, list[Object]] = {item["id"]: [] for item in content["images"]}
    _read_annotations(annotations, path, part, ids, objects)
    for index, item in enumerate(content["images"]):
        where = f"{path}: images[{index}]"
        size = _side(item["width"], f"{where}.width"), _side(item["height"], f"{where}.height")
        name = _text(item["file_name"], f"{where}.file_name")
        part.labelled.append(
            Labelled(
                "",
                objects[item["id"]],
                path,
                size,
                ids["images"][item["id"]],
                name,
                _weight(item.get(WEIGHT), f"{where}.{WEIGHT}"),
                _federated(item, ids["categories"], where),
            )
        )
    return part


def _read_annotations(
    annotations: Sequence[dict],
    path: str,
    part: Part,
    ids: Mapping[str, Mapping[Any, int]],
    objects: Mapping[Any, list[Object]],
) -> None:
    """Fills the lists of ``objects``, by the id of their image, and what ``part`` says of them."""
    names = part.categories or {}
    category_ids, annotation_ids = ids["categories"], ids["annotations"]
    stray, areas, crowds, truths = [], [], [], []
    for item in annotations:
        written = item["id"]
        key, of_image = item["category_id"], item["image_id"]
        if type(key) not in (int, str, float) or key not in category_ids:
            raise ValueError(
                f"{path}: annotation {written} has category_id {key!r:.80}, which is not in "
                f"'categories' (ids {sorted(category_ids, key=str)[:20]}); add the category or "
                "correct the annotation"
            )
        if item.get("ignore", 0):
            raise ValueError(
                f"{path}: annotation {written} sets 'ignore', which is not supported; remove the "
                "annotation, or mark a region that is not to be scored with 'iscrowd': 1"
            )
        crowd, area = item.get("iscrowd"), item.get("area")
        if crowd is None:
            crowds.append(written)
        elif crowd not in (0, 1):
            raise ValueError(
                f"{path}: annotation {written}: iscrowd is {crowd!r:.80}; it must be 0 or 1"
            )
        elif isinstance(crowd, bool):
            truths.append(written)
        if type(area) not in (int, float):
            areas.append(written)
            area = None
        box = _box(item["bbox"], written, path)
        group = objects.get(of_image) if type(of_image) in (int, str, float) else None
        if group is None:
            _require_id_of_image(of_image, objects, f"{path}: annotation {written}")
            stray.append(written)
            continue
        group.append(
            Object(
                names[category_ids[key]],
                box,
                f"annotation {written}",
                bool(crowd),
                area=area,
                id=annotation_ids[written],
            )
        )
    part.as_written &= not (stray or areas or crowds)
    if stray:
        part.problems.append(
            f"{path}: {len(stray)} annotations belong to images that the file does not list and "
            f"are left out (e.g. annotation {stray[0]})"
        )
    for found, key, taken in (
        (areas, "area", "missing or no number; that of the box is taken"),
        (crowds, "iscrowd", "missing or null; taken as 0"),
        (truths, "iscrowd", "true or false; taken as 1, a region that is not scored, or 0"),
    ):
        if found and any(key in item for item in annotations):
            count = f"{len(found)} annotations (e.g. {found[0]})"
            part.notes.append(f"{path}: {key} of {count} is {taken}")


def _box(bbox: Any, written: Any, path: str) -> tuple[float, float, float, float]:
    if type(bbox) is list and len(bbox) == 4:
        x, y, w, h = bbox
        kinds = {type(x), type(y), type(w), type(h)}
        if kinds <= {int, float}:
            # An integer may be more than any number that the processor has.
            return (x, y, w, h) if int not in kinds else tuple(map(_number, bbox))  # type: ignore
    raise ValueError(
        f"{path}: bbox of annotation {written} is {bbox!r:.80}; it must be four numbers, "
        "[x, y, width, height] in pixels"
    )


def _require_id_of_image(key: Any, images: Mapping[Any, Any], where: str) -> None:
    """Raises a ValueError for what cannot be an image's id, rather than one that is not listed."""
    if type(key) not in (int, str, float):
        raise ValueError(f"{where}: image_id is {key!r:.80}; it must be a number")
    known = next(iter(images), key)
    if isinstance(key, str) != isinstance(known, str):
        raise ValueError(
            f"{where}: image_id is {key!r:.80}, but the ids of 'images' are such as {known!r:.80}: "
            "text and numbers are mixed"
        )


def _require_fields(path: str, list_name: str, items: list, keys: Sequence[str]) -> None:
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f"{path}: {list_name}[{index}] is {item!r:.80}, not an object")
        missing = [key for key in keys if key not in item]
        if missing:
            raise ValueError(
                f"{path}: {list_name}[{index}] has no {', '.join(map(repr, missing))}; COCO's "
                f"format needs {', '.join(map(repr, keys))} in every entry"
            )


def _ids(path: str, list_name: str, items: list[dict]) -> dict[Any, int]:
    """Whole numbers for ids: themselves, if they are such; else by their order in the file.

    Ids that are text of whole numbers count as those.
    """
    seen: dict[Any, None] = {}
    for index, item in enumerate(items):
        key = item["id"]
        if type(key) is float and key == key and abs(key) < 2**53 and key == int(key):
            key = int(key)
        if type(key) not in (int, str) or key == "":
            raise ValueError(
                f"{path}: {list_name}[{index}].id is {key!r:.80}; it must be a whole number, or "
                "text that names the entry"
            )
        if key in seen:
            raise ValueError(
                f"{path}: id {key!r:.80} occurs more than once in {list_name!r}; ids must be "
                "unique, give every entry its own"
            )
        seen[key] = None
    kinds = {type(key) for key in seen}
    if len(kinds) > 1:
        text = next(key for key in seen if type(key) is str)
        number = next(key for key in seen if type(key) is int)
        raise ValueError(
            f"{path}: the ids of {list_name!r} are numbers and text, such as {number} and "
            f"{text!r:.80}; make them one kind"
        )
    written = [int(k) if type(k) is int or _is_number(k) else None for k in seen]
    # Annotations from 1: COCO's evaluation takes a match with id 0 for none.
    least = 1 if list_name == "annotations" else -(2**31)
    fit = all(value is not None and least <= value < 2**53 for value in written)
    if fit and len(set(written)) == len(written):
        return dict(zip(seen, written))  # type: ignore[arg-type]
    if None not in written and list_name != "annotations":
        return {key: n for n, (_, key) in enumerate(sorted(zip(written, seen)), start=1)}  # type: ignore[type-var]
    return {key: n for n, key in enumerate(seen, start=1)}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16 and str(int(text)) == text


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"{where} is {value!r:.80}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is {value!r:.80}, which is no text: {error.reason}") from error
    return value


def _named_by_address(images: list) -> list:
    """LVIS names pictures by where COCO has them: .../train2017/000000391895.jpg."""
    return [
        {**item, "file_name": "/".join(item["coco_url"].split("/")[-2:])}
        if isinstance(item, dict)
        and "file_name" not in item
        and isinstance(item.get("coco_url"), str)
        else item
        for item in images
    ]


def _federated(
    item: Mapping[str, Any], ids: Mapping[Any, int], where: str
) -> dict[str, list[int]] | None:
    """LVIS's lists of the categories that are not in a picture, or not all marked in it."""
    found = {}
    for name in FEDERATED:
        if name not in item:
            return None
        listed = item[name]
        if not isinstance(listed, list) or any(
            type(key) not in (int, str) or key not in ids for key in listed
        ):
            raise ValueError(
                f"{where}.{name} is {listed!r:.80}; it must be a list of ids of 'categories'"
            )
        found[name] = [ids[key] for key in listed]
    return found


def _weight(value: Any, where: str) -> float | None:
    if value is None:
        return None
    is_number = type(value) in (int, float) and math.isfinite(_number(value))
    if not is_number or value <= 0:
        raise ValueError(f"{where} is {value!r:.80}; it must be a number of more than 0")
    return float(value)


def _side(value: Any, where: str) -> int:
    whole = type(value) is int or (type(value) is float and math.isfinite(value))
    if not whole or value != int(value) or not 0 < value < 2**31:
        raise ValueError(f"{where} is {value!r:.80}; it must be a whole number of pixels")
    return int(value)


def _number(value: float) -> float:
    try:
        float(value)
    except OverflowError:  # an integer that no number of the processor holds
        return math.inf
    return value


def _find_pictures(part: Part, path: str, split: str | None, pictures: Files) -> None:
    """Where they are: all below one folder by the names in the file, or each by its own name."""
    names = [str(item.name).replace("\\", "/") for item in part.labelled]
    sample = names[:: max(len(names) // 50, 1)]
    folder = path.rpartition("/")[0]

    def score(top: str) -> tuple:
        start = f"{top}/" if top else ""
        found = sum(os.path.normpath(start + name) in pictures for name in sample)
        of_split = split_name(top.rpartition("/")[2]) or split_of_path(f"{top}/")
        fits = split is None or of_split in (None, split)
        return found, fits, of_split == split, top == folder

    scores = {top: score(top) for top in pictures.folders}
    most = max(scores.values())
    if sample and most[:2] == (len(sample), True):
        best = [top for top in scores if scores[top] == most]
        start = f"{best[0]}/" if best[0] else ""
        whole = [os.path.normpath(start + name) for name in names]
        if len(best) == 1 and all(name in pictures for name in whole):
            part.image_root = pictures.absolute(best[0]) if best[0] else pictures.root
            pictures.used.update(whole)
            root = part.image_root
            part.labelled = [
                item._replace(path=os.path.join(root, name), name=name)
                for item, name in zip(part.labelled, names)
            ]
            return
    problems: list[str] = []
    kept = []
    pictures.expect(names, path)
    for item, name in zip(part.labelled, names):
        found = find_picture(pictures, name, path, problems, split)
        if found is not None:
            kept.append(item._replace(path=pictures.absolute(found), name=None))
    if problems and not kept:
        told = (
            "" if "--images" in problems[0] else "; name the folder of the pictures with --images"
        )
        raise ValueError(problems[0] + told)
    part.problems += problems
    part.labelled = kept


def _parents(categories: list[dict]) -> list[str]:
    """Names of categories that are above others and below none."""
    above = {item.get("supercategory") for item in categories if item.get("name") != item.get(
        "supercategory") and isinstance(item.get("supercategory"), str)}  # fmt: skip
    return [
        item["name"]
        for item in categories
        if item["name"] in above and item.get("supercategory") in (None, "", "none")
    ]


def _parents_of_their_name(categories: list[dict], annotations: list[dict]) -> list[Any]:
    """Ids of categories without objects that others of the same name are below (Roboflow's)."""
    below = {item["name"] for item in categories if item.get("supercategory") == item["name"]}
    tops = [
        item["id"]
        for item in categories
        if item["name"] in below and item.get("supercategory") in (None, "", "none")
    ]
    used = [item["category_id"] for item in annotations] if tops else []
    return [key for key in tops if key not in used]


def drop_no_classes(source: Source) -> None:
    """labelme's ``_background_`` and Roboflow's empty parent of all classes are no classes."""
    used = Counter(
        item.label for part in source.parts.values() for entry in part.labelled
        for item in entry.objects
    )  # fmt: skip
    for part in source.parts.values():
        dropped = [name for name in (part.categories or {}).values() if name in NO_CLASSES]
        dropped += [name for name in part.empty_parents if not used[name]]
        part.categories = {k: n for k, n in (part.categories or {}).items() if n not in dropped}
        if dropped:
            part.as_written = False
            source.notes.append(f"{', '.join(map(repr, dict.fromkeys(dropped)))} is no class")
        part.labelled = [
            entry._replace(objects=[item for item in entry.objects if item.label not in dropped])
            for entry in part.labelled
        ] if any(used[name] for name in dropped) else part.labelled  # fmt: skip
