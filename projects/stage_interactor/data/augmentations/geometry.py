"""Augmentations that move pixels, and boxes with them.

Where one cuts boxes off, those of which too little is left are dropped: less than ``min_visible``
of their area, or of their sides fewer than two pixels. The mapper asks each transform for that.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
from fvcore.transforms.transform import NoOpTransform, Transform
from PIL import Image

from ...d2 import transforms as T
from .checks import require_number

MIN_VISIBLE = 0.2  # of a box's area, by default
_LEAST_SIDE = 2.0  # pixels of a box that was cut


def clipped(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4), xyxy in pixels, within a picture of ``size``, (height, width)."""
    height, width = size
    return np.clip(boxes, 0, [width, height, width, height])


def areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)


def enough_left(whole: np.ndarray, cut: np.ndarray, min_visible: float) -> np.ndarray:
    """Which of boxes (N, 4) are still to be found when they are cut to ``cut``; bool (N,)."""
    sides = (cut[:, 2:] - cut[:, :2]).min(axis=1)
    left = (areas(cut) >= min_visible * areas(whole)) & (sides >= _LEAST_SIDE)
    return left | np.isclose(whole, cut, rtol=0, atol=1e-6).all(axis=1)


class CuttingTransform(Transform):
    """A transform of a picture of (h, w) that may cut boxes off.

    A subclass defines ``out_size``, (height, width) of what it makes.
    """

    def __init__(self, h: int, w: int, min_visible: float):
        super().__init__()
        self.h = h
        self.w = w
        self.min_visible = min_visible

    @property
    def out_size(self) -> tuple[int, int]:
        raise NotImplementedError

    def cut_boxes(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4), xyxy in pixels, within the new picture, and which of them are left."""
        whole = self.apply_box(clipped(boxes, (self.h, self.w)))
        cut = clipped(whole, self.out_size)
        return cut, enough_left(whole, cut, self.min_visible)


class ResizedCropTransform(CuttingTransform):
    """Resizes a picture of (h, w) to (new_h, new_w), and keeps of that the crop of ``crop_h`` x
    ``crop_w`` pixels whose upper left corner is at (x0, y0). No other pixels are computed."""

    def __init__(
        self,
        h: int,
        w: int,
        new_h: int,
        new_w: int,
        x0: int,
        y0: int,
        crop_w: int,
        crop_h: int,
        min_visible: float = MIN_VISIBLE,
        interp: int = Image.Resampling.BILINEAR,
    ):
        super().__init__(h, w, min_visible)
        self.new_h = new_h
        self.new_w = new_w
        self.x0 = x0
        self.y0 = y0
        self.crop_w = crop_w
        self.crop_h = crop_h
        self.interp = Image.Resampling(interp)

    @property
    def out_size(self) -> tuple[int, int]:
        return self.crop_h, self.crop_w

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Of uint8 (H, W, C) or (H, W)."""
        return self._resized(img, self.interp)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._resized(segmentation, Image.Resampling.NEAREST)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        scale = np.array([self.new_w / self.w, self.new_h / self.h])
        return coords * scale - [self.x0, self.y0]

    def _resized(self, img: np.ndarray, interp: Image.Resampling) -> np.ndarray:
        across, down = self.w / self.new_w, self.h / self.new_h
        left, right = self.x0 * across, (self.x0 + self.crop_w) * across
        top, bottom = self.y0 * down, (self.y0 + self.crop_h) * down
        part = left, top, min(right, self.w), min(bottom, self.h)  # never more by rounding
        picture = Image.fromarray(img)
        return np.asarray(picture.resize((self.crop_w, self.crop_h), interp, box=part))


class LargeScaleJitter(T.Augmentation):
    """In place of detectron2's ResizeShortestEdge: its size times a random factor, cropped to it.

    What becomes larger than the size that ResizeShortestEdge would give is cropped to that, at a
    random place. What becomes smaller stays so: a batch is padded anyway, with what the model is
    told to be no picture, and grey borders within the picture would be seen as a part of it.

    Args:
        short_edge_length, max_size, sample_style, interp: as of ResizeShortestEdge.
        min_scale, max_scale: what the factor is drawn between.
        min_visible: boxes of which the crop leaves less than this share of the area are dropped.
    """

    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        min_scale: float = 0.5,
        max_scale: float = 2.0,
        min_visible: float = MIN_VISIBLE,
        interp: int = Image.Resampling.BILINEAR,
    ):
        self._resize = T.ResizeShortestEdge(short_edge_length, max_size, sample_style, interp)
        self.short_edge_length = short_edge_length
        self.max_size = max_size
        self.sample_style = sample_style
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.min_visible = min_visible
        self.interp = interp
        require_number(self, "min_scale", 0.01, 100)
        require_number(self, "max_scale", min_scale, 100)
        require_number(self, "min_visible", 0, 1)

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        resize = self._resize.get_transform(image)
        most_h, most_w = height, width
        if isinstance(resize, T.ResizeTransform):
            most_h, most_w = max(1, resize.new_h), max(1, resize.new_w)
        scale = np.random.uniform(self.min_scale, self.max_scale)
        new_h, new_w = (max(1, int(scale * side + 0.5)) for side in (most_h, most_w))
        crop_h, crop_w = min(new_h, most_h), min(new_w, most_w)
        return ResizedCropTransform(
            height,
            width,
            new_h,
            new_w,
            int(np.random.randint(new_w - crop_w + 1)),
            int(np.random.randint(new_h - crop_h + 1)),
            crop_w,
            crop_h,
            self.min_visible,
            self.interp,
        )


