"""AdamW as in the paper's recipe (learning rate for a total batch of 16)."""

import torch

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.engine import parameter_groups

optimizer = L(torch.optim.AdamW)(
    # params.model is set to the model before the optimizer is instantiated
    params=L(parameter_groups)(
        base_lr="${..lr}",
        # Of each part, as a factor; of the backbone's blocks, from one to the one before it.
        lr_factors=dict(backbone=1.0, neck=1.0, queries=1.0, decoder=1.0),
        layer_decay=None,
    ),
    lr=2.5e-5,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
    fused=True,  # one pass over all parameters instead of a dozen
)
