"""AdamW as in the paper's recipe (learning rate for a total batch of 16)."""

import torch

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.solver import get_default_optimizer_params

optimizer = L(torch.optim.AdamW)(
    # params.model is set to the model before the optimizer is instantiated
    params=L(get_default_optimizer_params)(base_lr="${..lr}"),
    lr=2.5e-5,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
    fused=True,  # one pass over all parameters instead of a dozen
)
