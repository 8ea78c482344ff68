"""Table 1, row 1: neither dynamic nor static cross-stage mixing (44.1 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.first_reusing_stage = None
train.output_dir = "./output/ablations/table1_neither"
