"""The 12-epoch run with a sampler of one's own: how to put a part of yours into a stage.

Any importable class can be named so. Training, ``--resume`` and ``--eval-only`` take this file as
any other; ``predict`` needs it as well (``--config-file``), since a checkpoint alone builds nothing
but the project's own parts. A saved ``config_resolved.yaml`` finds the class on Python's path:
``PYTHONPATH=configs/own_parts``, or where you have installed yours.
"""

import sys
from pathlib import Path

from stage_interactor.d2.config import LazyCall as L

from ..stage_interactor_r50_100q_12ep import dataloader, lr_multiplier, model, optimizer, train

sys.path.append(str(Path(__file__).resolve().parent))  # not for a module that is installed
from grid_sampler import GridSampler  # noqa: E402

model.decoder.parts.sampler = L(GridSampler)(extent=1.0)
train.output_dir = "./output/own_parts/grid_sampler"
