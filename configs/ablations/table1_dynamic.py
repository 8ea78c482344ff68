"""Table 1, row 3, and Table 2, row 1: reused filters alone (43.9 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.static_mixing = "none"
train.output_dir = "./output/ablations/table1_dynamic"
