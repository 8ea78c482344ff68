"""The quick start: generated images, a small model, minutes on two CPU cores.

Every part of StageInteractor is on: reuse of filters, static mixing, labels across stages.
"""

from stage_interactor.d2 import transforms as T
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.data import load_shapes
from stage_interactor.engine import warmup_cosine

from .stage_interactor_r50_100q_12ep import dataloader, model, optimizer, train

shapes = dict(
    root="./datasets/shapes",
    num_train=4000,
    num_val=300,
    image_size=128,
    min_objects=1,
    max_objects=6,
    seed=0,
)

for _split, _loader in (("train", dataloader.train), ("val", dataloader.test)):
    _loader.dataset = L(load_shapes)(split=_split, name=f"shapes_{_split}")
    _loader.dataset.update({key: "${shapes." + key + "}" for key in shapes})
    _loader.num_workers = 0
dataloader.train.mapper.augmentation = [
    L(T.RandomFlip)(),
    L(T.RandomFlip)(horizontal=False, vertical=True),
]
dataloader.train.total_batch_size = 16
dataloader.test.mapper.augmentation = []
dataloader.test.batch_size = 16

model.num_classes = 5
# A ResNet of ten layers and half the width, without its last stage: 128 pixels need no stride 32.
model.backbone.update(
    name="resnet10t",
    channels=(32, 64, 128, 256),
    stem_width=16,
    strides=(4, 8, 16),
    pretrained=False,
    freeze_norm=False,
    frozen_stages=0,
    channels_last=True,
)
model.neck.in_channels = (32, 64, 128)
model.queries.num_queries = 20
model.decoder.update(
    embed_dim=64,
    feedforward_dim=256,
    num_points=(32, 16, 16),
    out_points=32,
    strides=(4, 8, 16),
    level_shift=2.0,  # objects are small: look one level finer
)

optimizer.lr = 5e-4
lr_multiplier = L(warmup_cosine)(final=0.0, warmup_iters=50, max_iter="${train.max_iter}")

train.output_dir = "./output/quickstart"
train.amp.enabled = "auto"
train.max_iter = 2000
train.eval_period = 1000
train.checkpointer.period = 500
train.model_ema.update(enabled=True, decay=0.99)
