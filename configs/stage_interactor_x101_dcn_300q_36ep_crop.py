"""X101-DCN, 300 queries, 36 epochs, multi-scale and crop (Table 6: 51.3 AP on test-dev)."""

from .models.stage_interactor_x101_dcn import model
from .stage_interactor_r50_300q_36ep_crop import dataloader, lr_multiplier, optimizer, train

model.queries.num_queries = 300
train.output_dir = "./output/stage_interactor_x101_dcn_300q_36ep_crop"
