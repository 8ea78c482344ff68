"""AdaMixer with ResNet-50, the baseline: the same cascade without cross-stage interaction."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling import OneToOneAssigner

from .stage_interactor_r50 import model

model.decoder.update(
    num_points=(32, 32, 32, 32, 32, 32),
    sampler="vanilla",
    initial_dz=-1.0,
    level_shift=0.0,
    first_reusing_stage=None,
    mixing_bias=False,
    zero_mixing_output=False,
    refinement="scale",
)
model.criterion.assigner = L(OneToOneAssigner)()
