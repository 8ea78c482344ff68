"""Swin-S, 300 queries, 36 epochs, multi-scale and crop (Table 6: 52.7 AP on test-dev)."""

from .common.swin import use_swin_recipe
from .models.stage_interactor_swin_s import model
from .stage_interactor_r50_300q_36ep_crop import dataloader, lr_multiplier, optimizer, train

model.queries.num_queries = 300
use_swin_recipe(optimizer, lr_multiplier)
train.output_dir = "./output/stage_interactor_swin_s_300q_36ep_crop"
