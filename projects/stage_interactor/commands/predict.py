"""``stage-interactor predict``: annotated pictures and videos, COCO JSON and CSV of detections."""

import argparse
import io
import os
import sys

from ..errors import legible
from ..inference.detector import Detector
from ..inference.predict import predict_files
from ..inference.prepare import AUTO, DTYPES
from . import add_checkpoint, add_max_pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds objects in images and videos: annotated copies of them, "
        "predictions.json (COCO) and predictions.csv in the output folder. Files that cannot be "
        "read, or whose detections are NaN, are named and skipped; then the exit status is 1."
    )
    add_checkpoint(parser, ".pth, .safetensors or .onnx; .pt2 with --trust")
    parser.add_argument(
        "--trust", action="store_true", help="whoever wrote a .pt2 file, which can run anything"
    )
    parser.add_argument(
        "source", nargs="+",
        help="image, video, folder (and those in it), glob in quotes, or - for a list of such, one "
        "a line, from stdin",
    )  # fmt: skip
    parser.add_argument("--output-dir", default="output/predict")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score (%(default)s)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="these only")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--no-pictures", action="store_true", help="predictions only")
    add_max_pixels(parser)
    parser.add_argument("--device", help="such as cpu or cuda:1 (a GPU, if there is one)")
    parser.add_argument(
        "--dtype", choices=[*DTYPES, AUTO], default="float32",
        help="float32 (default), or auto: bfloat16 where that is faster",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    places: list[str] = []
    if isinstance(sys.stdin, io.TextIOWrapper):  # names of files need not be text
        sys.stdin.reconfigure(errors="surrogateescape")
    for source in args.source:
        lines = (line.strip() for line in sys.stdin) if source == "-" else (source,)
        places += filter(None, lines)
    detector = Detector.from_checkpoint(
        args.checkpoint,
        config_file=args.config_file,
        averaged=args.averaged,
        device=args.device,
        dtype=args.dtype,
        trusted=args.trust,
    )
    results = predict_files(
        detector,
        places,
        threshold=args.threshold,
        classes=args.classes,
        batch_size=args.batch_size,
        output_dir=args.output_dir,
        pictures=not args.no_pictures,
    )
    path = os.path.join(args.output_dir, "predictions.json")
    print(
        f"{results.num_objects} objects in {len(results)} pictures with a score of at "
        f"least {args.threshold:g}; see {path} and .csv"
        + ("" if args.no_pictures else ", and the annotated copies beside them")
    )
    if results.passed_over:
        counts = results.passed_over.most_common()
        told = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in counts)
        print(
            f"{results.passed_over.total()} files in the folders are passed over, as no images or "
            f"videos by their suffixes: {told}"
        )
    if results.unreadable:
        told = (
            f"{len(results.unreadable)} of {results.num_files} files could not be read or judged:"
        )
        for line in (told, *results.unreadable):
            print(line if line is told else f"  {legible(line)}")
    return 1 if results.unreadable else 0
