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
from collections.abc import Mapping

import torch
from torch import Tensor

from stage_interactor.config import (
    instantiate,
    load_config,
    without_pretrained_weights,
)
from stage_interactor.engine import CheckpointError, save_atomically
from stage_interactor.errors import call
from stage_interactor.inference import released
from stage_interactor.inference.weights import choose_weights, read_checkpoint
from stage_interactor.untrusted.tensors import load_tensors

MISFIT = (
    "does not fit the config. Check model.num_classes, model.queries.num_queries and the sizes of "
    "model.decoder, and that StageInteractor's released checkpoints get a config of "
    "configs/released/ (model.decoder.variant=release)."
)


def load_state(path: str, to_released: bool, averaged: bool | None = None) -> dict[str, Tensor]:
    """The state dict in a file of the expected kind. No code in the file is run.

    Of a checkpoint of this project the averages, where it has them; the trained weights if
    ``averaged`` is False.

    Raises:
        CheckpointError: if it is another kind of file, or holds NaN or infinite values.
    """
    try:
        loaded = load_tensors(path)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    kinds = {
        False: ("state_dict", "roi_head.bbox_head.", "a released checkpoint"),
        True: ("model", "decoder.stages.", "a checkpoint of this project"),
    }
    for wanted, (section, prefix, kind) in kinds.items():
        state = loaded.get(section, loaded)
        if isinstance(state, Mapping) and any(str(key).startswith(prefix) for key in state):
            if wanted == to_released:
                if to_released:
                    return choose_weights(read_checkpoint(path), path, averaged)
                return {key: value for key, value in state.items() if isinstance(value, Tensor)}
            flag = "without" if to_released else "with"
            raise CheckpointError(f"{path} is {kind} already: convert it {flag} --to-released")
    raise CheckpointError(
        f"{path} is neither a released StageInteractor or AdaMixer checkpoint (keys such as "
        "roi_head.bbox_head.0...) nor one of this project (decoder.stages.0...); its first keys "
        f"are {[str(key) for key in loaded][:5]}"
    )


def check_shapes(state: Mapping[str, Tensor], model: torch.nn.Module, path: str) -> None:
    differing = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in model.state_dict().items()
        if key in state and state[key].shape != value.shape
    ]
    if differing:
        shown = "\n  ".join(differing[:3])
        raise CheckpointError(
            f"{path} {MISFIT}\n{len(differing)} tensors differ in shape, such as\n  {shown}"
        )


def convert(
    path: str, out: str, model: torch.nn.Module, to_released: bool, averaged: bool | None = None
) -> None:
    """Converts the file and says what became of every key."""
    with torch.device("cpu"):
        sources = released.model_sources(model)
    state = load_state(path, to_released, averaged)
    try:
        if to_released:
            unknown = [key for key in state if key not in sources]
            check_shapes(state, model, path)
            converted = released.to_released(state, sources)
        else:
            unknown = released.unused_keys(state, sources)
            converted = released.from_released(state, sources)
            check_shapes(converted, model, path)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]}") from error
    except IndexError as error:  # a layer with fewer outputs than the model takes rows of
        raise CheckpointError(f"{path} {MISFIT}") from error
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} keys have no place in this model, such as "
            f"{unknown[:3]}; is it the right config?"
        )
    save_atomically({"state_dict" if to_released else "model": converted}, out)
    print(f"{len(state)} tensors of {path} became {len(converted)} of {out}")
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
