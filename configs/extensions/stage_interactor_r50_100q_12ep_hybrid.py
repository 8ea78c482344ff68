"""H-DETR: in training a second set of queries, which is matched with each object six times."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling.extensions.hybrid_matching import (
    HybridCriterion,
    HybridDecoder,
    HybridQueries,
)

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.queries._target_ = HybridQueries
model.queries.one_to_many_queries = 500  # five times those that detect, as in H-DETR
model.decoder.parts.cascade = L(HybridDecoder)(num_queries="${model.queries.num_queries}")
model.criterion._target_ = HybridCriterion
model.criterion.update(
    num_queries="${model.queries.num_queries}", num_copies=6, loss_one_to_many_weight=1.0
)
train.output_dir = "./output/extensions/hybrid"
