"""R50, 100 queries, 36 epochs, shorter side 480 to 800, no crop."""

from .common.schedule import ITERATIONS_PER_EPOCH
from .common.schedule import lr_multiplier_3x_no_crop as lr_multiplier
from .stage_interactor_r50_100q_12ep_ms import dataloader, model, optimizer, train

train.max_iter = 36 * ITERATIONS_PER_EPOCH
train.output_dir = "./output/stage_interactor_r50_100q_36ep_ms"
