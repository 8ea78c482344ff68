"""Data sets in COCO format by name: read, registered, and loaded as detectron2's records."""

import functools
import logging
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..d2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from ..d2.structures import BoxMode
from ..untrusted.files import OutsideName, join_within
from .folders import read_folder, write_json
from .formats import coco
from .formats.files import common_end, parts_of
from .formats.source import WEIGHT, Labelled, Part, Source, no_collection, require_distinct_names
from .images import ImageReadError
from .reading import Split, box_problem, to_split
from .records import require_records
from .sizes import Size, read_sizes

logger = logging.getLogger(__name__)


def load_coco_dataset(
    name: str,
    json_file: str | None = None,
    image_root: str | None = None,
    *,
    filter_empty: bool | None = None,
    background: str | float | None = None,
    is_train: bool = True,
    allow_outside: bool = False,
) -> list[dict]:
    """Loads a data set.

    What cannot be used is left out, with one warning that counts it: boxes of zero, negative or
    non-finite size, or outside of their image, and in training images that are missing, cannot be
    read, or are of another size than the file says. What is scored is what is loaded: where the
    file's own entries cannot be, what was read of them is registered in their place.

    Args:
        name: of a registered data set such as `coco_2017_train`, whose files lie in the folder
            that the environment variable DETECTRON2_DATASETS names; with `json_file`, the name
            to register that file under (again, if the name belongs to other files).
        json_file: annotations in COCO's instance format.
        image_root: the folder that the file names in `json_file` start from.
        filter_empty: leave out images without objects; by default in training only.
        background: instead of `filter_empty`: `"keep"` or `"drop"` images without objects, or keep
            at most so many that they are this share, from 0 to 1, of all images.
        is_train: in evaluation an image that cannot be used is an error, since AP would otherwise
            be of fewer images than were asked for.
        allow_outside: file names in `json_file` may lead out of `image_root`.

    Returns:
        detectron2's dataset dicts: `file_name`, `height`, `width`, `image_id`, and `annotations`
        with `bbox` (x, y, width, height in pixels), `bbox_mode`, `category_id` (class index from
        0), `iscrowd`.

    Raises:
        FileNotFoundError: annotation file or images are not there.
        ImageReadError: in evaluation an image cannot be read.
        KeyError: `name` is not registered and no `json_file` is given.
        OutsideName: a file name leads out of `image_root`.
        RecordError: a data set's own function gives what are no records.
        ValueError: the file is no valid COCO file, or nothing is in it; see `formats.coco`.
    """
    if background is None:
        leave_out = is_train if filter_empty is None else filter_empty
        background = "drop" if leave_out else "keep"
    share = share_of_background(background)
    if json_file is None:
        _require_registered(name)
        metadata = MetadataCatalog.get(name)
        source = metadata.get("json_file") or f"data set {name!r}"
        if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
            records = records_of_function(name, source, is_train)
            return _without_background(_without_bad_boxes(records, source), share, source)
        json_file = metadata.get("source_file") or metadata.json_file
        image_root = metadata.image_root
        _require_files(name, json_file, image_root)
        known = metadata.get("thing_classes")
    else:
        known = None
        if not image_root:
            raise ValueError(
                f"data set {name!r}: json_file={json_file!r} needs image_root, the folder that "
                "its file names start from"
            )
    json_file, image_root = os.path.expanduser(json_file), os.path.expanduser(image_root)
    builtin = name.startswith("coco_2017") and known is not None  # of which each picture is known
    split = read_coco_file(
        json_file,
        image_root,
        is_train=is_train,
        check_sizes=not builtin,
        allow_outside=allow_outside,
    )
    if known is not None and list(known) != split.class_names:
        raise ValueError(
            f"{json_file} has the classes {split.class_names}, but data set {name!r} was "
            f"registered with {list(known)}; give json_file and image_root and a name of your own"
        )
    _check_usable(json_file, split, share, is_train=is_train)
    if told := split.summary():
        logger.warning("%s: %s", json_file, "; ".join(told).replace(f"{json_file}, ", ""))
    _register(name, split, json_file, image_root, allow_outside)
    return _without_background(records_of(split), share, json_file)


