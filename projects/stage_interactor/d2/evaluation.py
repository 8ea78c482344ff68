"""Inference over a data set and COCO average precision, of detections that are any."""

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

from .screening import COCOEvaluator
