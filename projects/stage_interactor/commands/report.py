"""``stage-interactor report``: one page that tells how a run went."""

import argparse
import os

from ..inference.thresholds import save_thresholds
from ..pages.comparison import write_comparison
from ..pages.report import write_report

COMPARISON = "output/comparison.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes one self-contained HTML page about a run: curves, AP by class and "
        "size, precision and recall, confusions, pictures of what went well and what did not. Of "
        "several runs: their curves, AP and configs beside each other, and where they differ."
    )
    parser.add_argument(
        "output_dir", nargs="+", help="of the run; several are compared on one page"
    )
    parser.add_argument(
        "--output",
        help="file to write (report.html in the folder of the run; output/comparison.html of "
        "several)",
    )
    parser.add_argument(
        "--threshold", type=float,
        help="least score of the detections in pictures and confusion matrix (that which the page "
        "chooses for each class)",
    )  # fmt: skip
    parser.add_argument("--pictures", type=int, default=6, help="of each kind (%(default)s)")
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="the data of this run have names that lead out of their folder, which are right",
    )
    parser.add_argument(
        "--save-thresholds", metavar="CHECKPOINT",
        help="write the thresholds into it (.pth or .safetensors), which was evaluated here: "
        "predict takes them; checkpoints of a training have theirs already",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    options = {
        "threshold": args.threshold,
        "num_pictures": args.pictures,
        "allow_outside": args.allow_outside,
    }
    if len(args.output_dir) > 1:
        if args.save_thresholds is not None:
            raise ValueError("--save-thresholds: of one run, not of several")
        path = write_comparison(args.output_dir, args.output or COMPARISON, **options)
    else:
        path = write_report(args.output_dir[0], args.output, **options)
    print(f"Wrote {path} ({os.path.getsize(path) / 2**20:.1f} MiB): open it in a browser")
    if args.save_thresholds is not None:
        chosen = save_thresholds(
            args.output_dir[0], args.save_thresholds, allow_outside=args.allow_outside
        )
        print(f"Wrote thresholds into {args.save_thresholds}: {chosen.told()}")
    return 0