def read_coco_file(
    json_file: str,
    image_root: str,
    *,
    is_train: bool = True,
    check_sizes: bool = True,
    allow_outside: bool = False,
) -> Split:
    """Reads a file.

    Args:
        json_file, image_root, is_train, allow_outside: as of `load_coco_dataset`.
        check_sizes: compare sizes with those of the pictures.

    Raises:
        As `load_coco_dataset`.
    """
    with no_collection():
        part, are_sizes_of_pictures = _parse(json_file)
        part.image_root = image_root
        part.labelled = [
            _located(item, image_root, json_file, allow_outside) for item in part.labelled
        ]
        return _read_part(
            part, json_file, image_root, is_train, check_sizes and not are_sizes_of_pictures
        )


def _parse(json_file: str) -> tuple[Part, bool]:
    """What a file says, without its segmentations; and whether its sizes are of the pictures."""
    content = _load(json_file)
    try:
        part = coco.parse(content, json_file)
    except RecursionError as error:
        raise ValueError(f"{json_file}: something in it is nested too deeply") from error
    coco.drop_no_classes(Source("COCO", {"": part}))
    info = content.get("info")
    return part, isinstance(info, dict) and info.get("sizes_of_pictures") is True


def _read_part(
    part: Part, json_file: str, image_root: str, is_train: bool, check_sizes: bool
) -> Split:
    missing = _missing([item.path for item in part.labelled])
    if missing:
        _tell_missing(missing, len(part.labelled), json_file, image_root, part, is_train=is_train)
    paths = [item.path for item in part.labelled]
    if check_sizes:
        sizes = read_sizes(paths, what=os.path.basename(json_file))
    else:
        sizes = {item.path: Size(*item.size) for item in part.labelled if item.size}
    notes = part.notes
    split = to_split(part, part.categories or {}, sizes, notes)
    for note in notes:
        logger.info("%s", note if note.startswith(json_file) else f"{json_file}: {note}")
    if not is_train:
        if texts := split.left_out.get("picture"):
            path, _, reason = texts[0].partition(" cannot be read as an image: ")
            told = f", one of {len(texts)} that cannot be read of {len(paths)}"
            raise ImageReadError(path, reason + told * (len(texts) > 1))
        if texts := split.left_out.get("size"):
            raise ValueError(texts[0] + f" (one of {len(texts)})" * (len(texts) > 1))
    with open(json_file, "rb") as file:
        if file.read(1) not in (b"{", b" ", b"\n", b"\r", b"\t"):  # Windows' mark
            split.as_written = False
    return split


