"""Labels gathered from the scope [i, L]: this stage and all later ones."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.assigner.scope = ("i", "L")
train.output_dir = "./output/ablations/scope_i_L"
