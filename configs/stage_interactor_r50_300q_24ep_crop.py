"""R50, 300 queries, 24 epochs, multi-scale and crop."""

from .common.schedule import ITERATIONS_PER_EPOCH
from .common.schedule import lr_multiplier_2x as lr_multiplier
from .stage_interactor_r50_300q_36ep_crop import dataloader, model, optimizer, train

train.max_iter = 24 * ITERATIONS_PER_EPOCH
train.output_dir = "./output/stage_interactor_r50_300q_24ep_crop"
