#!/usr/bin/env python
"""Converts the authors' released checkpoints to this project's, and back.

python tools/convert_checkpoint.py released.pth out.pth \
    --config-file configs/released/stage_interactor_r50_100q_12ep.py
python tools/convert_checkpoint.py model_final.pth released.pth --to-released --config-file ...

StageInteractor's need a config of configs/released/, AdaMixer's the run configs adamixer_*.py.
"""

import argparse
import logging
import sys

import torch

from stage_interactor.config import (
    instantiate,
    load_config,
    without_pretrained_weights,
)
from stage_interactor.engine import save_atomically
from stage_interactor.errors import call
from stage_interactor.inference import released
from stage_interactor.inference.conversion import converted, load_state


def convert(
    path: str, out: str, model: torch.nn.Module, to_released: bool, averaged: bool | None = None
) -> None:
    """Converts the file and says what became of every key."""
    state = load_state(path, to_released, averaged)
    found = converted(state, model, path, to_released=to_released)
    save_atomically({"state_dict" if to_released else "model": found}, out)
    print(f"{len(state)} tensors of {path} became {len(found)} of {out}")
    for part, reason in released.DROPPED.items():
        dropped = [key for key in state if part in key]
        if to_released:
            print(f"  not in {out}, and not needed by the release: {part}: {reason}")
        elif dropped:
            print(f"  left out: {len(dropped)} x {part}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--to-released", action="store_true", help="from this project's format")
    parser.add_argument(
        "--trained-weights",
        dest="averaged",
        action="store_const",
        const=False,
        help="with --to-released: not their averages, which are taken where there are any",
    )
    parser.add_argument("opts", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cfg = load_config(args.config_file, args.opts)
    without_pretrained_weights(cfg)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    convert(args.input, args.output, model, args.to_released, args.averaged)


if __name__ == "__main__":
    sys.exit(call("convert_checkpoint.py", main, mistake=1))
