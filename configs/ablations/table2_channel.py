"""Table 2, row 2: static mixing of channels (44.0 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.static_mixing = "channel"
train.output_dir = "./output/ablations/table2_channel"
