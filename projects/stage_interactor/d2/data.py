"""Dataset catalogues, annotations and data loaders."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.data import *
else:
    from detectron2.data import (
        DatasetCatalog,
        MetadataCatalog,
        build_detection_test_loader,
        build_detection_train_loader,
        detection_utils,
        get_detection_dataset_dicts,
    )
    from detectron2.data.datasets import register_coco_instances
