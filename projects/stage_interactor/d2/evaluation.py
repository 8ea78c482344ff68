"""Inference over a data set and COCO average precision."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.evaluation import (
        COCOEvaluator,
        DatasetEvaluator,
        inference_on_dataset,
        print_csv_format,
    )
else:
    from .embedded.evaluation import (
        COCOEvaluator,
        DatasetEvaluator,
        inference_on_dataset,
        print_csv_format,
    )

__all__ = [
    "COCOEvaluator",
    "DatasetEvaluator",
    "inference_on_dataset",
    "print_csv_format",
]
