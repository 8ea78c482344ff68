"""Named choices of augmentation, made of the lists that a config has."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...d2 import transforms as T
from .combinations import Combination, MixUp, Mosaic
from .geometry import LargeScaleJitter
from .pixels import ColorJitter, GaussianBlur, RandomGrayscale

POLICIES = ("none", "light", "strong")
FLIPS = ("none", "horizontal", "vertical", "both")


class Recipe(NamedTuple):
    """What is done to the pictures of a training."""

    augmentation: Sequence[T.Augmentation]
    augmentation_with_crop: Sequence[T.Augmentation] | None  # for half of the pictures
    combinations: Sequence[Combination] = ()


def opening_and_closing(
    policy: str | None,
    lists: Recipe,
    *,
    closing_augmentation: Sequence[T.Augmentation] | None = None,
    plain: Sequence[T.Augmentation] | None = None,
) -> tuple[Recipe, Recipe]:
    """What is done to pictures until the last part of a training, and in it.

    Args:
        policy: `None`: the lists as they are, and in the last part without combinations.
            `"none"`: `plain`. `"light"`: the lists, with a mild jitter of colours behind.
            `"strong"`: these with more, LargeScaleJitter in place of the last resize of the first
            list, and mosaic and mixup; in the last part what `"light"` is.
        lists: of a config.
        closing_augmentation: for the last part, in place of the two lists.
        plain: how pictures are resized in evaluation.

    Raises:
        ValueError: there is no such policy, or the lists do not go with it.
    """
    if policy is None:
        closing = lists._replace(combinations=())
        if closing_augmentation is not None:
            closing = Recipe(closing_augmentation, None)
        return lists, closing
    if policy not in POLICIES:
        raise ValueError(f"augmentation must be one of {[*POLICIES]} or null, got {policy!r}")
    if lists.combinations or closing_augmentation is not None:
        raise ValueError(
            f"augmentation={policy} has combinations and a last part of its own: for others leave "
            "it out (null)"
        )
    if policy == "none":
        if plain is None:
            raise ValueError("augmentation=none needs 'plain', the augmentation of the evaluation")
        return Recipe(plain, None), Recipe(plain, None)
    light = _followed_by(lists, [ColorJitter(0.2, 0.2, 0.2, prob=0.5)])
    if policy == "light":
        return light, light
    strong = _followed_by(
        lists._replace(augmentation=_jittered(lists.augmentation)),
        [
            ColorJitter(0.4, 0.4, 0.4, 0.02, prob=0.5),
            RandomGrayscale(0.05),
            GaussianBlur((0.1, 1.5), prob=0.1),
        ],
    )
    return strong._replace(combinations=(Mosaic(0.3), MixUp(0.1))), light


def with_flips(augmentation: Sequence[T.Augmentation], flip: str) -> list[T.Augmentation]:
    """A list with other flips than its own.

    Args:
        flip: `"none"`, `"horizontal"` (left and right change places), `"vertical"` (top and bottom
            do) or `"both"`, each for half of the pictures; where the first RandomFlip of the list
            is, or before all others.

    Raises:
        ValueError: there is no such choice, or a RandomFlip lies in another augmentation.
    """
    if flip not in FLIPS:
        raise ValueError(f"flip must be one of {[*FLIPS]} or null, got {flip!r}")
    flips = []
    if flip in ("horizontal", "both"):
        flips.append(T.RandomFlip())
    if flip in ("vertical", "both"):
        flips.append(T.RandomFlip(horizontal=False, vertical=True))
    own = [isinstance(aug, T.RandomFlip) for aug in augmentation]
    place = own.index(True) if True in own else 0
    others = [aug for aug in augmentation if not isinstance(aug, T.RandomFlip)]
    for aug in others:
        if _holds_flip(aug):
            raise ValueError(
                f"flip={flip} is in place of each RandomFlip of a list, but one lies in "
                f"{type(aug).__name__}: take it out, or leave flip out (null)"
            )
    return [*others[:place], *flips, *others[place:]]


def _holds_flip(item: Any) -> bool:
    if isinstance(item, (list, tuple)):
        return any(map(_holds_flip, item))
    if not isinstance(item, T.Augmentation):
        return False
    return isinstance(item, T.RandomFlip) or any(map(_holds_flip, vars(item).values()))


def _followed_by(lists: Recipe, more: Sequence[T.Augmentation]) -> Recipe:
    crop = lists.augmentation_with_crop
    return Recipe([*lists.augmentation, *more], None if crop is None else [*crop, *more])


def _jittered(augmentation: Sequence[T.Augmentation]) -> list[T.Augmentation]:
    found = [i for i, aug in enumerate(augmentation) if isinstance(aug, T.ResizeShortestEdge)]
    if not found:
        raise ValueError(
            "augmentation=strong varies the size of a ResizeShortestEdge, and there is none in the "
            "mapper's augmentation: add it, or leave augmentation out (null)"
        )
    resize: Any = augmentation[found[-1]]
    jitter = LargeScaleJitter(
        resize.short_edge_length, resize.max_size, resize.sample_style, interp=resize.interp
    )
    return [*augmentation[: found[-1]], jitter, *augmentation[found[-1] + 1 :]]
