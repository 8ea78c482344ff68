"""``stage-interactor export``: a trained detector as one file for other programs."""

import argparse
import os

from ..engine.judge import Judge
from ..inference.export import PRECISIONS, SUFFIXES, export_checkpoint
from . import add_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a detector as one file, and a model card beside it. What was written "
        "is run and compared with PyTorch; with --data by its AP."
    )
    add_checkpoint(parser, ".pth or .safetensors")
    parser.add_argument("--format", choices=list(SUFFIXES), default="onnx")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32",
        help="of onnx and openvino; int8 needs --data (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", help="file to write (beside the checkpoint)")
    own = parser.add_argument_group("its AP")
    own.add_argument(
        "--data", metavar="DATA",
        help="folder, or the file that describes the data: the file and PyTorch are evaluated on "
        "its part val, or else test, or a tenth of it",
    )  # fmt: skip
    own.add_argument(
        "--tolerance", type=float, metavar="AP",
        help="by which it may fall, in percent; beyond it parts stay in float32, and if that does "
        "not do the export fails (0.1, of fp16 0.5, of int8 1.5)",
    )  # fmt: skip
    own.add_argument(
        "--calibration", metavar="PICTURES",
        help="folder or glob, for int8 (part train of --data, or what is evaluated)",
    )  # fmt: skip
    own.add_argument("--images", metavar="DIR", help="the folder of the pictures of --data")
    own.add_argument(
        "--annotations", metavar="FILE_OR_DIR", help="of --data, if others are not meant"
    )


def run(args: argparse.Namespace) -> int:
    judge = None
    if args.data is not None:
        judge = Judge(
            args.data,
            calibration=args.calibration,
            images=args.images,
            annotations=args.annotations,
        )
    elif args.calibration or args.images or args.annotations:
        raise ValueError("--calibration, --images and --annotations belong to --data")
    print(f"Writing {args.format} (a minute or so) ...", flush=True)
    written = export_checkpoint(
        args.checkpoint,
        args.format,
        args.output,
        config_file=args.config_file,
        averaged=args.averaged,
        precision=args.precision,
        judge=judge,
        tolerance=args.tolerance,
    )
    if written.box_difference is not None:
        print(
            f"Against PyTorch: boxes differ by {written.box_difference:.1e} pixels at most, scores "
            f"by {written.score_difference:.1e}, in a picture of noise"
        )
    if judge is not None and written.metrics and written.expected:
        ours, theirs = (metrics["AP"] for metrics in (written.metrics, written.expected))
        print(
            f"AP {ours:.2f}, {ours - theirs:+.2f} against PyTorch's, on {len(judge)} pictures "
            f"({judge.part} of {judge.path})"
        )
    elif args.precision != "fp32":
        print("What that costs was not measured: name data with --data")
    if written.kept:
        print(f"In float32, since AP fell by more without: {', '.join(written.kept)}")
    stem = os.path.splitext(written.path)[0]
    files = [written.path, *([f"{stem}.bin"] if args.format == "openvino" else [])]
    size = sum(map(os.path.getsize, files)) / 2**20
    told = f"Wrote {' and '.join(files)} ({size:.0f} MiB)"
    card = f"{stem}.md"
    if written.card is None:
        print(f"{told}; {card} is there already and stays as it is")
    else:
        print(f"{told}, and {written.card}")
    return 0
