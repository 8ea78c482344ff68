"""Augmentations of pixels alone: boxes stay as they are.

They are computed on RGB. Where pictures are BGR, ``image_format`` says so;
:class:`~stage_interactor.data.DetrDatasetMapper` gives its own to all of its augmentations.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torchvision.transforms.v2.functional as F
from fvcore.transforms.transform import NoOpTransform, Transform
from PIL import Image, ImageFilter

from ...d2 import transforms as T
from .checks import require_number, require_range


class PixelTransform(Transform):
    """Applies a function of a PIL image, RGB, to pixels."""

    def __init__(self, function: Callable[[Image.Image], Image.Image], image_format: str = "RGB"):
        super().__init__()
        self.function = function
        self.image_format = image_format

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Of uint8 (H, W, 3)."""
        step = -1 if self.image_format == "BGR" else 1
        picture = Image.fromarray(np.ascontiguousarray(img[:, :, ::step]))
        return np.ascontiguousarray(np.asarray(self.function(picture))[:, :, ::step])

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def inverse(self) -> Transform:
        return NoOpTransform()


class PixelAugmentation(T.Augmentation):
    """Changes a picture with a probability.

    A subclass defines ``draw``, which draws a function of a PIL image.
    """

    def __init__(self, prob: float, image_format: str):
        self.prob = prob
        self.image_format = image_format
        require_number(self, "prob", 0, 1)
        if image_format not in ("RGB", "BGR"):
            name = type(self).__name__
            raise ValueError(f"{name}: image_format must be 'RGB' or 'BGR', got {image_format!r}")

    def draw(self) -> Callable[[Image.Image], Image.Image]:
        raise NotImplementedError

    def get_transform(self, image: np.ndarray) -> Transform:
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        return PixelTransform(self.draw(), self.image_format)


class ColorJitter(PixelAugmentation):
    """torchvision's: brightness, contrast, saturation and hue by random factors, in random order.

    Args:
        brightness, contrast, saturation: a factor is drawn from ``1 - value`` (at least 0) to
            ``1 + value``; 0 leaves it out.
        hue: a turn of the circle of colours is drawn from ``-hue`` to ``hue``; at most 0.5. It
            takes several times as long as the others; 0 leaves it out.
        prob: of the whole.
        image_format: "RGB" or "BGR".
    """

    def __init__(
        self,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.0,
        prob: float = 1.0,
        image_format: str = "RGB",
    ):
        super().__init__(prob, image_format)
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        for name in ("brightness", "contrast", "saturation"):
            require_number(self, name, 0)
        require_number(self, "hue", 0, 0.5)

    def draw(self) -> Callable[[Image.Image], Image.Image]:
        steps: list[Callable[[Image.Image], Image.Image]] = []
        for strength, adjust in (
            (self.brightness, F.adjust_brightness),
            (self.contrast, F.adjust_contrast),
            (self.saturation, F.adjust_saturation),
        ):
            if strength:
                factor = np.random.uniform(max(0.0, 1 - strength), 1 + strength)
                steps.append(functools.partial(adjust, **{_factor_of(adjust): factor}))
        if self.hue:
            turn = np.random.uniform(-self.hue, self.hue)
            steps.append(functools.partial(F.adjust_hue, hue_factor=turn))
        chosen = [steps[index] for index in np.random.permutation(len(steps))]
        return functools.partial(_one_after_the_other, chosen)


def _factor_of(adjust: Callable) -> str:
    return f"{adjust.__name__.removeprefix('adjust_')}_factor"


def _one_after_the_other(steps: Sequence[Callable], picture: Image.Image) -> Image.Image:
    for step in steps:
        picture = step(picture)
    return picture


class RandomGrayscale(PixelAugmentation):
    """Takes the colours out, as torchvision's of this name does."""

    def __init__(self, prob: float = 0.1, image_format: str = "RGB"):
        super().__init__(prob, image_format)

    def draw(self) -> Callable[[Image.Image], Image.Image]:
        return functools.partial(F.rgb_to_grayscale, num_output_channels=3)


class GaussianBlur(PixelAugmentation):
    """Pillow's blur, a third of the time of torchvision's.

    Args:
        sigma: (min, max), in pixels of the picture as it comes: behind a resize those of the
            resized one.
        prob, image_format: as of :class:`ColorJitter`.
    """

    def __init__(
        self,
        sigma: Sequence[float] = (0.1, 2.0),
        prob: float = 0.5,
        image_format: str = "RGB",
    ):
        super().__init__(prob, image_format)
        self.sigma = tuple(sigma) if isinstance(sigma, Sequence) else sigma
        require_range(self, "sigma", 0)

    def draw(self) -> Callable[[Image.Image], Image.Image]:
        return functools.partial(_blurred, radius=np.random.uniform(self.sigma[0], self.sigma[1]))


def _blurred(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def in_format(augmentation: Any, image_format: str) -> Any:
    """An augmentation, or what holds some, for pictures of that order of channels.

    What others hold is found too, such as in detectron2's RandomApply. Nothing is changed in place:
    what differs is a copy.
    """
    if isinstance(augmentation, (list, tuple)):
        return type(augmentation)(in_format(item, image_format) for item in augmentation)
    if not isinstance(augmentation, T.Augmentation):
        return augmentation
    changed = copy.copy(augmentation)
    for name, value in vars(augmentation).items():
        if isinstance(value, (T.Augmentation, list)):
            setattr(changed, name, in_format(value, image_format))
    if isinstance(changed, PixelAugmentation):
        changed.image_format = image_format
    return changed
