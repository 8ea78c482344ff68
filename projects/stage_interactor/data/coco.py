"""Data sets in COCO format: registered by name, checked, and loaded as detectron2's records."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from ..d2.data import (
    DatasetCatalog,
    MetadataCatalog,
    get_detection_dataset_dicts,
    register_coco_instances,
)
from ..d2.structures import BoxMode
from .formats.coco_file import CocoSummary, summarise_coco_file
from .formats.records import box_problem, require_distinct_names

logger = logging.getLogger(__name__)


def load_coco_dataset(
    name: str,
    json_file: str | None = None,
    image_root: str | None = None,
    *,
    filter_empty: bool | None = None,
    is_train: bool = True,
) -> list[dict]:
    """Loads a data set, after checks of its files.

    Boxes of zero, negative or non-finite size, boxes wholly outside of their image, and in
    training missing image files are left out, with one warning that counts them.

    Args:
        name: of a registered data set such as `coco_2017_train`, whose files lie in the folder
            that the environment variable DETECTRON2_DATASETS names; with `json_file`, the name
            to register that file under (again, if the name belongs to other files).
        json_file: annotations in COCO's instance format.
        image_root: the folder that the file names in `json_file` start from.
        filter_empty: leave out images without objects; by default in training only.
        is_train: missing images are left out in training and an error in evaluation, where AP
            would otherwise silently count them as images without detections.

    Returns:
        detectron2's dataset dicts: `file_name`, `height`, `width`, `image_id`, and `annotations`
        with `bbox` (x, y, width, height in pixels), `bbox_mode`, `category_id` (class index from
        0), `iscrowd`.

    Raises:
        FileNotFoundError: annotation file or images are not there.
        KeyError: `name` is not registered and no `json_file` is given.
        ValueError: the file is no valid COCO file, or nothing is in it; see `formats.coco_file`.
            Also if two classes have one name.
    """
    if json_file is None:
        summary = _summarise_registered(name)
    else:
        summary = summarise_coco_file(json_file)
        if not image_root:
            raise ValueError(
                f"data set {name!r}: json_file={json_file!r} needs image_root, the folder that "
                "its file names start from"
            )
        _register(name, os.path.expanduser(json_file), os.path.expanduser(image_root), summary)
    source = MetadataCatalog.get(name).get("json_file") or f"data set {name!r}"

    filter_empty = is_train if filter_empty is None else filter_empty
    if summary is not None:
        _check_usable(source, summary, filter_empty=filter_empty, is_train=is_train)
    records = get_detection_dataset_dicts(name, filter_empty=False)
    require_distinct_names(MetadataCatalog.get(name).get("thing_classes") or (), source)
    problems = []
    if summary is not None and summary.num_stray:
        problems.append(
            f"{summary.num_stray} annotations belong to images that the file does not list and "
            f"are left out (e.g. annotation {summary.stray_example})"
        )
    records = _drop_bad_boxes(records, problems)
    records = _drop_missing_images(records, name, problems, is_train=is_train)
    if problems:
        logger.warning("%s: %s", source, "; ".join(problems))
    if filter_empty:
        total = len(records)
        records = [record for record in records if _has_objects(record)]
        if total > len(records):
            logger.info("%s: left out %d images without objects", source, total - len(records))
        if not records:
            raise ValueError(
                f"{source}: no image is left that has a usable object; look at the boxes, or load "
                "it with filter_empty=False"
            )
    return records


def class_names(json_file: str | None = None, name: str | None = None) -> list[str]:
    """Names of the classes, by class index, of an annotation file or of a registered data set.

    Raises:
        ValueError: neither or both are given, the file is no valid COCO file, or two classes have
            one name.
        FileNotFoundError, KeyError: see `load_coco_dataset`.
    """
    if (json_file is None) == (name is None):
        raise ValueError(
            f"give either json_file or name, got json_file={json_file!r}, name={name!r}"
        )
    if name is None:
        return list(summarise_coco_file(json_file or "").classes.values())
    _require_registered(name)
    known = MetadataCatalog.get(name).get("thing_classes")
    if known is not None:
        require_distinct_names(known, f"data set {name!r}")
        return list(known)
    summary = _summarise_registered(name)
    if summary is None:
        raise ValueError(
            f"data set {name!r} is registered without class names; set "
            f"MetadataCatalog.get({name!r}).thing_classes"
        )
    return list(summary.classes.values())


def count_classes(json_file: str | None = None, name: str | None = None) -> int:
    """Number of classes of an annotation file or of a registered data set; see `class_names`."""
    return len(class_names(json_file=json_file, name=name))


def categories_of(name: str) -> list[dict]:
    """COCO's categories of a registered data set, ``{"id", "name"}``, by class index.

    Raises:
        KeyError, ValueError: see `class_names`.
    """
    names = class_names(name=name)
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    ids = {index: index for index in range(len(names))} if ids is None else ids
    return [{"id": key, "name": names[ids[key]]} for key in sorted(ids, key=ids.__getitem__)]


def objects_of_image(
    json_file: str, image: str, class_names: Sequence[str]
) -> tuple[list[list[float]], list[int]]:
    """Boxes xyxy in pixels, and indices into ``class_names``, of an image in a COCO file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no valid COCO file, lists the image not or more than once, or an object
            has another class.
    """
    summarise_coco_file(json_file)  # says what is wrong with it
    with open(json_file, encoding="utf-8") as file:
        content = json.load(file)
    parts = Path(image).absolute().parts

    def common(record: Mapping) -> int:
        """How many of the last parts of its path an image shares with ours."""
        pairs = zip(reversed(parts), reversed(Path(record["file_name"]).parts))
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(parts))

    best = max(map(common, content["images"]), default=0)
    ids = {record["id"] for record in content["images"] if common(record) == best}
    if not best:
        raise ValueError(f"{json_file} lists no image {Path(image).name}")
    if len(ids) > 1:
        raise ValueError(f"{json_file} lists {len(ids)} images {Path(image).name}: which is meant?")
    index = {name: position for position, name in enumerate(class_names)}
    known = {category["id"]: category["name"] for category in content["categories"]}
    items = [a for a in content["annotations"] if a["image_id"] in ids and not a.get("iscrowd", 0)]
    unknown = sorted({known[a["category_id"]] for a in items} - set(index))
    if unknown:
        raise ValueError(f"{json_file} has the classes {unknown}, the detector knows {list(index)}")
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in items)]
    return boxes, [index[known[item["category_id"]]] for item in items]


def check_num_classes(dataset_name: str, num_classes: int) -> None:
    """Raises a ValueError if a model is built for another number of classes than its data has."""
    names = class_names(name=dataset_name)
    if len(names) != num_classes:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(
            f"the model has num_classes={num_classes}, but data set {dataset_name!r} has "
            f"{len(names)} classes ({shown}); set model.num_classes={len(names)}, or use the data "
            "set that the model was made for"
        )


def check_same_classes(
    names: Sequence[str], others: Sequence[str], whose: str, whose_others: str
) -> None:
    """Raises a ValueError that lists both, unless two lists of classes are equal, order included.

    ``whose`` and ``whose_others`` say where they are from.
    """
    if list(names) == list(others):
        return
    same = sorted(map(str, names)) == sorted(map(str, others))
    raise ValueError(
        f"{whose} has the classes {list(names)}, but {whose_others} has "
        + ("them in another order: " if same else "others: ")
        + f"{list(others)}; a class is known by its position, so give the categories "
        "the same names in the same order of their ids"
    )


def _require_registered(name: str) -> None:
    if name not in DatasetCatalog:
        near = get_close_matches(name, list(DatasetCatalog), n=3) or sorted(DatasetCatalog)[:10]
        raise KeyError(
            f"no data set is registered as {name!r} (known are e.g. {', '.join(near)}); for data "
            "of your own give json_file and image_root"
        )


def _summarise_registered(name: str) -> CocoSummary | None:
    """None for a data set that was registered by a function instead of a JSON file."""
    _require_registered(name)
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if json_file is None:
        return None
    for path in filter(None, (json_file, metadata.get("image_root"))):
        if not os.path.exists(path):
            folder = os.environ.get("DETECTRON2_DATASETS")
            told = "is not set, which means ./datasets" if folder is None else f"is {folder!r}"
            raise FileNotFoundError(
                f"data set {name!r} needs {path}, which does not exist. The environment variable "
                f"DETECTRON2_DATASETS {told}; before the start, set it to the folder that holds "
                "the built-in data sets, such as coco/annotations and coco/train2017"
            )
    summary = summarise_coco_file(json_file)
    known, found = metadata.get("thing_classes"), list(summary.classes.values())
    if known is not None and list(known) != found:
        raise ValueError(
            f"{json_file} has the classes {found}, but data set {name!r} was registered with "
            f"{list(known)}; give json_file and image_root and a name of your own"
        )
    return summary


def _register(name: str, json_file: str, image_root: str, summary: CocoSummary) -> None:
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        files = metadata.get("json_file"), metadata.get("image_root")
        # Metadata can be set once only: of a file that was rewritten they may be outdated.
        known, found = metadata.get("thing_classes"), list(summary.classes.values())
        known_ids = metadata.get("thing_dataset_id_to_contiguous_id")
        found_ids = {key: index for index, key in enumerate(summary.classes)}
        same = known in (None, found) and known_ids in (None, found_ids)
        if same and files == (json_file, image_root):
            return
        DatasetCatalog.remove(name)
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, json_file, image_root)


def _check_usable(source: str, summary: CocoSummary, *, filter_empty: bool, is_train: bool) -> None:
    if not summary.num_images:
        raise ValueError(f"{source}: the data set is empty, its list 'images' has no entry")
    if filter_empty and not summary.num_objects:
        raise ValueError(
            f"{source}: none of its {summary.num_images} images has an object (an annotation that "
            "is no crowd); training needs annotated images"
        )
    if not is_train and (problem := summary.why_not_evaluable(source)):
        raise ValueError(problem)


def _has_objects(record: dict) -> bool:
    return any(not item.get("iscrowd", 0) for item in record.get("annotations", []))


def _drop_bad_boxes(records: list[dict], problems: list[str]) -> list[dict]:
    examples = defaultdict(list)
    for record in records:
        kept = []
        for item in record.get("annotations", []):
            box = BoxMode.convert(
                [float(value) for value in item["bbox"]], item["bbox_mode"], BoxMode.XYXY_ABS
            )
            problem = box_problem(box, record["width"], record["height"])
            if problem is None:
                kept.append(item)
            else:
                examples[problem].append((item["bbox"], record["file_name"]))
        if "annotations" in record:
            record["annotations"] = kept
    for key, what in (
        ("empty", "boxes have a zero, negative or non-finite width or height"),
        ("outside", "boxes lie wholly outside of their image"),
    ):
        if examples[key]:
            box, file_name = examples[key][0]
            problems.append(
                f"{len(examples[key])} {what} and are left out (e.g. {list(box)} in {file_name})"
            )
    return records


def _drop_missing_images(
    records: list[dict], name: str, problems: list[str], *, is_train: bool
) -> list[dict]:
    # One listing a folder: asking for every file takes minutes on a network file system.
    by_folder = defaultdict(list)
    for record in records:
        by_folder[os.path.dirname(record["file_name"])].append(record)
    missing = set()
    for folder, group in by_folder.items():
        try:
            present = set(os.listdir(folder or "."))
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        for record in group:
            if os.path.basename(record["file_name"]) not in present:
                missing.add(record["file_name"])
    if not missing:
        return records
    first = [r["file_name"] for r in records if r["file_name"] in missing][:3]
    if len(missing) == len({record["file_name"] for record in records}):
        raise FileNotFoundError(
            f"data set {name!r}: none of its {len(missing)} images exists, e.g. {first[0]}; "
            f"image_root={MetadataCatalog.get(name).get('image_root')!r} must be the folder that "
            "the file names in the annotation file start from"
        )
    if not is_train:
        raise FileNotFoundError(
            f"data set {name!r}: {len(missing)} of {len(records)} images do not exist, e.g. "
            f"{', '.join(first)}; an evaluation needs all of them: add them, or take them out of "
            "the annotation file"
        )
    problems.append(f"{len(missing)} image files do not exist and are left out (e.g. {first[0]})")
    return [record for record in records if record["file_name"] not in missing]
