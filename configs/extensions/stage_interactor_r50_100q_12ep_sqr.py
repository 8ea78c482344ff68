"""SQR: late stages are trained on the queries of two earlier ones; detection stays as it is."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling.extensions.recollection import (
    RecollectingCriterion,
    RecollectingDecoder,
)

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.parts.cascade = L(RecollectingDecoder)()
model.criterion._target_ = RecollectingCriterion
train.output_dir = "./output/extensions/sqr"
