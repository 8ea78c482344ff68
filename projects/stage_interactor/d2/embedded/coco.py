"""Stands in for ``detectron2.data.datasets``: annotations in COCO's format, and COCO 2017 itself.

Left out: keypoints, panoptic and semantic segmentation, colours, all data sets but COCO 2017.
Segmentations are kept as they are, for areas; nothing here transforms them.
"""

import contextlib
import io
import json
import logging
import os

import pycocotools.mask
from pycocotools.coco import COCO

from ...untrusted.files import OutsideName, join_within
from ...writing import write_text
from .catalog import DatasetCatalog, MetadataCatalog
from .paths import PathManager
from .structures import Boxes, BoxMode

logger = logging.getLogger(__name__)

_COCO_2017 = {
    "coco_2017_train": ("coco/train2017", "coco/annotations/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
    "coco_2017_test-dev": ("coco/test2017", "coco/annotations/image_info_test-dev2017.json"),
    "coco_2017_val_100": ("coco/val2017", "coco/annotations/instances_val2017_100.json"),
}
# COCO numbers 91 categories and annotates 80 of them.
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_CLASSES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""


def read_coco(json_file: str) -> COCO:
    """Open an annotation file with pycocotools, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(PathManager.get_local_path(json_file))


def load_coco_json(json_file: str, image_root: str, dataset_name: str) -> list[dict]:
    """Read a JSON file in COCO's instance format into records, one per image, by image id.

    Class ids are mapped to 0, 1, ... in the order of the file's ids.

    Args:
        image_root: the folder that the file names start from.
        dataset_name: of the data set to whose metadata ``thing_classes`` and the mapping go.

    Returns:
        Records with ``file_name``, ``height``, ``width``, ``image_id`` and ``annotations``; an
        annotation has ``bbox`` (x, y, width, height in pixels), ``bbox_mode``, ``category_id``,
        ``iscrowd`` and, if the file has it, ``segmentation``.

    Raises:
        KeyError: if an annotation has a category that the file does not list.
        ValueError: if annotation ids repeat, a box is empty, ``ignore`` is used, or a file name
            leads out of ``image_root``.
    """
    coco = read_coco(json_file)
    category_ids = sorted(coco.getCatIds())
    class_index = {category: index for index, category in enumerate(category_ids)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[coco.cats[category]["name"] for category in category_ids],
        thing_dataset_id_to_contiguous_id=class_index,
    )
    if category_ids != [*range(1, len(category_ids) + 1)] and "coco" not in dataset_name:
        logger.warning(
            "The category ids in %s are not 1, 2, ...; they are mapped to 0, 1, ... in order.",
            json_file,
        )

    image_ids = sorted(coco.imgs)
    annotations = [coco.imgToAnns[image_id] for image_id in image_ids]
    annotation_ids = [annotation["id"] for group in annotations for annotation in group]
    if len(annotation_ids) < len(coco.anns):
        logger.warning(
            "%s has %d annotations, but only %d belong to images of the file.",
            json_file,
            len(coco.anns),
            len(annotation_ids),
        )
    if len(set(annotation_ids)) < len(annotation_ids):
        raise ValueError(f"Annotation ids in {json_file} are not unique.")

    records, dropped = [], 0
    for image_id, group in zip(image_ids, annotations):
        image = coco.imgs[image_id]
        path = join_within(image_root, image["file_name"])
        if path is None:
            raise OutsideName(json_file, "image", image["file_name"], image_root)
        read = (_read_annotation(annotation, class_index, json_file) for annotation in group)
        objects = [obj for obj in read if obj is not None]
        dropped += len(group) - len(objects)
        records.append(
            {
                "file_name": path,
                "height": image["height"],
                "width": image["width"],
                "image_id": image_id,
                "annotations": objects,
            }
        )
    logger.info("Loaded %d images in COCO format from %s", len(records), json_file)
    if dropped:
        logger.warning(
            "%d annotations of %s are left out, because all their polygons have fewer than three "
            "points. Check how the file was made.",
            dropped,
            json_file,
        )
    return records


def _read_annotation(annotation: dict, class_index: dict[int, int], json_file: str) -> dict | None:
    where = f"Annotation {annotation['id']} of image {annotation['image_id']} in {json_file}"
    if annotation.get("ignore", 0) != 0:
        raise ValueError(f"{where} sets 'ignore', which is not supported. Use 'iscrowd'.")
    obj = {key: annotation[key] for key in ("iscrowd", "bbox", "category_id") if key in annotation}
    if "bbox" in obj and not obj["bbox"]:
        raise ValueError(f"{where} has an empty 'bbox'; COCO's format needs four numbers.")

    segmentation = annotation.get("segmentation")
    if segmentation:
        if not isinstance(segmentation, dict):
            segmentation = [p for p in segmentation if len(p) % 2 == 0 and len(p) >= 6]
            if not segmentation:
                return None
        elif isinstance(segmentation["counts"], list):
            segmentation = pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
        obj["segmentation"] = segmentation

    obj["bbox_mode"] = BoxMode.XYWH_ABS
    if obj["category_id"] not in class_index:
        raise KeyError(
            f"{where} has category_id={obj['category_id']}, which 'categories' does not list."
        )
    obj["category_id"] = class_index[obj["category_id"]]
    return obj


def register_coco_instances(name: str, metadata: dict, json_file: str, image_root: str) -> None:
    """Register a data set in COCO's instance format; its file is read when it is first needed.

    Args:
        metadata: more metadata of the data set, may be empty.
    """
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def convert_to_coco_json(dataset_name: str, output_file: str) -> None:
    """Write a registered data set as a JSON file in COCO's format, boxes only.

    Areas are those of the boxes. An existing file is used as it is, with a warning.

    Raises:
        ValueError: if annotations have segmentations, whose areas would decide what is small.
    """
    if PathManager.exists(output_file):
        logger.warning(
            "Using the annotations cached in %s. Delete it if the data set has changed.",
            output_file,
        )
        return
    metadata = MetadataCatalog.get(dataset_name)
    class_index = metadata.get("thing_dataset_id_to_contiguous_id")
    category_ids = {index: category for category, index in (class_index or {}).items()}
    images: list[dict] = []
    annotations: list[dict] = []
    for position, record in enumerate(DatasetCatalog.get(dataset_name)):
        image_id = record.get("image_id", position)
        images.append(
            {
                "id": image_id,
                "width": int(record["width"]),
                "height": int(record["height"]),
                "file_name": str(record["file_name"]),
            }
        )
        for annotation in record.get("annotations", []):
            if "segmentation" in annotation:
                raise ValueError(
                    f"Dataset {dataset_name!r} has segmentations; only boxes can be converted to "
                    "COCO's format. Register it by a JSON file with register_coco_instances()."
                )
            box = [float(number) for number in annotation["bbox"]]
            box = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYWH_ABS)
            corners = BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            index = annotation["category_id"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "bbox": [round(number, 3) for number in box],
                    "area": Boxes([corners]).area().item(),
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                    "category_id": int(category_ids[index] if category_ids else index),
                }
            )
    categories = [
        {"id": category_ids[index] if category_ids else index, "name": name}
        for index, name in enumerate(metadata.thing_classes)
    ]
    content = {"info": {}, "images": images, "categories": categories}
    if annotations:
        content["annotations"] = annotations
    PathManager.mkdirs(os.path.dirname(output_file) or os.curdir)
    write_text(output_file, json.dumps(content))
    logger.info("Converted dataset %s to COCO format in %s", dataset_name, output_file)


def register_coco_2017(root: str) -> None:
    """Register COCO 2017 below a folder that has detectron2's layout (``coco/train2017``, ...)."""
    category_ids = [number for number in range(1, 91) if number not in _UNUSED_IDS]
    metadata = {
        "thing_classes": _CLASSES.replace("\n", " ").split(", "),
        "thing_dataset_id_to_contiguous_id": {c: index for index, c in enumerate(category_ids)},
    }
    for name, (image_root, json_file) in _COCO_2017.items():
        register_coco_instances(
            name, metadata, os.path.join(root, json_file), os.path.join(root, image_root)
        )


register_coco_2017(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))
