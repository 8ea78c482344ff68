"""Labels gathered from the scope [i]: the matches of the stage itself."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.assigner.scope = ("i",)
train.output_dir = "./output/ablations/scope_i"
