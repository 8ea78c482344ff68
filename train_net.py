#!/usr/bin/env python
"""Trains and evaluates StageInteractor: detectron2's flags and flow.

python train_net.py --config-file configs/quickstart.py
python train_net.py --config-file ... --num-gpus 8 [--resume] [key=value ...]
python train_net.py --config-file ... --eval-only train.init_checkpoint=model.pth
torchrun --nproc-per-node 8 train_net.py --config-file ...
"""

from stage_interactor.commands import begin_program

if __name__ == "__main__":
    begin_program()
    from stage_interactor.commands.train import train_net

    train_net()
