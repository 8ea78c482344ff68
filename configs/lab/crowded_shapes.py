"""The laboratory's benchmark: crowds of small, overlapping shapes, six stages of small width.

A run takes minutes on one CPU core, so that many can be had. The model has all that the paper's
has.
"""

from ..quickstart import dataloader, lr_multiplier, model, optimizer, shapes, train

shapes.update(
    root="./datasets/crowded_shapes",
    image_size=96,
    min_objects=5,
    max_objects=12,
    min_size=12.0,
    max_size=40.0,
)
dataloader.train.total_batch_size = 8

model.backbone.update(stem_width=8, channels=(16, 32, 64, 128))
model.neck.in_channels = (16, 32, 64)
model.queries.num_queries = 30
model.decoder.update(
    embed_dim=32,
    feedforward_dim=128,
    num_points=(16, 8, 8, 8, 8, 8),
    out_points=16,
)

train.output_dir = "./output/crowded_shapes"
train.amp.enabled = False  # "auto" is another arithmetic on another processor
train.max_iter = 1000
train.eval_period = 0
train.checkpointer.period = 1000
