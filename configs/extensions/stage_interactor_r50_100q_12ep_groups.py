"""Group DETR: in training several groups of queries, of which the first detects."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling.extensions.query_groups import (
    GroupedCriterion,
    GroupedDecoder,
    GroupedQueries,
)

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.queries._target_ = GroupedQueries
model.queries.num_groups = 3  # 11 in Group DETR; a training step costs as many times the decoder
model.decoder.parts.cascade = L(GroupedDecoder)(num_groups="${model.queries.num_groups}")
model.criterion._target_ = GroupedCriterion
model.criterion.num_groups = "${model.queries.num_groups}"
train.output_dir = "./output/extensions/groups"
