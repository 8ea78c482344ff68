"""R50, 300 queries, 12 epochs, shorter side 480 to 800."""

from .stage_interactor_r50_100q_12ep_ms import dataloader, lr_multiplier, model, optimizer, train

model.queries.num_queries = 300
train.output_dir = "./output/stage_interactor_r50_300q_12ep_ms"
