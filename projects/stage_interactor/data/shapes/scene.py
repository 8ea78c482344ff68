"""Draws one picture of the generated shapes data set: textured shapes on a textured background.

Everything here is a pure function of the `numpy.random.Generator` that is handed in.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

CLASS_NAMES = ("ellipse", "rectangle", "triangle", "cross", "ring")

_SUPERSAMPLING = 4  # outlines are drawn this many times larger, then averaged down
_MIN_VISIBLE_FRACTION = 0.4  # an object keeps at least this share of its pixels in view
_MIN_VISIBLE_PIXELS = 16
_BACKGROUND_CONTRAST = 0.3  # of the background's two colours, relative to the shapes'
_TEXTURES = ("noise", "checks", "gradient", "stripes", "dots")
# Most shapes have the texture and the hue of their class, as things in life do.
_TYPICAL = 0.9
_HUE_SPREAD = 0.1  # of a class, as a share of the colour circle, to each side
_MIN_COLOUR_DISTANCE = 80.0  # between the mean colours of a shape and the background (RGB, L2)
_PLACEMENT_ATTEMPTS = 8


def draw_scene(
    rng: np.random.Generator,
    *,
    image_size: int,
    min_objects: int,
    max_objects: int,
    min_size: float,
    max_size: float,
) -> tuple[np.ndarray, list[dict]]:
    """Draws a background and `min_objects` to `max_objects` shapes, larger ones mostly underneath.

    The size of an object is the square root of the area of its whole box, in pixels, so that
    COCO's limits for small and medium objects are sizes of 32 and 96. Sizes are log-uniform. An
    object that would end up nearly hidden, or would nearly hide another, is placed elsewhere or
    left out, so every shape that can be seen in the picture is annotated.

    Returns:
        (image, objects): uint8 (image_size, image_size, 3) RGB, and for every object a dict of
        `class_index` (index into `CLASS_NAMES`), `bbox` ([x, y, width, height] in pixels, tight
        around its visible pixels) and `area` (of that box).
    """
    # Backgrounds are nearly grey, so that a shape of any hue can be told from them.
    background_colour = (rng.uniform(30, 225) + rng.normal(0, 15, size=3)).clip(0, 255)
    canvas = _texture(
        rng,
        image_size,
        mean=background_colour,
        kind=str(rng.choice(_TEXTURES)),
        contrast=_BACKGROUND_CONTRAST,
    )
    owner = np.full((image_size, image_size), -1)  # which object each pixel shows
    full_areas: list[int] = []
    classes: list[int] = []

    count = int(rng.integers(min_objects, max_objects + 1))
    sizes = np.exp(rng.uniform(math.log(min_size), math.log(max_size), size=count))
    for size in np.sort(sizes)[::-1]:
        class_index = int(rng.integers(len(CLASS_NAMES)))
        rings = _outline(rng, CLASS_NAMES[class_index], float(size))
        for _ in range(_PLACEMENT_ATTEMPTS):
            # The larger a shape, the nearer to the middle: at most a part of it is cut off.
            margin = min(max(0.06 * image_size, 0.35 * size), 0.45 * image_size)
            centre = rng.uniform(margin, image_size - margin, size=2)
            coverage, full_area = _rasterise([ring + centre for ring in rings], image_size)
            solid = coverage >= 0.5
            new_owner = np.where(solid, len(classes), owner)
            visible = np.bincount(new_owner[new_owner >= 0], minlength=len(classes) + 1)
            areas = np.array([*full_areas, full_area])
            needed = np.maximum(_MIN_VISIBLE_FRACTION * areas, _MIN_VISIBLE_PIXELS)
            if (visible >= needed).all():
                typical = (
                    class_index if rng.uniform() < _TYPICAL else int(rng.integers(len(_TEXTURES)))
                )
                mean = _shape_colour(rng, typical, background_colour)
                texture = _texture(rng, image_size, mean=mean, kind=_TEXTURES[typical])
                canvas += coverage[..., None] * (texture - canvas)
                owner = new_owner
                full_areas.append(full_area)
                classes.append(class_index)
                break

    objects = []
    for index, class_index in enumerate(classes):
        ys, xs = np.nonzero(owner == index)
        x0, y0 = int(xs.min()), int(ys.min())
        bbox = [x0, y0, int(xs.max()) + 1 - x0, int(ys.max()) + 1 - y0]
        objects.append({"class_index": class_index, "bbox": bbox, "area": bbox[2] * bbox[3]})
    return canvas.clip(0, 255).astype(np.uint8), objects


def _outline(rng: np.random.Generator, kind: str, size: float) -> list[np.ndarray]:
    """Polygons (points, 2) of a shape around the origin, in pixels; a second polygon is a hole."""

    def circle(radius: float) -> np.ndarray:
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)

    stretch = rng.uniform(0.6, 1.0)
    if kind == "ellipse":
        rings = [circle(1.0)]
    elif kind == "rectangle":
        rings = [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)]
    elif kind == "triangle":
        rings = [np.array([[rng.uniform(-0.7, 0.7), -1], [1, 0.9], [-1, 0.9]])]
    elif kind == "cross":
        a = rng.uniform(0.25, 0.38)  # half the width of an arm
        corners = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        rings = [np.array(corners + [(-x, -y) for x, y in corners])]
    elif kind == "ring":
        rings = [circle(1.0), circle(rng.uniform(0.5, 0.65))]
    else:
        raise ValueError(f"unknown shape {kind!r}; known are {', '.join(CLASS_NAMES)}")

    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    rings = [ring * (1.0, stretch) @ rotation.T for ring in rings]
    width, height = np.ptp(rings[0], axis=0)
    return [ring * (size / math.sqrt(width * height)) for ring in rings]


def _rasterise(rings: list[np.ndarray], image_size: int) -> tuple[np.ndarray, int]:
    """Coverage in [0, 1] of every pixel of the image, and the area inside and outside of it."""
    low = np.floor(rings[0].min(axis=0)).astype(int)
    high = np.ceil(rings[0].max(axis=0)).astype(int)
    width, height = (high - low).tolist()
    mask = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(mask)
    for ring, fill in zip(rings, (255, 0), strict=False):
        # A polygon's vertices are pixel centres to PIL, hence the half pixel.
        points = (ring - low) * _SUPERSAMPLING - 0.5
        pen.polygon([tuple(point) for point in points.tolist()], fill=fill)
    patch = np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32) / 255

    coverage = np.zeros((image_size, image_size), dtype=np.float32)
    x0, y0 = np.maximum(low, 0)
    x1, y1 = np.minimum(high, image_size)
    coverage[y0:y1, x0:x1] = patch[y0 - low[1] : y1 - low[1], x0 - low[0] : x1 - low[0]]
    return coverage, int((patch >= 0.5).sum())


def _shape_colour(rng: np.random.Generator, typical: int, background: np.ndarray) -> np.ndarray:
    """A colour (RGB, 0 to 255) of a class's hue that can be told from the background."""
    while True:
        hue = typical / len(CLASS_NAMES) + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)
        rgb = colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.5, 1.0), rng.uniform(0.4, 1.0))
        colour = 255 * np.array(rgb)
        if np.linalg.norm(colour - background) >= _MIN_COLOUR_DISTANCE:
            return colour


