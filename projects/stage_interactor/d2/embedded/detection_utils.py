"""Stands in for ``detectron2.data.detection_utils``.

Left out: masks, keypoints, proposals, rotated boxes, other colour spaces, ``check_image_size``.
Segmentations and keypoints are dropped when an annotation is transformed, rather than kept in a
wrong place.
"""

import numpy as np
import torch
from PIL import ImageOps

from ...untrusted.pictures import open_image
from .structures import Boxes, BoxMode, Instances
from .transforms import TransformList


def read_image(file_name: str, format: str) -> np.ndarray:
    """Read an image, turned upright by its EXIF orientation.

    Args:
        format: ``"RGB"`` or ``"BGR"``.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: for another format, or a picture with too many pixels.
        OSError: it is no picture of a format that is decoded in this process.
    """
    if format not in ("RGB", "BGR"):
        raise ValueError(f"format is {format!r}; it must be 'RGB' or 'BGR'.")
    with open_image(file_name) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return pixels[:, :, ::-1] if format == "BGR" else pixels


def transform_instance_annotations(
    annotation: dict, transforms: TransformList, image_size: tuple[int, int]
) -> dict:
    """Transform the box of one annotation, in place, and clip it to the transformed image.

    Args:
        annotation: with ``bbox`` and ``bbox_mode``.
        transforms: what was done to the image.
        image_size: (height, width) of the transformed image in pixels.

    Returns:
        The annotation; ``bbox`` is (x1, y1, x2, y2) in pixels, an array of four.
    """
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    box = transforms.apply_box(np.array([box]))[0].clip(min=0)
    height, width = image_size
    annotation["bbox"] = np.minimum(box, [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    annotation.pop("segmentation", None)
    annotation.pop("keypoints", None)
    return annotation


def annotations_to_instances(annos: list[dict], image_size: tuple[int, int]) -> Instances:
    """Collect the annotations of an image of (height, width) for a model, without their masks.

    Returns:
        Instances with ``gt_boxes``, (N, 4) x1, y1, x2, y2 in pixels, and ``gt_classes``, (N,)
        int64.
    """
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    return Instances(
        image_size,
        gt_boxes=Boxes(np.stack(boxes) if boxes else np.zeros((0, 4))),
        gt_classes=torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64),
    )


def filter_empty_instances(instances: Instances) -> Instances:
    """Drop instances whose ``gt_boxes`` have no area, to within a hundred-thousandth of a pixel."""
    return instances[instances.gt_boxes.nonempty(threshold=1e-5)]
