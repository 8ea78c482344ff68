"""Your data with the paper's best ResNet-50: 300 queries, multi-scale and crop."""

from ..common.coco_data import MULTI_SCALE, crop_augmentation
from ..custom_data import data, dataloader, lr_multiplier, model, optimizer, train

# Scaled to data and memory by `stage-interactor train`.
preset = dict(epochs=36, min_images=160000, gib=2.5, gib_per_image=2.8)

model.queries.num_queries = 300
dataloader.train.mapper.augmentation[1].short_edge_length = MULTI_SCALE
dataloader.train.mapper.augmentation_with_crop = crop_augmentation()
train.amp.enabled = "auto"
