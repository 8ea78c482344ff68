"""The released checkpoint of this run: the same, in the release's variant."""

from ..stage_interactor_swin_s_300q_36ep_crop import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.variant = "release"
train.output_dir = "./output/released_swin_s_300q_36ep_crop"
