"""LVIS v1: the paper's model with 300 queries for 12 epochs of its 100,170 training images.

Files lie where detectron2 looks for them, below the folder that DETECTRON2_DATASETS names:
``lvis/lvis_v1_{train,val}.json`` and COCO's pictures, ``coco/{train,val}2017``. Images with a class
in fewer than a thousandth of them come more often, as LVIS's authors have it.
"""

import os

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.evaluation import LVISEvaluator

from .stage_interactor_r50_300q_12ep_ms import dataloader, lr_multiplier, model, optimizer, train

_root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
for _split, _loader in (("train", dataloader.train), ("val", dataloader.test)):
    _loader.dataset.update(
        name=f"lvis_v1_{_split}",
        json_file=os.path.join(_root, "lvis", f"lvis_v1_{_split}.json"),
        image_root=os.path.join(_root, "coco"),
    )
dataloader.train.repeat_threshold = 0.001
dataloader.evaluator = L(LVISEvaluator)(
    dataset_name="${..test.dataset.name}",
    output_dir="${train.output_dir}",
    max_dets_per_image=300,
)
model.num_classes = 1203
model.max_detections = 300
train.max_iter = 12 * 6261  # of 16 images
train.output_dir = "./output/stage_interactor_r50_300q_12ep_ms_lvis"
