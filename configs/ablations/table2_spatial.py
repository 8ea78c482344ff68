"""Table 2, row 3: static mixing of points (43.7 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.static_mixing = "spatial"
train.output_dir = "./output/ablations/table2_spatial"
