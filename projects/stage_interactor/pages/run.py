"""What a run left in its folder, read as data: anyone may have made it, nothing in it is called."""

import io
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torchvision.ops import box_convert

from ..config import Saved, read_saved
from ..d2.data import MetadataCatalog
from ..d2.detections import usable
from ..data.coco import load_coco_dataset, read_coco_file
from ..data.formats.coco import load_json
from ..data.shapes import generate_shapes
from ..untrusted.files import read_bytes, read_json

_LARGEST_METRICS, _LONGEST_LINE = 2**29, 2**20  # bytes
_MOST_METRICS = 2**24  # values that are kept, of about 100 bytes
_LARGEST = 1e30  # no figure of a run is larger; charts cannot show the ends of float64
_LARGEST_COORDINATE = 1e7  # pixels
_MOST_CLASSES, _MOST_CELLS = 10_000, 3e7  # of an evaluation; (class, image) pairs

Curve = tuple[list[int], list[float]]  # iterations and values


def is_number(value: Any, largest: float = math.inf) -> bool:
    """Whether it is a plain, finite number; also an integer has a limit, that of a float."""
    return type(value) in (int, float) and abs(value) <= min(largest, sys.float_info.max)


def metric_of(config: Saved) -> str:
    """Whose AP a run's evaluator gives, to be put before the name; nothing for COCO's."""
    target = str(config.get("dataloader.evaluator._target_"))
    known = {"PascalVOC": "Pascal VOC's ", "LVIS": "LVIS's "}
    return next((told for name, told in known.items() if name in target), "")


def read_metrics(path: str, names: Sequence[str]) -> tuple[dict[str, Curve], int]:
    """The scalars that are called so; and how many lines are no values of an iteration.

    After a resumed run the newer of two values counts.

    Raises:
        OSError, ValueError: it cannot be read, or holds more than the metrics of a run can be.
    """
    values: dict[str, dict[int, float]] = defaultdict(dict)
    wrong = count = 0
    for line in io.BytesIO(read_bytes(path, _LARGEST_METRICS)):
        try:
            found = json.loads(line) if len(line) <= _LONGEST_LINE else None
        except (ValueError, RecursionError):  # such as one that was cut off when a run was killed
            found = None
        row: dict[str, Any] = found if isinstance(found, dict) else {}
        iteration = row.get("iteration")
        if type(iteration) is not int or not 0 <= iteration < 2**53:
            wrong += bool(line.strip())
            continue
        for name in names:
            if is_number(row.get(name), _LARGEST):
                values[name][iteration] = float(row[name])
                count += 1
        if count > _MOST_METRICS:
            raise ValueError(f"{path} holds more than {_MOST_METRICS} values")
    curves = {name: (sorted(of), [of[i] for i in sorted(of)]) for name, of in values.items()}
    return curves, wrong


def read_run(folder: str, names: Sequence[str]) -> tuple[Saved, dict[str, Curve], int]:
    """The config of a run, and its metrics as :func:`read_metrics` gives them.

    Of an evaluation alone, ``--eval-only``, they are those of its results.json, at iteration 0.

    Raises:
        FileNotFoundError: it is no folder of a run.
        OSError, ValueError: a file of it is of no use.
    """
    path = {
        name: os.path.join(folder, name)
        for name in ("config_resolved.yaml", "metrics.json", "results.json")
    }
    evaluated = os.path.isfile(path["results.json"]) and not os.path.lexists(path["metrics.json"])
    for name in ("config_resolved.yaml", "results.json" if evaluated else "metrics.json"):
        if not os.path.isfile(path[name]):
            raise FileNotFoundError(f"{folder} has no {name}: is it the folder of a run?")
    config = read_saved(path["config_resolved.yaml"])
    if not evaluated:
        return config, *read_metrics(path["metrics.json"], names)
    results = read_json(path["results.json"])
    tasks = results.items() if isinstance(results, dict) else ()
    figures = {
        f"{task}/{name}": value
        for task, values in tasks
        if isinstance(values, dict)
        for name, value in values.items()
    }
    found = {name: figures[name] for name in names if is_number(figures.get(name), _LARGEST)}
    return config, {name: ([0], [float(value)]) for name, value in found.items()}, 0


class GroundTruth(NamedTuple):
    """What detections were evaluated on."""

    content: dict  # of a COCO file
    image_root: str


# Whose data sets are found again: where the call that a config has is one of these, and its
# arguments are of these types.
_Text = (str, type(None))
_ARGUMENTS: dict[str, dict[str, tuple[type, ...]]] = {
    "load_coco_dataset": {
        "name": (str,),
        "json_file": _Text,
        "image_root": _Text,
        "filter_empty": (bool, type(None)),
        "background": (str, int, float, type(None)),
        "is_train": (bool,),
        "allow_outside": (bool,),
    },
    "load_shapes": {
        "root": (str,),
        "split": (str,),
        "name": _Text,
        **{
            name: (int,) if parameter.annotation is int else (int, float, type(None))
            for name, parameter in signature(generate_shapes).parameters.items()
            if name not in ("root", "write")
        },
    },
    "get_detection_dataset_dicts": {"names": (str,), "filter_empty": (bool,)},
}


