"""Table 4, row 3: 32 sampling points on the first stage too (44.6 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.num_points = (32, 32, 32, 32, 32, 32)
train.output_dir = "./output/ablations/table4_32_points"
