"""Pictures of detections: boxes on one image, and a grid of detections beside ground truth."""

import colorsys
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..d2.structures import BoxMode
from ..data.images import read_image
from .fonts import font_of, readable
from .page import data_uri, save_picture

with warnings.catch_warnings():
    # OpenCV is not needed: supervision draws without it.
    warnings.filterwarnings("ignore", message="OpenCV")
    import supervision as sv

_Item = TypeVar("_Item")

_CELL = 360  # longer side of a picture in the grid, in pixels
_WIDTH, _HEIGHT = 420, 1680  # of a picture in a page, at most: a strip must not fill it
_GAP = 8
_TITLE = 26
_MOST_NAMES = 300  # the largest boxes have theirs, each moved away from all others


def class_colour(class_index: int) -> tuple[int, int, int]:
    """A saturated RGB colour; neighbouring classes are far apart on the colour circle."""
    hue = (0.02 + class_index * 0.6180339887) % 1.0
    value = (1.0, 0.8)[class_index // 8 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: np.ndarray,
    boxes: ArrayLike,
    labels: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray | None = None,
    *,
    class_names: Sequence[str] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
    tracks: Sequence[int] | np.ndarray | None = None,
    scale: float = 1.0,
    font_size: int = 12,
) -> np.ndarray:
    """Draws boxes with their classes and scores on a copy of an image.

    Args:
        image: uint8 (H, W, 3), RGB.
        boxes: (N, 4), xyxy in pixels of `image`; an array, a tensor or lists.
        labels: N class indices; they choose the colour.
        scores: N scores in [0, 1], written behind the name.
        class_names: by class index; without it the index is written, and for a name that no font
            here has the letters of, see :mod:`.fonts`.
        colours: RGB of each box; by default that of its class.
        tracks: N ids, written before the name as "#3"; below 0 for none.
        scale: the picture is resized by this factor first, so that text on a small image is
            legible.
        font_size: in pixels of the returned picture. Of more than 300 boxes the largest 300 have
            names.

    Returns:
        uint8 (round(H * scale), round(W * scale), 3), RGB.

    Raises:
        ValueError: boxes, labels and scores differ in number, or `image` has another form.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    corners = np.asarray(boxes, dtype=float).reshape(-1, 4)
    if len(corners) != len(labels) or (scores is not None and len(scores) != len(corners)):
        raise ValueError(
            f"got {len(corners)} boxes, {len(labels)} labels and "
            f"{'no' if scores is None else len(scores)} scores; their numbers must be equal"
        )
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(image)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    if not len(corners):
        return np.asarray(picture)
    # Large boxes first, and all names after all boxes: small objects stay visible.
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    order = np.argsort(-areas, kind="stable")
    classes = np.asarray(labels, dtype=int)[order]
    texts = [
        str(label) if class_names is None else readable(str(class_names[label]), str(label))
        for label in classes
    ]
    if scores is not None:
        texts = [f"{text} {float(scores[index]):.2f}" for text, index in zip(texts, order)]
    if tracks is not None:
        ids = (tracks[index] for index in order)
        texts = [text if track < 0 else f"#{track} {text}" for text, track in zip(texts, ids)]
    if colours is None:
        colours = [class_colour(label) for label in classes]
    else:
        colours = [colours[index] for index in order]
    named = slice(_MOST_NAMES)
    texts = texts[named]
    dark_text = [0.3 * red + 0.59 * green + 0.11 * blue > 130 for red, green, blue in colours]
    plates = sv.ColorPalette([sv.Color(*colour) for colour in colours])
    letters = sv.ColorPalette([sv.Color.BLACK if dark else sv.Color.WHITE for dark in dark_text])
    detections = sv.Detections(xyxy=corners[order][named] * scale, class_id=classes[named])
    by_box: dict[str, Any] = dict(color=plates, color_lookup=sv.ColorLookup.INDEX)
    line = max(2, font_size // 6)
    picture = sv.BoxAnnotator(**by_box, thickness=line).annotate(picture, detections)
    pen = ImageDraw.Draw(picture)
    for box, colour in zip(corners[order][_MOST_NAMES:] * scale, colours[_MOST_NAMES:]):
        pen.rectangle(box.tolist(), outline=colour, width=line)
    labels_of_boxes = sv.RichLabelAnnotator(
        **by_box, text_color=letters, font_size=font_size, text_padding=2, smart_position=True
    )
    labels_of_boxes.font = font_of(texts, font_size)
    return np.asarray(labels_of_boxes.annotate(picture, detections, labels=texts))


class Traces:
    """Where the objects of a video have been in its last 30 frames, drawn on the next one."""

    def __init__(self, num_classes: int):
        colours = [sv.Color(*class_colour(index)) for index in range(num_classes)]
        options: dict[str, Any] = {"color_lookup": sv.ColorLookup.CLASS, "trace_length": 30}
        self._annotator = sv.TraceAnnotator(sv.ColorPalette(colours), **options)

    def draw(self, image: np.ndarray, detections: Any, thickness: int = 2) -> np.ndarray:
        """A copy with a line to the centre of each object.

        Args:
            image: uint8 (H, W, 3), RGB.
            detections: supervision's, with ``tracker_id`` and ``class_id``.
        """
        self._annotator.thickness = thickness
        # Of an array it would take the colours for BGR.
        return np.asarray(self._annotator.annotate(Image.fromarray(image), detections))


def picture_with_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> str:
    """For a page: the image with boxes, see :func:`draw_boxes`, of the size that pages show."""
    height, width = image.shape[:2]
    size: dict[str, Any] = dict(scale=min(_WIDTH / width, _HEIGHT / height), font_size=11)
    drawn = draw_boxes(image, boxes, labels, class_names=class_names, colours=colours, **size)
    return data_uri(drawn)


def input_with_boxes(
    image: Tensor, image_format: str, boxes: Tensor, labels: Tensor, class_names: Sequence[str]
) -> str:
    """The same of an input (3, H, W) as a mapper gives it, ``"RGB"`` or ``"BGR"``."""
    pixels = image.permute(1, 2, 0).numpy()
    if image_format == "BGR":
        pixels = pixels[:, :, ::-1]
    pixels = np.ascontiguousarray(pixels)
    return picture_with_boxes(pixels, boxes.numpy(), labels.numpy(), class_names)


def evenly_spread(items: Sequence[_Item], most: int) -> list[_Item]:
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def save_detection_grid(
    path: str | os.PathLike,
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    contiguous_to_dataset_id: Mapping[int, int] | None = None,
    *,
    num_images: int = 12,
    score_threshold: float = 0.3,
    columns: int = 3,
) -> None:
    """Writes one picture of images with their ground truth on the left, detections on the right.

    Args:
        path: of the picture, ending in .jpg or .png.
        records: detectron2's dataset dicts; `num_images` of them, evenly spread, are shown.
        predictions: entries of `coco_instances_results.json`: `image_id`, `category_id` (the data
            set's), `bbox` (x, y, width, height in pixels), `score`.
        class_names: by class index.
        contiguous_to_dataset_id: from class index to the data set's category id; by default they
            are equal.
        num_images: how many images to show, at most.
        score_threshold: detections with a lower score are not drawn.
        columns: pairs of pictures beside one another.

    Raises:
        ValueError: there are no records, or a prediction has an unknown category.
    """
    if not records or num_images < 1:
        raise ValueError(
            f"a grid of detections needs images, got {len(records)} records and "
            f"num_images={num_images}"
        )
    if contiguous_to_dataset_id is None:
        contiguous_to_dataset_id = {index: index for index in range(len(class_names))}
    class_index = {value: key for key, value in contiguous_to_dataset_id.items()}
    found = defaultdict(list)
    for item in predictions:
        if item["category_id"] not in class_index:
            raise ValueError(
                f"a prediction has category_id {item['category_id']}, but the data set's ids are "
                f"{sorted(class_index)}; are the predictions of another data set?"
            )
        if item["score"] >= score_threshold:
            found[item["image_id"]].append(item)

    chosen = evenly_spread(records, num_images)
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    pairs = [_draw_pair(record, found, class_index, class_names) for record in chosen]
    heights = [
        max(truth.shape[0] for truth, _ in pairs[row * columns : (row + 1) * columns]) + _GAP
        for row in range(rows)
    ]
    column_width = 2 * _CELL + 4 * _GAP
    size = columns * column_width - _GAP, _TITLE + _GAP + sum(heights)
    grid = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=_TITLE - 8)
    for position, pair in enumerate(pairs):
        row, column = divmod(position, columns)
        top = _TITLE + _GAP + sum(heights[:row])
        titles = ("ground truth", f"detections (score at least {score_threshold:g})")
        for side, (title, picture) in enumerate(zip(titles, pair)):
            left = _GAP + column * column_width + side * (_CELL + _GAP)
            grid.paste(Image.fromarray(picture), (left, top))
            if row == 0:
                pen.text((left, _GAP // 2), title, fill=(0, 0, 0), font=font)
    save_picture(grid, path, quality=92)


def _draw_pair(
    record: dict,
    found: Mapping[object, list[dict]],
    class_index: Mapping[int, int],
    class_names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    image = read_image(record["file_name"])
    scale = _CELL / max(image.shape[:2])
    objects = [item for item in record.get("annotations", []) if not item.get("iscrowd", 0)]
    truth = draw_boxes(
        image,
        [BoxMode.convert(list(o["bbox"]), o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects],
        [item["category_id"] for item in objects],
        class_names=class_names,
        scale=scale,
    )
    detections = found.get(record.get("image_id"), [])
    detected = draw_boxes(
        image,
        [BoxMode.convert(list(d["bbox"]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for d in detections],
        [class_index[item["category_id"]] for item in detections],
        [item["score"] for item in detections],
        class_names=class_names,
        scale=scale,
    )
    return truth, detected
