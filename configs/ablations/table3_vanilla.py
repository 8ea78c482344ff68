"""Table 3, row 1: AdaMixer's sampler (43.7 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.sampler = "vanilla"
train.output_dir = "./output/ablations/table3_vanilla"
