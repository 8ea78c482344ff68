"""Table 4, row 2: the baseline, 64 sampling points on the first stage (42.6 AP)."""

from ..adamixer_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.num_points = (64, 32, 32, 32, 32, 32)
train.output_dir = "./output/ablations/table4_baseline_64_points"
