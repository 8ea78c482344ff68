"""Values that a data set's own function may put into detectron2's records, right and wrong ones."""

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from stage_interactor.d2.structures import BoxMode

_MISSING = object()
_NO_NUMBERS = (
    None, True, np.bool_(False), "1", "abc", b"1", "", [], [1], {}, {1}, math.nan, math.inf,
    10**400, 2**63, 1j, object(), torch.zeros(2), torch.tensor(math.nan), np.zeros(3), len,
)  # fmt: skip
# What a right value may be written as; each is of the type that is named.
_SAME = {
    "number": (float, np.int64, np.int32, np.float32, Fraction, Decimal),
    "box": (tuple, np.asarray, lambda box: np.asarray(box, np.float32), torch.tensor,
            lambda box: [np.float32(v) for v in box], lambda box: [torch.tensor(v) for v in box],
            lambda box: [float(v) for v in box]),
    "mode": (int, BoxMode, np.int64),
    "path": (str, Path),
    "list": (list, tuple),
}  # fmt: skip
_KINDS = {
    "file_name": "path", "height": "number", "width": "number", "image_id": "id",
    "annotations": "list", "bbox": "box", "bbox_mode": "mode", "category_id": "number",
    "iscrowd": "flag",
}  # fmt: skip


def record_of(path, number: int) -> dict:
    """Of an image of 40 x 30 pixels."""
    items = [
        {"bbox": [4, 5, 10 + n, 12], "bbox_mode": BoxMode.XYWH_ABS, "category_id": n, "iscrowd": 0}
        for n in range(2)
    ]
    return {
        "file_name": str(path), "height": 30, "width": 40, "image_id": number, "annotations": items,
    }  # fmt: skip


def rewritten(record: dict, rng) -> dict:
    """The same, in other types."""

    def other(key, value):
        return rng.choice(_SAME.get(_KINDS[key], (lambda v: v,)))(value)

    annotations = [
        {key: other(key, value) for key, value in item.items()} for item in record["annotations"]
    ]
    return {k: other(k, v) for k, v in record.items()} | {
        "annotations": other("annotations", annotations)
    }


def spoilt(record: dict, rng) -> tuple[dict, str]:
    """With one value that is none, and in words which."""
    record = record | {"annotations": [dict(item) for item in record["annotations"]]}
    places = {"record": record} | {
        f"annotation {n}": a for n, a in enumerate(record["annotations"])
    }
    where = rng.choice(sorted(places))
    place = places[where]
    key = rng.choice(sorted(place))
    if key == "bbox":
        box = place[key]
        values = [_spoilt_box(box, rng), box[:3], [*box, 1], [box], *_NO_NUMBERS]
    elif key in ("bbox_mode", "category_id"):
        values = [_MISSING, "XYWH_ABS", 2, 3, 17, 0.5, -1, *_NO_NUMBERS]
    elif key == "iscrowd":
        values = ["0", "no"]
    elif key == "annotations":
        values = [None, "none", {"bbox": [1, 2, 3, 4]}, 3, [None], [[]], ["box"], [[1, 2, 3, 4, 0]]]
    elif key == "file_name":
        values = [_MISSING, None, "", 3, ["a.png"], b"a.png"]
    elif key == "image_id":
        values = [_MISSING, None, 1.5, [1], torch.tensor(1)]
    else:
        values = [_MISSING, 0, -1, 29.5, "30", *_NO_NUMBERS]
    value = rng.choice(values)
    place[key] = value
    if value is _MISSING:
        del place[key]
    return record, f"{where}: {key}={'nothing' if value is _MISSING else repr(value)}"


def _spoilt_box(box: list, rng) -> list:
    place = rng.randrange(4)
    return [*box[:place], rng.choice(_NO_NUMBERS), *box[place + 1 :]]
