"""Labels gathered from the scope [0, L]: all stages."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.assigner.scope = (0, "L")
train.output_dir = "./output/ablations/scope_0_L"
