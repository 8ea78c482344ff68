"""Gates of filter reuse that are a stage's, and not a query's."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling.extensions.layer_gates import LayerGatedMixing

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.parts.mixing = L(LayerGatedMixing)()
train.output_dir = "./output/extensions/layer_gates"
