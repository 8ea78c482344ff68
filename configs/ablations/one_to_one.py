"""Labels of a stage's own one-to-one matches alone, as in the baseline; the rest is the paper's."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling import OneToOneAssigner

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.criterion.assigner = L(OneToOneAssigner)()
train.output_dir = "./output/ablations/one_to_one"