class Rotation90Transform(Transform):
    """Turns a picture of (h, w) by quarters, against the clock: pixels and boxes exactly."""

    def __init__(self, h: int, w: int, turns: int):
        super().__init__()
        self.h = h
        self.w = w
        self.turns = turns % 4

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        # A copy also where only a side of one pixel is backwards, which torch does not take.
        return np.rot90(img, self.turns).copy()

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        x, y = coords[:, 0], coords[:, 1]
        turned = [(x, y), (y, self.w - x), (self.w - x, self.h - y), (self.h - y, x)][self.turns]
        return np.stack(turned, axis=1)

    def inverse(self) -> Transform:
        h, w = (self.h, self.w)[:: -1 if self.turns % 2 else 1]
        return Rotation90Transform(h, w, -self.turns)


class RandomRotation90(T.Augmentation):
    """Turns by a quarter, a half or three quarters, for pictures that have no top: from above,
    through a microscope. Of batches whose pictures are grouped by shape some are mixed then, which
    costs padding.

    Args:
        prob: of a turn.
        turns: quarters against the clock, one of which is drawn.
    """

    def __init__(self, prob: float = 0.5, turns: Sequence[int] = (1, 2, 3)):
        self.prob = prob
        self.turns = tuple(turns)
        require_number(self, "prob", 0, 1)
        if not self.turns or not set(self.turns) <= {1, 2, 3}:
            raise ValueError(f"RandomRotation90: turns must be some of 1, 2 and 3, got {turns!r}")

    def get_transform(self, image: np.ndarray) -> Transform:
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        height, width = image.shape[:2]
        return Rotation90Transform(height, width, int(np.random.choice(self.turns)))


class RotateTransform(CuttingTransform):
    """Turns a picture of (h, w) around its middle, against the clock.

    A box becomes that of the turned ellipse in it: that of its turned corners would be too large
    for nearly all objects, the more the longer they are. An object that fills the corners of its
    box loses a little of them.

    Args:
        angle: in degrees.
        expand: make the picture as large as the turned one needs; else it keeps its size, and
            corners are cut off.
        fill: grey value of what lies outside of the old picture, 0 to 255; 114 is about what the
            mean of photographs is, and near 0 for a model that subtracts that.
        min_visible: boxes of which less than this share of the area is left are dropped.
    """

    def __init__(
        self,
        h: int,
        w: int,
        angle: float,
        expand: bool = False,
        fill: int = 114,
        min_visible: float = MIN_VISIBLE,
    ):
        super().__init__(h, w, min_visible)
        self.angle = angle
        self.expand = expand
        self.fill = fill
        self._cos, self._sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    @property
    def out_size(self) -> tuple[int, int]:
        if not self.expand:
            return self.h, self.w
        cos, sin = abs(self._cos), abs(self._sin)
        sides = self.h * cos + self.w * sin, self.h * sin + self.w * cos
        return math.ceil(sides[0] - 1e-6), math.ceil(sides[1] - 1e-6)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Of uint8 (H, W, 3) or (H, W)."""
        return self._turned(img, Image.Resampling.BILINEAR, self.fill)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._turned(segmentation, Image.Resampling.NEAREST, 0)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        height, width = self.out_size
        x, y = coords[:, 0] - self.w / 2, coords[:, 1] - self.h / 2
        across = self._cos * x + self._sin * y + width / 2
        down = self._cos * y - self._sin * x + height / 2
        return np.stack([across, down], axis=1)

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        boxes = np.asarray(box, dtype=float).reshape(-1, 4)
        middles = self.apply_coords((boxes[:, :2] + boxes[:, 2:]) / 2)
        a, b = ((boxes[:, 2:] - boxes[:, :2]) / 2).T  # half axes of the ellipses
        half = np.stack(
            [np.hypot(a * self._cos, b * self._sin), np.hypot(a * self._sin, b * self._cos)], axis=1
        )
        return np.concatenate([middles - half, middles + half], axis=1)

    def _turned(self, img: np.ndarray, interp: Image.Resampling, fill: int) -> np.ndarray:
        height, width = self.out_size
        cos, sin = self._cos, self._sin
        # From the new picture to the old one.
        across = self.w / 2 - cos * width / 2 + sin * height / 2
        down = self.h / 2 - sin * width / 2 - cos * height / 2
        picture = Image.fromarray(img)
        color = (int(fill),) * len(picture.getbands())
        turned = picture.transform(
            (width, height),
            Image.Transform.AFFINE,
            (cos, -sin, across, sin, cos, down),
            interp,
            fillcolor=color if len(color) > 1 else color[0],
        )
        return np.asarray(turned)


class RandomRotate(T.Augmentation):
    """Turns by a small random angle, see :class:`RotateTransform`.

    Args:
        degrees: the angle is drawn from ``-degrees`` to ``degrees``, at most 45.
        prob: of a turn.
        expand, fill, min_visible: as of :class:`RotateTransform`.
    """

    def __init__(
        self,
        degrees: float = 10.0,
        prob: float = 0.5,
        expand: bool = False,
        fill: int = 114,
        min_visible: float = MIN_VISIBLE,
    ):
        self.degrees = degrees
        self.prob = prob
        self.expand = expand
        self.fill = fill
        self.min_visible = min_visible
        require_number(self, "degrees", 0, 45)
        require_number(self, "prob", 0, 1)
        require_number(self, "fill", 0, 255)
        require_number(self, "min_visible", 0, 1)

    def get_transform(self, image: np.ndarray) -> Transform:
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        angle = np.random.uniform(-self.degrees, self.degrees)
        height, width = image.shape[:2]
        return RotateTransform(height, width, angle, self.expand, self.fill, self.min_visible)
