"""Data sets in COCO format, the generated shapes, DETR's augmentation, resumable batches."""

from .coco import (
    categories_of,
    check_num_classes,
    class_names,
    count_classes,
    load_coco_dataset,
    match_classes,
    objects_of_image,
    with_classes,
)
from .images import ImageReadError, check_readable, prepare_picture, read_image, read_picture
from .loader import (
    Part,
    StreamSampler,
    TrainStream,
    batches_of,
    build_train_loader,
    check_shared_memory,
    set_start_iteration,
)
from .mapper import DetrDatasetMapper
from .shapes import generate_shapes, load_shapes

__all__ = [
    "DetrDatasetMapper",
    "ImageReadError",
    "Part",
    "StreamSampler",
    "TrainStream",
    "batches_of",
    "build_train_loader",
    "categories_of",
    "check_num_classes",
    "check_readable",
    "check_shared_memory",
    "class_names",
    "count_classes",
    "generate_shapes",
    "load_coco_dataset",
    "load_shapes",
    "match_classes",
    "objects_of_image",
    "prepare_picture",
    "read_image",
    "read_picture",
    "set_start_iteration",
    "with_classes",
]
