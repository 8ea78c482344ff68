"""What a blueprint may hold: kinds of values, each with the words for it, and its structure.

A blueprint comes from a file of whoever wrote it. It is checked when the file is read, before
anything looks into it; what is built from it is checked once more, see ``parts``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..untrusted.tensors import shown

KEY = "blueprint"  # of a checkpoint
FIELDS = ("config", "categories", "averaged", "version")
THRESHOLDS = "thresholds"  # one more, where an evaluation has chosen them

# No config has more; so nothing that is done with one can take long.
_MOST_VALUES, _DEEPEST, _LONGEST = 500_000, 32, 100_000


class Misfit(ValueError):
    """A value of a file that is not what belongs there; the message names its key."""

    def __init__(self, where: str, value: Any, expected: str):
        legible = "".join(letter if letter.isprintable() else "?" for letter in where[:200])
        super().__init__(f"{legible} is {shown(value)}; expected {expected}")
        self.where = where


class Kind(NamedTuple):
    """What a value is to be."""

    told: str
    take: Callable[[Any, str], Any]  # value and key to the value; raises a Misfit


def _kind(told: str, fits: Callable[[Any], bool]) -> Kind:
    def take(value: Any, where: str) -> Any:
        if not fits(value):
            raise Misfit(where, value, told)
        return value

    return Kind(told, take)


def whole(least: int, most: int) -> Kind:
    def fits(value: Any) -> bool:
        return type(value) is int and least <= value <= most

    return _kind(f"a whole number from {least} to {most}", fits)


def number(least: float, most: float) -> Kind:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most  # NaN is not

    return _kind(f"a number from {least:g} to {most:g}", fits)


def text(pattern: str, told: str, known: Callable[[str], bool] = bool) -> Kind:
    return _kind(
        told, lambda v: isinstance(v, str) and bool(re.fullmatch(pattern, v, re.A)) and known(v)
    )


def choice(*values: Any) -> Kind:
    return _kind(
        f"one of {list(values)}",
        lambda v: any(type(v) is type(known) and v == known for known in values),
    )


FLAG = _kind("true or false", lambda value: isinstance(value, bool))


def listed(kind: Kind, most: int = 64, least: int = 0) -> Kind:
    told = f"a list of {least} to {most} items, each {kind.told}"

    def take(value: Any, where: str) -> list:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            raise Misfit(where, value, told)
        return [kind.take(item, f"{where}.{index}") for index, item in enumerate(value)]

    return Kind(told, take)


def mapping(keys: Kind, values: Kind, most: int = 64) -> Kind:
    told = f"at most {most} keys with values, each {values.told}"

    def take(value: Any, where: str) -> dict:
        if not isinstance(value, Mapping) or len(value) > most:
            raise Misfit(where, value, told)
        return {
            keys.take(key, f"a key of {where}"): values.take(item, f"{where}.{key}")
            for key, item in value.items()
        }

    return Kind(told, take)


def either(*kinds: Kind) -> Kind:
    """One of several; of what is wrong the deepest is told."""
    told = " or ".join(kind.told for kind in kinds)

    def take(value: Any, where: str) -> Any:
        inner: list[Misfit] = []
        for kind in kinds:
            try:
                return kind.take(value, where)
            except Misfit as misfit:
                inner.append(misfit)
        deepest = max(inner, key=lambda misfit: len(misfit.where))
        raise deepest if deepest.where != where else Misfit(where, value, told)

    return Kind(told, take)


def maybe(kind: Kind) -> Kind:
    def take(value: Any, where: str) -> Any:
        return None if value is None else kind.take(value, where)

    return Kind(f"{kind.told}, or null", take)


CLASSES = whole(1, 100_000)


def _of_channels(kind: Kind) -> Kind:
    """One value, or one for each channel of a picture."""
    return maybe(either(listed(kind, 1, 1), listed(kind, 3, 3)))


CHANNELS = _of_channels(number(-1e6, 1e6))
SPREADS = _of_channels(number(1e-6, 1e6))
SIZE_DIVISIBILITY = whole(0, 1024)
IOU = maybe(number(0, 1))
IMAGE_FORMAT = choice("RGB", "BGR")
_MAPPING = _kind("keys with values", lambda value: isinstance(value, Mapping))
_LIST = _kind("a list", lambda value: isinstance(value, Sequence) and not isinstance(value, str))
_NAME = either(text(r"(?s:.{0,1000})", "a text of at most 1000 characters"), number(-1e18, 1e18))
_ID = either(whole(-(2**63), 2**63 - 1), _NAME)
# What is read without building anything, where it is there.
_READ: dict[str, Kind] = {
    "model": _MAPPING,
    "model.num_classes": CLASSES,
    "model.pixel_mean": CHANNELS,
    "model.pixel_std": SPREADS,
    "model.size_divisibility": SIZE_DIVISIBILITY,
    "model.nms_threshold": IOU,
    "model.backbone": _MAPPING,
    "model.neck": _MAPPING,
    "model.queries": _MAPPING,
    "model.decoder": _MAPPING,
    "dataloader": _MAPPING,
    "dataloader.test": _MAPPING,
    "dataloader.test.mapper": _MAPPING,
    "dataloader.test.mapper.augmentation": _LIST,
    "dataloader.test.mapper.image_format": text(r".{1,100}", "the order of channels"),
    "train": _MAPPING,
}


def require_blueprint(content: Any) -> None:
    """Raises a Misfit for what is no blueprint by its structure, and names the key."""
    require_plain(content, KEY)
    _MAPPING.take(content, KEY)
    if "config" not in content or "categories" not in content:
        raise Misfit(KEY, list(content), f"the keys {', '.join(FIELDS)}")
    config = _MAPPING.take(content["config"], "config")
    for key, kind in _READ.items():
        *sections, last = key.split(".")
        section = config
        for name in sections:  # which are checked before what is in them
            section = section.get(name, {})
        if last in section:
            kind.take(section[last], f"config.{key}")
    categories = listed(_MAPPING, 100_000, 1).take(content["categories"], "categories")
    ids = set()
    for index, category in enumerate(categories):
        where = f"categories.{index}"
        for key in ("id", "name"):
            if key not in category:
                raise Misfit(where, category, "an id and a name")
        _NAME.take(category["name"], f"{where}.name")
        ids.add(_ID.take(category["id"], f"{where}.id"))
        if len(ids) <= index:
            raise Misfit(f"{where}.id", category["id"], "an id that no earlier one has")
    classes = config.get("model", {}).get("num_classes", len(categories))
    if classes != len(categories):
        raise Misfit("config.model.num_classes", classes, f"{len(categories)}, as categories has")
    if THRESHOLDS in content:
        count = len(categories)
        listed(number(0, 1), count, count).take(content[THRESHOLDS], THRESHOLDS)
    FLAG.take(content.get("averaged", False), "averaged")
    text(r".{1,100}", "a version").take(content.get("version", "?"), "version")


def require_plain(value: Any, where: str) -> None:
    """Raises a Misfit unless it is nested mappings and lists of plain values, in bounds."""
    left = _MOST_VALUES
    stack = [(value, where, 0)]
    while stack:
        value, where, depth = stack.pop()
        left -= 1
        if left < 0:
            raise Misfit(where, value, f"at most {_MOST_VALUES} values in all")
        if isinstance(value, (dict, list, tuple)):
            if depth == _DEEPEST:
                raise Misfit(where[:200], value, f"at most {_DEEPEST} levels of nesting")
            if isinstance(value, dict):
                for key in value:
                    if not isinstance(key, str) or len(key) > 1000:
                        raise Misfit(f"a key of {where}", key, "a text of at most 1000 characters")
                stack += [(item, f"{where}.{key}", depth + 1) for key, item in value.items()]
            else:
                stack += [(item, f"{where}.{i}", depth + 1) for i, item in enumerate(value)]
        elif isinstance(value, str):
            if len(value) > _LONGEST:
                raise Misfit(where, value, f"a text of at most {_LONGEST} characters")
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise Misfit(where, value, "a plain value: a text, a number, true, false or null")
