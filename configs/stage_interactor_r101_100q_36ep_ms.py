"""R101, 100 queries, 36 epochs, shorter side 480 to 800, no crop."""

from .models.stage_interactor_r101 import model
from .stage_interactor_r50_100q_36ep_ms import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/stage_interactor_r101_100q_36ep_ms"
