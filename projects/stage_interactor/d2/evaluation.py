"""Inference over a data set, and the average precision of detections: COCO's, VOC's, LVIS's."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.evaluation import *
else:
    from detectron2.evaluation import (
        DatasetEvaluator,
        inference_on_dataset,
        print_csv_format,
    )

from .metrics import LVISEvaluator, PascalVOCDetectionEvaluator
from .screening import COCOEvaluator
