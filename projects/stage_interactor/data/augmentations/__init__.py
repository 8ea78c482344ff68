"""Augmentations beyond flip, crop and resize, for the lists of ``dataloader.train.mapper``.

Those of one picture are detectron2 augmentations and stand in any list of them, before and after
detectron2's own. Those that are made of several pictures (:class:`Mosaic`, :class:`MixUp`,
:class:`CopyBoxes`) go to the mapper's ``combinations``.
"""

from .combinations import Combination, CopyBoxes, MixUp, Mosaic, Sample
from .geometry import CuttingTransform, LargeScaleJitter, RandomRotate, RandomRotation90
from .pixels import ColorJitter, GaussianBlur, RandomGrayscale, in_format
from .policies import FLIPS, POLICIES, Recipe, opening_and_closing, with_flips

__all__ = [
    "FLIPS",
    "POLICIES",
    "ColorJitter",
    "Combination",
    "CopyBoxes",
    "CuttingTransform",
    "GaussianBlur",
    "LargeScaleJitter",
    "MixUp",
    "Mosaic",
    "RandomGrayscale",
    "RandomRotate",
    "RandomRotation90",
    "Recipe",
    "Sample",
    "in_format",
    "opening_and_closing",
    "with_flips",
]
