"""DEQDet: a first stage, and one with shared weights that is applied until the queries settle."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling.extensions.fixed_point import FixedPointDecoder

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.update(num_points=(64, 64), first_reusing_stage=1)
model.decoder.parts.cascade = L(FixedPointDecoder)(
    steps=20,
    supervised=(1, 3, 6, 9, 12, 20),
    unrolled=2,
    noise_probability=0.2,
    content_noise=0.1,
    box_noise=1 / 32,
)
# As in DEQDet, whose decoder has ten times the weight decay too.
optimizer.params.lr_factors.decoder = 4.0
train.output_dir = "./output/extensions/fixed_point"
