"""Table 3, row 2: AdaMixer's sampler, started in groups (44.1 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.sampler = "group_init"
train.output_dir = "./output/ablations/table3_group_init"
