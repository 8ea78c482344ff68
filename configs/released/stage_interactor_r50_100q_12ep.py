"""The released checkpoint of this run: the same, in the release's variant."""

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.variant = "release"
train.output_dir = "./output/released_r50_100q_12ep"
