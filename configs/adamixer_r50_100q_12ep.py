"""The AdaMixer baseline: R50, 100 queries, 12 epochs, shorter side 800."""

from .models.adamixer_r50 import model
from .stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, optimizer, train

train.output_dir = "./output/adamixer_r50_100q_12ep"
