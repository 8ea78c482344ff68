"""Stands in for ``detectron2.data.detection_utils``.

Left out: masks, keypoints, proposals, rotated boxes, the YUV colour space. Segmentations and
keypoints are dropped when an annotation is transformed, rather than kept in a wrong place.
"""

import numpy as np
import torch
from PIL import Image, ImageOps

from .paths import PathManager
from .structures import Boxes, BoxMode, Instances
from .transforms import TransformList


class SizeMismatchError(ValueError):
    """An image has another size than its annotation says."""


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image, turned upright by its EXIF orientation.

    Args:
        format: ``"BGR"`` or a mode of Pillow such as ``"RGB"`` and ``"L"``; None keeps the file's.

    Returns:
        (H, W, C) uint8; (H, W) if the file is grey and ``format`` is None.
    """
    with PathManager.open(file_name, "rb") as file:
        image = ImageOps.exif_transpose(Image.open(file))
        if format is not None:
            image = image.convert("RGB" if format == "BGR" else format)
        pixels = np.asarray(image)
    if format == "L":
        return pixels[:, :, None]
    return pixels[:, :, ::-1] if format == "BGR" else pixels


def check_image_size(dataset_dict: dict, image: np.ndarray) -> None:
    """Compare an image (H, W, ...) with its record; fill in a size that the record lacks.

    Raises:
        SizeMismatchError: if they differ.
    """
    height, width = image.shape[:2]
    if (dataset_dict.get("height", height), dataset_dict.get("width", width)) != (height, width):
        raise SizeMismatchError(
            f"Image {dataset_dict.get('file_name', 'without a file name')} is {width} x {height} "
            f"pixels, but its annotation says {dataset_dict.get('width')} x "
            f"{dataset_dict.get('height')}. Correct width and height in the annotation."
        )
    dataset_dict["height"], dataset_dict["width"] = height, width


def transform_instance_annotations(
    annotation: dict, transforms, image_size: tuple[int, int], *, keypoint_hflip_indices=None
) -> dict:
    """Transform the box of one annotation, in place, and clip it to the transformed image.

    Args:
        annotation: with ``bbox`` and ``bbox_mode``.
        transforms: a TransformList, or transforms in a list.
        image_size: (height, width) of the transformed image in pixels.
        keypoint_hflip_indices: ignored, since keypoints are dropped.

    Returns:
        The annotation; ``bbox`` is (x1, y1, x2, y2) in pixels, an array of four.
    """
    if isinstance(transforms, (list, tuple)):
        transforms = TransformList(transforms)
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    box = transforms.apply_box(np.array([box]))[0].clip(min=0)
    height, width = image_size
    annotation["bbox"] = np.minimum(box, [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    annotation.pop("segmentation", None)
    annotation.pop("keypoints", None)
    return annotation


def annotations_to_instances(
    annos: list[dict], image_size: tuple[int, int], mask_format: str = "polygon"
) -> Instances:
    """Collect the annotations of an image of (height, width) for a model.

    Returns:
        Instances with ``gt_boxes``, (N, 4) x1, y1, x2, y2 in pixels, and ``gt_classes``, (N,)
        int64. Masks are left out, whatever ``mask_format``.
    """
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    return Instances(
        image_size,
        gt_boxes=Boxes(np.stack(boxes) if boxes else np.zeros((0, 4))),
        gt_classes=torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64),
    )


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
):
    """Drop instances whose ``gt_boxes`` are not wider and higher than ``box_threshold`` pixels.

    Returns:
        The instances left and, with ``return_mask``, which ones they were, (N,) bool.
    """
    if not by_box:
        return instances
    keep = instances.gt_boxes.nonempty(threshold=box_threshold)
    return (instances[keep], keep) if return_mask else instances[keep]