def _texture(
    rng: np.random.Generator, size: int, *, mean: np.ndarray, kind: str, contrast: float = 1.0
) -> np.ndarray:
    """A float32 (size, size, 3) texture of two colours around a mean, one of `_TEXTURES`."""
    spread = rng.normal(size=3)  # a direction in colour space: half the distance of the two
    spread *= contrast * rng.uniform(40, 80) / np.linalg.norm(spread)

    ys, xs = np.mgrid[:size, :size].astype(np.float32)
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(4, 12), rng.uniform(0, 2 * np.pi)
    along = xs * math.cos(angle) + ys * math.sin(angle)
    across = ys * math.cos(angle) - xs * math.sin(angle)
    wave = np.sin(2 * np.pi * along / period + phase)
    if kind == "stripes":
        value = np.sign(wave)
    elif kind == "checks":
        value = np.sign(wave) * np.sign(np.sin(2 * np.pi * across / period))
    elif kind == "dots":
        value = np.where(wave + np.sin(2 * np.pi * across / period) > 0.9, 1.0, -1.0)
    elif kind == "noise":
        coarse = rng.uniform(-1, 1, size=(2 + size // 8, 2 + size // 8)).astype(np.float32)
        value = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    else:  # gradient
        value = 2 * (along - along.min()) / np.ptp(along) - 1
    grain = rng.normal(0, 4, size=(size, size, 1))
    pixels = mean + value[..., None] * spread + grain
    return pixels.astype(np.float32)
