"""Pictures that are made of several: before the augmentation, at the size of the first one.

What is combined has the size of the first picture, so that it takes the memory of one, and the
augmentation follows as for any other. Others are read one at a time and resized to where they go;
what they take is the time to read them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .checks import require_number, require_range
from .geometry import MIN_VISIBLE, ResizedCropTransform, areas, clipped


class Sample(NamedTuple):
    """A picture with its objects."""

    image: np.ndarray  # uint8 (H, W, 3)
    boxes: np.ndarray  # float64 (N, 4), xyxy in pixels
    classes: np.ndarray  # int64 (N,)

    def only(self, kept: np.ndarray) -> "Sample":
        """Those objects that a mask (N,), or indices, name."""
        return self._replace(boxes=self.boxes[kept], classes=self.classes[kept])


# No dataclasses: what a list of a config holds of these comes out of it as a config again.
class Combination:
    """Makes one sample of several; a subclass defines ``combine``.

    The random numbers are numpy's global ones.

    Attributes:
        prob: of it, for a picture.
    """

    prob: float

    def combine(self, sample: Sample, other: Callable[[], Sample]) -> Sample:
        """A sample of the size of ``sample``, which is not changed.

        Args:
            other: reads another one, drawn at random from the data set, each time it is called.
        """
        raise NotImplementedError

    def __call__(self, sample: Sample, other: Callable[[], Sample]) -> Sample:
        if np.random.uniform() >= self.prob:
            return sample
        return self.combine(sample, other)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


def _cover(
    sample: Sample, size: tuple[int, int], zoom: tuple[float, float], min_visible: float
) -> Sample:
    """A random crop of ``size``, (height, width), of a sample that is resized to cover that, and
    enlarged further by a factor from ``zoom``."""
    (height, width), (down, across) = sample.image.shape[:2], size
    scale = max(down / height, across / width) * np.random.uniform(*zoom)
    new_h, new_w = max(down, int(scale * height + 0.5)), max(across, int(scale * width + 0.5))
    x0 = int(np.random.randint(new_w - across + 1))
    y0 = int(np.random.randint(new_h - down + 1))
    crop = ResizedCropTransform(
        height, width, new_h, new_w, x0, y0, across, down, min_visible=min_visible
    )
    boxes, kept = crop.cut_boxes(sample.boxes)
    return Sample(crop.apply_image(sample.image), boxes[kept], sample.classes[kept])


class Mosaic(Combination):
    """Four pictures in two rows and two columns, that meet at a random point.

    Each fills its part: it is resized to cover it, and cropped, so that nothing is left grey. A
    picture of a single row or column stays as it is.

    Args:
        zoom: (min, max) of a factor by which pictures are larger than they must be to cover.
        center: (min, max) of where they meet, as shares of the height and the width.
        min_visible: boxes of which a crop leaves less than this share of the area are dropped.
    """

    def __init__(
        self,
        prob: float = 0.3,
        zoom: tuple[float, float] = (1.0, 1.5),
        center: tuple[float, float] = (0.3, 0.7),
        min_visible: float = MIN_VISIBLE,
    ):
        self.prob = prob
        self.zoom = zoom
        self.center = center
        self.min_visible = min_visible
        require_number(self, "prob", 0, 1)
        require_range(self, "zoom", 1, 10)
        require_range(self, "center", 0.1, 0.9)
        require_number(self, "min_visible", 0, 1)

    def combine(self, sample: Sample, other: Callable[[], Sample]) -> Sample:
        height, width = sample.image.shape[:2]
        if min(height, width) < 2:
            return sample
        y, x = (
            min(max(1, int(np.random.uniform(*self.center) * side + 0.5)), side - 1)
            for side in (height, width)
        )
        image = np.empty_like(sample.image)
        boxes, classes = [], []
        places = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
        for number, place in enumerate(np.random.permutation(4)):
            top, left, bottom, right = places[place]
            picture = sample if number == 0 else other()
            part = _cover(picture, (bottom - top, right - left), self.zoom, self.min_visible)
            image[top:bottom, left:right] = part.image
            boxes.append(part.boxes + [left, top, left, top])
            classes.append(part.classes)
        return Sample(image, np.concatenate(boxes), np.concatenate(classes))


class MixUp(Combination):
    """Two pictures one over the other, each seen through the other, with the objects of both.

    The second one is resized to cover the first, and cropped.

    Args:
        alpha: the share of the first is drawn from Beta(alpha, alpha): the larger, the nearer to a
            half.
        zoom, min_visible: as of :class:`Mosaic`.
    """

    def __init__(
        self,
        prob: float = 0.1,
        alpha: float = 32.0,
        zoom: tuple[float, float] = (1.0, 1.5),
        min_visible: float = MIN_VISIBLE,
    ):
        self.prob = prob
        self.alpha = alpha
        self.zoom = zoom
        self.min_visible = min_visible
        require_number(self, "prob", 0, 1)
        require_number(self, "alpha", 0.01)
        require_range(self, "zoom", 1, 10)
        require_number(self, "min_visible", 0, 1)

    def combine(self, sample: Sample, other: Callable[[], Sample]) -> Sample:
        height, width = sample.image.shape[:2]
        second = _cover(other(), (height, width), self.zoom, self.min_visible)
        share = np.float32(np.random.beta(self.alpha, self.alpha))
        mixed = sample.image * share + second.image * (1 - share)
        return Sample(
            (mixed + np.float32(0.5)).astype(np.uint8),
            np.concatenate([sample.boxes, second.boxes]),
            np.concatenate([sample.classes, second.classes]),
        )


class CopyBoxes(Combination):
    """Objects of another picture, with the pixels of their boxes, at random places.

    They are resized by the factor that makes the other picture fit into this one, times a random
    one. An object that finds no place in ten tries, where it hides little of all others, is left
    out.

    Args:
        max_objects: that are copied at most.
        scale: (min, max) of the random factor.
        max_hidden: share of the area of any object that one copied object may hide.
    """

    def __init__(
        self,
        prob: float = 0.3,
        max_objects: int = 3,
        scale: tuple[float, float] = (0.7, 1.3),
        max_hidden: float = 0.3,
    ):
        self.prob = prob
        self.max_objects = max_objects
        self.scale = scale
        self.max_hidden = max_hidden
        require_number(self, "prob", 0, 1)
        require_number(self, "max_objects", 1)
        require_range(self, "scale", 0.01, 100)
        require_number(self, "max_hidden", 0, 1)

    def combine(self, sample: Sample, other: Callable[[], Sample]) -> Sample:
        height, width = sample.image.shape[:2]
        second = other()
        fit = min(height / second.image.shape[0], width / second.image.shape[1])
        # Of objects whole pixels are copied.
        rounded = np.round(clipped(second.boxes, second.image.shape[:2]))
        image, boxes, classes = sample.image.copy(), list(sample.boxes), list(sample.classes)
        for index in np.random.permutation(len(rounded))[: self.max_objects]:
            left, top, right, bottom = rounded[index].astype(int)
            if right - left < 2 or bottom - top < 2:
                continue
            factor = fit * np.random.uniform(*self.scale)
            new_h, new_w = int(factor * (bottom - top) + 0.5), int(factor * (right - left) + 0.5)
            if not (2 <= new_h <= height and 2 <= new_w <= width):
                continue
            for _ in range(10):
                x = int(np.random.randint(width - new_w + 1))
                y = int(np.random.randint(height - new_h + 1))
                place = np.array([x, y, x + new_w, y + new_h], dtype=float)
                if self._hides_little(place, np.array(boxes).reshape(-1, 4)):
                    break
            else:
                continue
            pixels = np.ascontiguousarray(second.image[top:bottom, left:right])
            resize = ResizedCropTransform(
                bottom - top, right - left, new_h, new_w, 0, 0, new_w, new_h
            )
            image[y : y + new_h, x : x + new_w] = resize.apply_image(pixels)
            boxes.append(place)
            classes.append(second.classes[index])
        return Sample(image, np.array(boxes).reshape(-1, 4), np.array(classes, dtype=np.int64))

    def _hides_little(self, place: np.ndarray, boxes: np.ndarray) -> bool:
        hidden = np.concatenate(
            [np.maximum(boxes[:, :2], place[:2]), np.minimum(boxes[:, 2:], place[2:])], axis=1
        )
        return bool((areas(hidden) <= self.max_hidden * areas(boxes)).all())
