"""The paper's schedules: x0.1 at two epochs, 500 iterations of warm-up."""

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.engine import warmup_multistep

ITERATIONS_PER_EPOCH = 7330  # 117,266 images of COCO train2017 with objects, 16 at a time


def multistep(num_epochs, milestones, warmup_iters=500):
    """A schedule over ``num_epochs``; it follows ``train.max_iter`` when that is overridden."""
    return L(warmup_multistep)(
        milestones=milestones,
        num_epochs=num_epochs,
        warmup_iters=warmup_iters,
        max_iter="${train.max_iter}",
    )


lr_multiplier_1x = multistep(12, (8, 11))
lr_multiplier_2x = multistep(24, (16, 22))
lr_multiplier_3x = multistep(36, (24, 33))
lr_multiplier_3x_no_crop = multistep(36, (27, 33))
