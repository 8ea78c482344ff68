"""Class scores that learn how well a box fits: DEIM's MAL, on cross-stage labels."""

from stage_interactor.modeling.extensions.iou_aware import IoUAssigner, IoUAwareCriterion

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion._target_ = IoUAwareCriterion
model.criterion.update(class_loss="matchability", negative_weight=1.0, gamma=1.5)
model.criterion.assigner._target_ = IoUAssigner
train.output_dir = "./output/extensions/mal"
