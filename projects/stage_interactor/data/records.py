"""detectron2's records of a data set, as a function of one's own may give them: what they lack.

Those that this package reads from files are whole. All others come past here: together where they
are loaded by a name, and each one where it is mapped.
"""

import math
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any

from ..d2.structures import BoxMode
from ..errors import UserError

# How many numbers describe a box; detectron2 has rotated ones too.
_NUMBERS = {
    getattr(BoxMode, name): numbers
    for name, numbers in (("XYXY_ABS", 4), ("XYWH_ABS", 4), ("XYWHA_ABS", 5))
    if hasattr(BoxMode, name)
}


class RecordError(UserError, ValueError):
    """A record of a data set that is not what detectron2 calls one."""


def require_records(
    records: Any, source: str, num_classes: int | None = None, *, is_train: bool = True
) -> None:
    """Looks at all records of a data set.

    Args:
        source: that they are of, in words.
        num_classes: of the data set, if known.
        is_train: in evaluation each image needs an id of its own.

    Raises:
        RecordError: something is missing, or is not what it must be.
    """
    if not isinstance(records, Sequence) or isinstance(records, (str, bytes)):
        raise RecordError(f"{source}: its function must return a list, got {_shown(records)}")
    if not records:
        raise RecordError(f"{source}: the list that its function returns is empty")
    for number, record in enumerate(records):
        require_record(record, f"{source}, record {number}", num_classes)
        size_of(record)
    if not is_train:
        require_ids(records)


def require_ids(records: Sequence[Mapping]) -> None:
    """Looks at the ids of images, by which detections are scored.

    Raises:
        RecordError: an image has none of its own.
    """
    seen: dict[Any, Any] = {}
    for number, record in enumerate(records):
        image_id, name = record.get("image_id"), record.get("file_name", f"record {number}")
        if not isinstance(image_id, (int, str)):
            raise _error(name, "image_id", "a number or text that no other image has", record)
        if image_id in seen:
            raise RecordError(
                f"{name} and {seen[image_id]} both have the image_id {image_id!r}: give each "
                "image one of its own"
            )
        seen[image_id] = name


def require_record(record: Any, where: str = "a record", num_classes: int | None = None) -> None:
    """Looks at one record. Numbers of a box may be infinite or NaN, as they may be in files.

    Args:
        where: it is, for one that does not name its image.

    Raises:
        RecordError: as of :func:`require_records`.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"{where}: a record must be a dict, got {_shown(record)}")
    name = record.get("file_name")
    if not name or not isinstance(name, (str, os.PathLike)):
        raise _error(where, "file_name", "the path of an image", record)
    if "height" in record or "width" in record:
        size_of(record)
    annotations = record.get("annotations", ())
    if not isinstance(annotations, (list, tuple)):
        raise _error(name, "annotations", "a list", record)
    for number, item in enumerate(annotations):
        where = f"{name}, annotation {number}"
        if not isinstance(item, Mapping):
            raise RecordError(f"{where}: an annotation must be a dict, got {_shown(item)}")
        mode = _number(item.get("bbox_mode"))
        if mode not in _NUMBERS:
            modes = " or ".join(f"BoxMode.{mode.name}" for mode in _NUMBERS)
            raise _error(where, "bbox_mode", modes, item)
        numbers = _numbers(item.get("bbox"))
        if len(numbers) != _NUMBERS[mode] or None in numbers:
            raise _error(where, "bbox", f"{_NUMBERS[mode]} numbers", item)
        label = _whole(item.get("category_id"))
        if label is None or not 0 <= label < (num_classes or math.inf):
            most = f" to {num_classes - 1}" if num_classes else " or more"
            raise _error(where, "category_id", f"the index of a class, 0{most}", item)
        if isinstance(item.get("iscrowd"), str):
            raise _error(where, "iscrowd", "0 or 1", item)


def size_of(record: Mapping) -> tuple[int, int]:
    """Height and width of a record's image, in pixels.

    Raises:
        RecordError: they are missing, or no whole numbers.
    """
    height, width = sizes = [_whole(record.get(key)) for key in ("height", "width")]
    for key, size in zip(("height", "width"), sizes):
        if size is None or size < 1:
            name = record.get("file_name", "a record")
            raise _error(name, key, "that of the image in pixels, a whole number", record)
    return height, width  # type: ignore[return-value]


def _number(value: Any) -> float | None:
    """A number of Python's, numpy's or PyTorch's; None for all else."""
    if type(value) is float:  # as nearly all are
        return value
    if isinstance(value, (str, bytes)) or type(value).__name__ in ("bool", "bool_"):
        return None
    if isinstance(value, int) and abs(value) > 2**62:  # which are not even counted with
        return None
    try:
        return float(value)
    except Exception:  # whatever a stranger's type raises
        return None


def _numbers(box: Any) -> list[float | None]:
    if isinstance(box, (Mapping, Set)):  # in whatever order
        return []
    try:
        return [_number(value) for value in box]
    except TypeError:
        return []


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _error(where: Any, key: str, wanted: str, found: Mapping) -> RecordError:
    got = f"got {_shown(found[key])}" if key in found else "there is none"
    return RecordError(f"{where}: {key} must be {wanted}, {got}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:50]} [...] {text[-40:]}"
