"""Your data, for a CPU or a quick look: a small network from scratch, images of 256 pixels."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.engine import warmup_cosine

from ..custom_data import data, dataloader, model, optimizer, train

# Scaled to data and memory by `stage-interactor train`.
preset = dict(epochs=36, min_images=16000, gib=0.3, gib_per_image=0.17)

model.backbone.update(
    name="resnet10t", pretrained=False, freeze_norm=False, frozen_stages=0, channels_last=True
)
model.queries.num_queries = 60
model.decoder.update(
    embed_dim=64,
    feedforward_dim=256,
    num_points=(32, 16, 16, 16),
    out_points=32,
    level_shift=2.0,  # at 256 pixels objects are small: look one level finer
)
dataloader.train.mapper.augmentation[1].short_edge_length = (224, 240, 256, 272, 288)
dataloader.test.mapper.augmentation[0].short_edge_length = (256,)
dataloader.train.total_batch_size = 8

optimizer.lr = 5e-4
lr_multiplier = L(warmup_cosine)(final=0.0, warmup_iters=50, max_iter="${train.max_iter}")
train.model_ema.update(enabled=True, decay=0.99)
train.amp.enabled = "auto"
