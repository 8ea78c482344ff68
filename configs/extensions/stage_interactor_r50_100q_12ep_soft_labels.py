"""Labels across stages that count by their IoU, in place of a cut at 0.5."""

from stage_interactor.modeling.extensions.iou_aware import IoUAssigner, IoUAwareCriterion

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion._target_ = IoUAwareCriterion
model.criterion.class_loss = "focal"
model.criterion.assigner._target_ = IoUAssigner
model.criterion.assigner.temperature = 0.1  # in IoU; near 0 it is the paper's cut
train.output_dir = "./output/extensions/soft_labels"
