"""R50, 100 queries, 12 epochs, shorter side 480 to 800."""

from .common.coco_data import MULTI_SCALE
from .stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.mapper.augmentation[1].short_edge_length = MULTI_SCALE
train.output_dir = "./output/stage_interactor_r50_100q_12ep_ms"
