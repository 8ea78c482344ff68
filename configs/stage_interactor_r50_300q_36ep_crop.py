"""R50, 300 queries, 36 epochs, multi-scale and crop (supplement, Table 6: 49.0 AP on test-dev)."""

from .common.coco_data import MULTI_SCALE, crop_augmentation
from .common.schedule import ITERATIONS_PER_EPOCH
from .common.schedule import lr_multiplier_3x as lr_multiplier
from .stage_interactor_r50_100q_12ep import dataloader, model, optimizer, train

model.queries.num_queries = 300
dataloader.train.mapper.augmentation[1].short_edge_length = MULTI_SCALE
dataloader.train.mapper.augmentation_with_crop = crop_augmentation()
train.max_iter = 36 * ITERATIONS_PER_EPOCH
train.output_dir = "./output/stage_interactor_r50_300q_36ep_crop"