def records_of(split: Split) -> list[dict]:
    """detectron2's dataset dicts, by image id."""
    index = {category["id"]: n for n, category in enumerate(split.categories)}
    by_image: dict[int, list[dict]] = defaultdict(list)
    for item in split.content["annotations"]:
        by_image[item["image_id"]].append(
            {
                "iscrowd": item["iscrowd"],
                "bbox": item["bbox"],
                "category_id": index[item["category_id"]],
                "bbox_mode": BoxMode.XYWH_ABS,
            }
        )
    return [
        {
            "file_name": os.path.join(split.image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": by_image[image["id"]],
            **({WEIGHT: image[WEIGHT]} if WEIGHT in image else {}),
        }
        for image in sorted(split.content["images"], key=lambda image: image["id"])
    ]


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
        return [item["name"] for item in categories_in_file(json_file or "")]
    _require_registered(name)
    metadata = MetadataCatalog.get(name)
    if (known := metadata.get("thing_classes")) is not None:
        require_distinct_names(known, f"data set {name!r}")
        return list(known)
    if not metadata.get("json_file"):
        raise ValueError(
            f"data set {name!r} is registered without class names; set "
            f"MetadataCatalog.get({name!r}).thing_classes"
        )
    _require_files(name, metadata.json_file, metadata.image_root)
    return [item["name"] for item in categories_in_file(metadata.json_file)]


def count_classes(json_file: str | None = None, name: str | None = None) -> int:
    """Number of classes of an annotation file or of a registered data set; see `class_names`."""
    return len(class_names(json_file=json_file, name=name))


def categories_in_file(json_file: str) -> list[dict]:
    """COCO's categories, `{"id", "name"}`, by class index; those of an unchanged file are
    remembered.

    Raises:
        FileNotFoundError, ValueError: see `load_coco_dataset`.
    """
    path = os.path.expanduser(json_file)
    _require_json(path)
    stat = os.stat(path)
    found = _categories_in_file(path, stat.st_mtime_ns, stat.st_size)
    return [{"id": key, "name": name} for key, name in found]


@functools.lru_cache(maxsize=16)
def _categories_in_file(path: str, modified: int, size: int) -> tuple[tuple[int, str], ...]:
    with no_collection():
        part, _ = _parse(path)
    return tuple((part.categories or {}).items())


def categories_of(name: str) -> list[dict]:
    """COCO's categories of a registered data set, `{"id", "name"}`, by class index.

    Raises:
        KeyError, ValueError: see `class_names`.
    """
    names = class_names(name=name)
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    ids = {index: index for index in range(len(names))} if ids is None else ids
    return [{"id": key, "name": names[ids[key]]} for key in sorted(ids, key=ids.__getitem__)]


def objects_of_image(
    annotations: str, image: str, class_names: Sequence[str], **options: Any
) -> tuple[list[list[float]], list[int]]:
    """Boxes xyxy in pixels, and indices into ``class_names``, of an image in a data set.

    Args:
        annotations: a COCO file, or a folder in any format.
        image: path of the image.
        class_names: of the classes that are known.
        options: of :func:`~stage_interactor.data.folders.read_folder`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, lists the image not or more than once, or an object has
            another class.
    """
    path = os.path.expanduser(annotations)
    named = any(value is not None for value in options.values())
    if path.endswith(".json") and not named and coco.is_coco(content := _load(path)):
        part = coco.parse(content, path)
        coco.drop_no_classes(Source("COCO", {"": part}))
        split = _split_of_image(part, path, image)
        ids = {item["id"] for item in split.content["images"]}
    else:
        folder = read_folder(path, **options)
        for split in folder.splits.values():
            ids = {
                item["id"]
                for item in split.content["images"]
                if os.path.realpath(os.path.join(split.image_root, item["file_name"]))
                == os.path.realpath(image)
            }
            if ids:
                break
        else:
            raise ValueError(f"{annotations} lists no image {image}")
    index = {name: position for position, name in enumerate(class_names)}
    known = {category["id"]: category["name"] for category in split.categories}
    items = [a for a in split.content["annotations"] if a["image_id"] in ids and not a["iscrowd"]]
    unknown = sorted({known[a["category_id"]] for a in items} - set(index))
    if unknown:
        raise ValueError(
            f"{annotations} has the classes {unknown}, the detector knows {list(index)}"
        )
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


def match_classes(
    names: Sequence[str], others: Sequence[str], whose: str, whose_others: str
) -> list[int]:
    """Of each class in ``names`` its position in ``others``, which has the same in any order.

    Raises:
        ValueError: that lists both; ``whose`` and ``whose_others`` say where they are from.
    """
    if sorted(map(str, names)) != sorted(map(str, others)):
        raise ValueError(
            f"{whose} has the classes {list(names)}, but {whose_others} has others: "
            f"{list(others)}; classes are matched by name: give both the same names"
        )
    positions = {name: position for position, name in enumerate(others)}
    return [positions[name] for name in names]


def with_classes(records: list[dict], classes: Sequence[int]) -> list[dict]:
    """Records whose class indices count in another order: ``classes[new] = old``."""
    new = {old: index for index, old in enumerate(classes)}
    return [
        {
            **record,
            "annotations": [
                {**item, "category_id": new[item["category_id"]]}
                for item in record.get("annotations", [])
            ],
        }
        for record in records
    ]


def _load(path: str) -> Any:
    _require_json(path)
    return coco.load_json(path)


def _require_json(path: str) -> None:
    if not path:
        raise ValueError(
            "no annotation file was given: the path of the COCO JSON is empty; set it, and the "
            "folder of its images"
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"the annotation file {path} does not exist (working folder: {os.getcwd()}); check the "
            "path of the COCO JSON"
        )


def _require_registered(name: str) -> None:
    if name not in DatasetCatalog:
        near = get_close_matches(name, list(DatasetCatalog), n=3) or sorted(DatasetCatalog)[:10]
        raise KeyError(
            f"no data set is registered as {name!r} (known are e.g. {', '.join(near)}); for data "
            "of your own give json_file and image_root"
        )


def _require_files(name: str, *paths: str) -> None:
    """Of a registered name, where a variable of the environment says where they are."""
    for path in paths:
        if not os.path.exists(path):
            folder = os.environ.get("DETECTRON2_DATASETS")
            told = "is not set, which means ./datasets" if folder is None else f"is {folder!r}"
            raise FileNotFoundError(
                f"data set {name!r} needs {path}, which does not exist. The environment variable "
                f"DETECTRON2_DATASETS {told}; before the start, set it to the folder that holds "
                "the built-in data sets, such as coco/annotations and coco/train2017"
            )


def _located(item: Labelled, image_root: str, json_file: str, allow_outside: bool) -> Labelled:
    name = item.name or ""
    if "\\" in name and not os.path.exists(os.path.join(image_root, name)):  # of Windows
        name = name.replace("\\", "/")
    path = join_within(image_root, name)
    if path is None:
        if not allow_outside:
            raise OutsideName(json_file, "image", name, image_root)
        path = os.path.join(image_root, name)
    elif ".." in name:
        name = os.path.relpath(path, image_root)
    return item._replace(path=path, name=name)


def _missing(paths: Sequence[str]) -> set[str]:
    # One listing a folder: asking for every file takes minutes on a network file system.
    by_folder = defaultdict(list)
    for path in paths:
        by_folder[os.path.dirname(path)].append(path)
    missing: set[str] = set()
    for folder, group in by_folder.items():
        try:
            present = set(os.listdir(folder or "."))
        except (OSError, ValueError):
            present = set()
        missing.update(path for path in group if os.path.basename(path) not in present)
    return missing


def _tell_missing(
    missing: set[str], count: int, json_file: str, image_root: str, part: Part, *, is_train: bool
) -> None:
    """Leaves them out of a part that is trained on.

    Raises:
        FileNotFoundError: all are missing, or the part is evaluated on.
    """
    left = [item for item in part.labelled if item.path not in missing]
    first = [item.path for item in part.labelled if item.path in missing][:3]
    if not left:
        raise FileNotFoundError(
            f"{json_file}: none of its {count} images exists, e.g. {first[0]}; "
            f"image_root={image_root!r} must be the folder that the file names in it start from"
        )
    if not is_train:
        raise FileNotFoundError(
            f"{json_file}: {count - len(left)} of {count} images do not exist, e.g. "
            f"{', '.join(first)}; an evaluation needs all of them: add them, or take them out of "
            "the annotation file"
        )
    part.problems.append(
        f"{count - len(left)} image files do not exist and are left out (e.g. {first[0]})"
    )
    part.labelled = left


def _register(
    name: str, split: Split, json_file: str, image_root: str, allow_outside: bool
) -> None:
    """Registers what was read; evaluators take annotations from the metadata's ``json_file``."""
    scored = json_file if split.as_written else _scored_file(name, split)
    wanted = {
        "json_file": scored,
        "source_file": json_file,
        "image_root": image_root,
        "evaluator_type": "coco",
        "thing_classes": split.class_names,
        "thing_dataset_id_to_contiguous_id": {
            category["id"]: index for index, category in enumerate(split.categories)
        },
    }
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        defaults = {"source_file": metadata.get("json_file")}
        if all(metadata.get(key, defaults.get(key)) == value for key, value in wanted.items()):
            return
        DatasetCatalog.remove(name)
    if name in MetadataCatalog:  # which can be set once only
        MetadataCatalog.remove(name)
    DatasetCatalog.register(
        name,
        lambda: records_of(
            read_coco_file(json_file, image_root, check_sizes=False, allow_outside=allow_outside)
        ),
    )
    MetadataCatalog.get(name).set(**wanted)


@functools.lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="stage_interactor_")


