"""AdaMixer, R101, 300 queries, 36 epochs, multi-scale and crop."""

from .models.adamixer_r101 import model
from .stage_interactor_r50_300q_36ep_crop import dataloader, lr_multiplier, optimizer, train

model.queries.num_queries = 300
train.output_dir = "./output/adamixer_r101_300q_36ep_crop"
