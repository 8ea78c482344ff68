"""Table 1, row 2: static mixing alone (43.5 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.dynamic_reuse = False
train.output_dir = "./output/ablations/table1_static"
