"""Labels at IoU 0.3 instead of 0.5."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.assigner.iou_threshold = 0.3
train.output_dir = "./output/ablations/threshold_30"
