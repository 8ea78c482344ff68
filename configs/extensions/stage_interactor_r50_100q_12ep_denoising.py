"""DN-DETR: noised objects as further queries in training, each to find what it was made of."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling.extensions.denoising import (
    Denoising,
    DenoisingStageInteractor,
    MaskedOverlapAttention,
)

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model._target_ = DenoisingStageInteractor
model.denoising = L(Denoising)(
    num_classes="${..num_classes}",
    embed_dim="${..decoder.embed_dim}",
    num_groups=5,
    max_queries=1000,
    label_noise=0.2,
    box_noise=0.4,
)
model.decoder.parts.attention = L(MaskedOverlapAttention)()
train.output_dir = "./output/extensions/denoising"
