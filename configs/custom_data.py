"""Any data set in COCO format, by overrides alone:

    python train_net.py --config-file configs/custom_data.py data.train_json=train.json \
        data.val_json=val.json data.image_root=images

Classes are read from the training JSON. The evaluated JSON is ``data.val_json``.
"""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.data import count_classes

from .stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

data = dict(
    name="custom",
    train_json="",
    val_json="",
    image_root="",
    val_image_root="${.image_root}",
    background="keep",  # images without objects: keep, drop, or their largest share of all
    augmentation=None,  # none, light or strong; null: the lists of the config as they are
    flip=None,  # none, horizontal, vertical or both; null: as in those lists, horizontal
    closing=0.15,  # of strong: the share of the training, at its end, that is light
)
model.num_classes = L(count_classes)(json_file="${data.train_json}")
for _split, _loader, _root in (
    ("train", dataloader.train, "image_root"),
    ("val", dataloader.test, "val_image_root"),
):
    _loader.dataset.name = "${data.name}_" + _split
    _loader.dataset.json_file = "${data." + _split + "_json}"
    _loader.dataset.image_root = "${data." + _root + "}"
dataloader.train.dataset.background = "${data.background}"
dataloader.train.update(closing="${data.closing}", max_iter="${train.max_iter}")
dataloader.train.mapper.update(
    policy="${data.augmentation}",
    flip="${data.flip}",
    plain="${dataloader.test.mapper.augmentation}",
)
dataloader.evaluator.max_dets_per_image = 100
train.validation_loss = True
train.output_dir = "./output/${data.name}"
