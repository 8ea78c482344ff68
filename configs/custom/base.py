"""Your data with the paper's model: ResNet-50, 100 queries, the shorter side at 800 pixels."""

from ..custom_data import data, dataloader, lr_multiplier, model, optimizer, train

# Scaled to data and memory by `stage-interactor train`.
preset = dict(epochs=12, min_images=80000, gib=2.5, gib_per_image=2.0)

train.amp.enabled = "auto"
