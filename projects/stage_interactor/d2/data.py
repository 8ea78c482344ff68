"""Dataset catalogues, annotations and data loaders."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.data import (
        DatasetCatalog,
        MetadataCatalog,
        build_detection_test_loader,
        build_detection_train_loader,
        detection_utils,
        get_detection_dataset_dicts,
    )
    from detectron2.data.datasets import register_coco_instances
else:
    from .embedded.data import (
        DatasetCatalog,
        MetadataCatalog,
        build_detection_test_loader,
        build_detection_train_loader,
        detection_utils,
        get_detection_dataset_dicts,
        register_coco_instances,
    )

__all__ = [
    "DatasetCatalog",
    "MetadataCatalog",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "detection_utils",
    "get_detection_dataset_dicts",
    "register_coco_instances",
]
