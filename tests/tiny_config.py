"""A run of seconds, for tests of the engine: generated images of 64 pixels, a tiny model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # for checks/

from checks.small import TinyBackbone  # noqa: E402

from stage_interactor.d2.config import LazyCall as L  # noqa: E402

from ..configs.quickstart import dataloader, lr_multiplier, model, optimizer, shapes, train  # noqa: E402

shapes.update(num_train=24, num_val=8, image_size=64)
model.backbone = L(TinyBackbone)()
model.neck.update(in_channels=[8, 8, 8, 8], norm_groups=4)
model.queries.num_queries = 8
model.decoder.update(
    embed_dim=16,
    num_groups=2,
    num_heads=2,
    feedforward_dim=32,
    num_points=(8, 8, 8),
    out_points=8,
    strides=(4, 8, 16, 32),
)
dataloader.train.total_batch_size = 4
dataloader.test.batch_size = 4
train.max_iter = 12
train.checkpointer.period = 4
train.eval_period = 0
train.log_period = 1
