"""``stage-interactor export``: a trained detector as one file for other programs."""

import argparse
import os

from ..inference.export import SUFFIXES, export_checkpoint
from . import add_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a detector as one file, and a model card beside it. What was written "
        "is run and compared with PyTorch."
    )
    add_checkpoint(parser, ".pth or .safetensors")
    parser.add_argument("--format", choices=list(SUFFIXES), default="onnx")
    parser.add_argument("--output", help="file to write (beside the checkpoint)")


def run(args: argparse.Namespace) -> int:
    print(f"Writing {args.format} (a minute or so) ...", flush=True)
    written = export_checkpoint(
        args.checkpoint,
        args.format,
        args.output,
        config_file=args.config_file,
        averaged=args.averaged,
    )
    if written.box_difference is not None:
        print(
            f"Against PyTorch: boxes differ by {written.box_difference:.1e} pixels at most, scores "
            f"by {written.score_difference:.1e}"
        )
    told = f"Wrote {written.path} ({os.path.getsize(written.path) / 2**20:.0f} MiB)"
    card = os.path.splitext(written.path)[0] + ".md"
    if written.card is None:
        print(f"{told}; {card} is there already and stays as it is")
    else:
        print(f"{told} and {written.card}")
    return 0
