"""Table 5: NMS at IoU 0.75, an option of evaluation alone (44.8 AP)."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.nms_threshold = 0.75
train.output_dir = "./output/ablations/table5_nms_75"
