"""``stage-interactor replay``: the batch of an iteration once more."""

import argparse
import logging
import os

from tabulate import tabulate

from ..engine.replay import replay
from ..pages.replay import image_rows, stage_rows, told_of_losses, write_replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Builds the batch of any iteration of a run again, as it was augmented, with the losses of "
        "each image and what became of its objects' labels: what was in it when the loss jumped. "
        "The run's config is called, as in training: of runs that you trust."
    )
    parser.add_argument("run_dir", help="the folder of the run")
    parser.add_argument("--iteration", type=int, required=True, metavar="N", help="from 0")
    parser.add_argument(
        "--checkpoint",
        help="whose weights (the run's last one before the iteration: its losses are the run's "
        "where it was written just before)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (the run's)")
    parser.add_argument("--output", help="page to write (replay_N.html in the folder of the run)")
    parser.add_argument(
        "words", nargs="*", metavar="key=value", help="config overrides, of data that have moved"
    )


def run(args: argparse.Namespace) -> int:
    logging.getLogger("stage_interactor").setLevel(logging.WARNING)
    found = replay(
        args.run_dir, args.iteration, args.words, checkpoint=args.checkpoint, device=args.device
    )
    path = args.output or os.path.join(args.run_dir, f"replay_{args.iteration:07d}.html")
    name = os.path.basename(os.path.abspath(args.run_dir))
    write_replay(path, found, f"Iteration {args.iteration} of {name}")
    for rows in (image_rows(found), stage_rows(found)):
        if len(rows) > 1:
            print(tabulate(rows, headers="firstrow", tablefmt="github", disable_numparse=True))
            print()
    print(f"total loss {found.total_loss:.6g}. {told_of_losses(found)}")
    print(f"Wrote {path}: open it in a browser")
    return 0
