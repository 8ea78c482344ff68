"""The 12-epoch run with a sampler of one's own; any class that can be imported is named so.

To ``predict``, name this file too (``--config-file``): a checkpoint alone builds only the project's
own parts. A run's saved config needs the class on the path: PYTHONPATH=configs/own_parts.
"""

import sys
from pathlib import Path

from stage_interactor.d2.config import LazyCall as L

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

sys.path.append(str(Path(__file__).resolve().parent))  # not for a module that is installed
from grid_sampler import GridSampler  # noqa: E402

model.decoder.parts.sampler = L(GridSampler)(extent=1.0)
train.output_dir = "./output/own_parts/grid_sampler"