def read_ground_truth(
    config: Saved, allow_outside: bool = False, part: str = "test"
) -> GroundTruth:
    """The data of an evaluation, by this package's own readers; nothing is written.

    Args:
        config: of the run.
        part: ``"train"`` for those that it was trained on.
        allow_outside: names in the data's files may lead out of the folder of pictures, if the
            config says so too.

    Raises:
        OSError, ValueError, KeyError: they are not there, or are not what these readers read.
    """
    key = f"dataloader.{part}.dataset"
    arguments = config.section(key)
    target = arguments.pop("_target_", None)
    *place, reader = target.split(".") if isinstance(target, str) else ("",)
    if reader not in _ARGUMENTS or not {"stage_interactor", "detectron2"}.intersection(place):
        raise ValueError(
            f"{key} is of {target!r:.200}, which is not called: only the data of "
            f"{', '.join(_ARGUMENTS)} are read"
        )
    for name, value in arguments.items():
        types = _ARGUMENTS[reader].get(name)
        if types is None or type(value) not in types:
            raise ValueError(f"{key}.{name} is no argument of {reader}, or of a wrong type")
    if reader == "load_shapes":
        truth = _of_shapes(arguments, key)
    elif reader == "load_coco_dataset" and arguments.get("json_file"):
        arguments["allow_outside"] = allow_outside and arguments.get("allow_outside", False)
        truth = _of_file(arguments, key)
    else:
        truth = _of_name(arguments.get("name") or arguments.get("names"), key)
    cells = len(truth.content["categories"]) * len(truth.content["images"])
    if len(truth.content["categories"]) > _MOST_CLASSES or cells > _MOST_CELLS:
        raise ValueError(f"{key} has too many classes and images for figures of each class")
    # What COCO's evaluation, and matching, look for.
    return truth._replace(content={"info": {}, "annotations": [], **truth.content})


def _of_shapes(arguments: dict[str, Any], key: str) -> GroundTruth:
    split = arguments.pop("split", None)
    arguments.pop("name", None)
    if split not in ("train", "val") or "root" not in arguments:
        raise ValueError(f"{key}.split must be 'train' or 'val', and root a folder")
    root = generate_shapes(**arguments, write=False)
    return _read(str(root / f"{split}.json"), str(root / split), is_train=split == "train")


def _of_file(arguments: Mapping[str, Any], key: str) -> GroundTruth:
    json_file, image_root = (
        os.path.expanduser(arguments.get(name) or "") for name in ("json_file", "image_root")
    )
    if not image_root:
        raise ValueError(f"{key}.json_file needs image_root, the folder of its pictures")
    options = {key: arguments[key] for key in ("is_train", "allow_outside") if key in arguments}
    return _read(json_file, image_root, **options)


def _of_name(name: str | None, key: str) -> GroundTruth:
    """Of a data set that this process knows by its name, such as coco_2017_val."""
    if not name:
        raise ValueError(f"{key} has no name")
    load_coco_dataset(name, is_train=False)
    metadata = MetadataCatalog.get(name)
    if not metadata.get("json_file") or not metadata.get("image_root"):
        raise ValueError(f"data set {name!r} has no annotation file in COCO's format")
    return GroundTruth(load_json(metadata.json_file), metadata.image_root)


def _read(json_file: str, image_root: str, **options: Any) -> GroundTruth:
    """As it is scored: the file's own entries, or what was read of those that cannot be."""
    split = read_coco_file(json_file, image_root, **options)
    return GroundTruth(load_json(json_file) if split.as_written else split.content, image_root)


def read_predictions(path: str, truth: Mapping) -> tuple[list[dict], int]:
    """Detections, and how many entries are none in the pictures and classes of the ground truth.

    Boxes and scores may be NaN, as None, see :func:`stage_interactor.d2.detections.usable`.

    Raises:
        OSError, ValueError: see :func:`stage_interactor.untrusted.files.read_json`; or it holds
            no list.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} holds no list of detections")
    images = {image["id"] for image in truth["images"]}
    classes = {category["id"] for category in truth["categories"]}

    def is_value(value: Any, largest: float) -> bool:
        return value is None or is_number(value, largest)

    found = [
        {
            "image_id": item["image_id"],
            "category_id": item["category_id"],
            "bbox": [math.nan if value is None else float(value) for value in item["bbox"]],
            "score": math.nan if item["score"] is None else float(item["score"]),
        }
        for item in content
        if isinstance(item, dict)
        and {"image_id", "category_id", "bbox", "score"} <= item.keys()
        and type(item["image_id"]) in (int, str)
        and type(item["category_id"]) in (int, str)
        and item["image_id"] in images
        and item["category_id"] in classes
        and isinstance(item["bbox"], list)
        and len(item["bbox"]) == 4
        and all(is_value(side, _LARGEST_COORDINATE) for side in item["bbox"])
        and is_value(item["score"], 1)
        and (item["score"] or 0) >= 0
    ]
    return found, len(content) - len(found)


def usable_ones(predictions: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """The predictions that can be judged, and the others."""
    boxes = torch.tensor([item["bbox"] for item in predictions], dtype=torch.float64)
    scores = torch.tensor([item["score"] for item in predictions], dtype=torch.float64)
    kept = usable(box_convert(boxes.reshape(-1, 4), "xywh", "xyxy"), scores).tolist()
    found: tuple[list[dict], list[dict]] = [], []
    for item, is_usable in zip(predictions, kept):
        found[not is_usable].append(item)
    return found