@functools.cache
def _scored_path(name: str) -> str:
    """Of the file for a data set's name: one, however often it is loaded."""
    folder = tempfile.mkdtemp(dir=_scratch().name)
    return os.path.join(folder, f"{Path(name).name or 'data'}.json")


def _scored_file(name: str, split: Split) -> str:
    """What was read as a file, for evaluators that read one; it is gone with this process."""
    path = _scored_path(name)
    write_json(split, path)
    return path


def share_of_background(background: str | float) -> float:
    """The largest share of images without objects: 0 for none, 1 for all that there are.

    Raises:
        ValueError: `background` is neither `"keep"` nor `"drop"` nor a number from 0 to 1.
    """
    if background in ("keep", "drop"):
        return float(background == "keep")
    try:  # a number in a config whose default is a word is one in words
        share = math.nan if isinstance(background, bool) else float(background)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(
            f"background must be 'keep', 'drop' or a share from 0 to 1, got {background!r}"
        )
    return share


def count_background(share: float, with_objects: int, without: int) -> int:
    """How many images without objects are loaded, so that they are at most `share` of all."""
    if share >= 1:
        return without
    return min(without, math.floor(share / (1 - share) * with_objects + 1e-9))


def _without_background(records: list[dict], share: float, source: str) -> list[dict]:
    if share >= 1:
        return records
    with_objects = [record for record in records if count_objects(record)]
    if not with_objects:
        raise ValueError(
            f"{source}: no image is left that has a usable object; look at the boxes, or load "
            "it with filter_empty=False"
        )
    empty = [record for record in records if not count_objects(record)]
    most = count_background(share, len(with_objects), len(empty))
    if len(empty) <= most:
        return records
    kept = [empty[n * len(empty) // most] for n in range(most)]  # evenly spread
    left = len(empty) - len(kept)
    logger.info("%s: left out %d images without objects", source, left)
    chosen = {id(record) for record in kept}
    return [record for record in records if count_objects(record) or id(record) in chosen]


def count_objects(record: Mapping) -> int:
    """Objects of one of detectron2's dataset dicts, crowds apart."""
    return sum(not item.get("iscrowd", 0) for item in record.get("annotations", ()))


def _check_usable(source: str, split: Split, share: float, *, is_train: bool) -> None:
    images = split.content["images"]
    if not images:
        told = "; ".join(split.summary()) or "its list 'images' has no entry"
        raise ValueError(f"{source}: the data set is empty: {told}")
    if is_train and not any(split.count_objects().values()):
        lost = sum(len(split.left_out.get(kind, ())) for kind in ("empty", "outside", "far"))
        raise ValueError(
            f"{source}: no image is left that has a usable object; look at its boxes: "
            + "; ".join(split.summary())
            if lost
            else f"{source}: none of its {len(images)} images has an object (an annotation that "
            "is no crowd); training needs annotated images"
        )


def records_of_function(name: str, source: str, is_train: bool) -> list[dict]:
    """What a user's own loader gives.

    Raises:
        RecordError: at what is no record.
    """
    try:
        records = get_detection_dataset_dicts(name, filter_empty=False)
    except Exception:  # of what counts the objects, at what it does not expect
        records = DatasetCatalog.get(name)
    class_names = MetadataCatalog.get(name).get("thing_classes") or ()
    require_distinct_names(class_names, source)
    require_records(records, source, len(class_names) or None, is_train=is_train)
    return records


def _without_bad_boxes(records: list[dict], source: str) -> list[dict]:
    """Of records of a user's own loader, which may be of any form that detectron2 has."""
    bad = []
    for record in records:
        kept = []
        for item in record.get("annotations", []):
            box = BoxMode.convert([float(v) for v in item["bbox"]], item["bbox_mode"],
                                  BoxMode.XYXY_ABS)  # fmt: skip
            if box_problem(box, record["width"], record["height"]) is None:
                kept.append(item)
            else:
                bad.append(f"{list(item['bbox'])} in {record['file_name']}")
        if "annotations" in record:
            record["annotations"] = kept
    if bad:
        logger.warning(
            "%s: %d boxes have no size or lie outside of their image and are left out (e.g. %s)",
            source, len(bad), bad[0],
        )  # fmt: skip
    return records


def _split_of_image(part: Part, json_file: str, image: str) -> Split:
    """The one image of a part that the path of a picture means."""
    parts = parts_of(os.path.abspath(image))
    common = [common_end(parts_of(item.name or ""), parts) for item in part.labelled]
    best = max(common, default=0)
    if not best:
        raise ValueError(f"{json_file} lists no image {Path(image).name}")
    items = [item for item, n in zip(part.labelled, common) if n == best]
    if len(items) > 1:
        raise ValueError(
            f"{json_file} lists {len(items)} images {Path(image).name}: which is meant?"
        )
    part.labelled = [Labelled(image, *items[0][1:])]
    return to_split(part, part.categories or {}, read_sizes([image]), [])
