"""Labels of other stages that come in over the first half of the training."""

from stage_interactor.modeling.extensions.scheduled_scope import ScheduledAssigner

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.assigner._target_ = ScheduledAssigner
model.criterion.assigner.update(start=0.0, end=0.5, max_iter="${train.max_iter}")
train.output_dir = "./output/extensions/scheduled_scope"
