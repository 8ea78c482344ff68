"""R50, 100 queries, 12 epochs, shorter side 800 (supplement, Table 1 to 5: 44.8 AP)."""

from .common.coco_data import dataloader
from .common.optim import optimizer
from .common.schedule import ITERATIONS_PER_EPOCH
from .common.schedule import lr_multiplier_1x as lr_multiplier
from .common.train import train
from .models.stage_interactor_r50 import model

train.max_iter = 12 * ITERATIONS_PER_EPOCH
train.output_dir = "./output/stage_interactor_r50_100q_12ep"
