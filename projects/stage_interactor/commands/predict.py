"""``stage-interactor predict``: annotated pictures and videos, COCO JSON and CSV of detections.

Of files, or of a camera or a stream of the network.
"""

import argparse
import io
import os
import sys
from typing import Any

from ..errors import legible
from ..inference.detector import Detector
from ..inference.jobs.batch_job import PART_SIZE, BatchResults, batch_predict
from ..inference.jobs.part_files import FORMATS
from ..inference.live import LiveResult, predict_live
from ..inference.live_addresses import live_address
from ..inference.predict import predict_files
from ..inference.prepare import AUTO, DTYPES
from ..inference.results import Results
from ..inference.streams import RECONNECT, TIMEOUT
from . import add_detector, add_max_pixels, detector_options

_MOST_UNREADABLE = 20  # of a job, whose rows tell all of them
_MOST_NAMES = 8  # of classes, in a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds objects in images and videos: annotated copies of them, "
        "predictions.json (COCO) and predictions.csv in the output folder. Files that cannot be "
        "read, or whose detections are NaN, are named and skipped; then the exit status is 1. A "
        "live source goes on until Ctrl-C, --seconds or --frames; predictions.csv grows meanwhile."
    )
    add_detector(parser)
    parser.add_argument(
        "source", nargs="+",
        help="image, video, folder (and those in it), glob in quotes, or - for a list of such, one "
        "a line, from stdin; or one live source: the index of a camera, such as 0, or an address "
        "rtsp://, rtsps://, http:// or https://",
    )  # fmt: skip
    parser.add_argument("--output-dir", default="output/predict")
    parser.add_argument(
        "--threshold", type=_threshold, action="append", default=[], metavar="[NAME=]SCORE",
        help="least score of all classes, or of one; may be repeated (those that the evaluation of "
        "the checkpoint has chosen, or 0.3)",
    )  # fmt: skip
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="these only")
    parser.add_argument(
        "--multi-label", action="store_true",
        help="a box for every class that a query wins, not for the best alone",
    )  # fmt: skip
    parser.add_argument(
        "--nms", type=float, metavar="IOU",
        help="of boxes of a class that overlap by more than this keep the best (no NMS)",
    )  # fmt: skip
    parser.add_argument("--agnostic", action="store_true", help="NMS whatever the class")
    parser.add_argument(
        "--max-detections", type=int, metavar="N", help="the best so many of a picture (all)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="pictures, or tiles of one (%(default)s)"
    )
    parser.add_argument(
        "--tiles", type=int, metavar="PIXELS",
        help="look at larger pictures in tiles of this side, each resized as a picture of its size "
        "is, and once as a whole for what is larger than a tile",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", type=float, metavar="SHARE",
        help="of neighbouring tiles, of their side (0.2): as large as what is to be found",
    )  # fmt: skip
    parser.add_argument(
        "--track", action="store_true",
        help="ids for the objects of videos and live sources: the same from frame to frame",
    )  # fmt: skip
    live = parser.add_argument_group("live sources")
    live.add_argument(
        "--seconds", type=float, metavar="N", help="end so long after the first frame"
    )
    live.add_argument(
        "--frames", type=int, metavar="N", help="end after so many that were looked at"
    )
    live.add_argument(
        "--reconnect", type=int, metavar="N",
        help=f"tries to connect again, in a row, with growing pauses ({RECONNECT})",
    )  # fmt: skip
    live.add_argument(
        "--timeout", type=float, metavar="SECONDS",
        help=f"in which it must answer, and a frame must come ({TIMEOUT:g})",
    )  # fmt: skip
    parser.add_argument("--no-pictures", action="store_true", help="predictions only")
    add_max_pixels(parser)
    jobs = parser.add_argument_group(
        "jobs in parts",
        "Any number of pictures, also at addresses (s3://bucket/folder), by several processes: "
        "a row for each in the files of parts/ in the output folder, in place of all else. After "
        "whatever has ended it the same command does the parts that are not there.",
    )
    jobs.add_argument(
        "--output-format", choices=["coco", *FORMATS],
        help="jsonl (default) or parquet for a job; coco is none",
    )  # fmt: skip
    jobs.add_argument(
        "--num-gpus", type=int, metavar="N",
        help="processes with a GPU each, or with a share of the CPU where there is none (1)",
    )  # fmt: skip
    jobs.add_argument(
        "--ray", metavar="ADDRESS",
        help="by Ray: local for one of this machine, auto or HOST:PORT for a cluster; --num-gpus "
        "is then the number of actors (as many as there is room for)",
    )  # fmt: skip
    jobs.add_argument(
        "--part-size", type=int, metavar="N",
        help=f"pictures of a part, which is what a kill costs each process ({PART_SIZE})",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=[*DTYPES, AUTO], default="float32",
        help="float32 (default), or auto: bfloat16 where that is faster",
    )  # fmt: skip


def _threshold(text: str) -> tuple[str | None, float]:
    """A class, None for all, and its least score; only the last "=" is none of the name."""
    name, equals, score = text.rpartition("=")
    try:
        return (name if equals else None), float(score)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a score, such as 0.4, nor a class and its score, such as cell=0.4"
        ) from None


def _is_job(args: argparse.Namespace) -> bool:
    given = [
        flag
        for flag, value in (
            ("--num-gpus", args.num_gpus),
            ("--ray", args.ray),
            ("--part-size", args.part_size),
        )
        if value is not None
    ]
    if args.output_format == "coco" and given:
        raise ValueError(
            f"{' and '.join(given)}: for jobs in parts, whose --output-format is jsonl or parquet"
        )
    return bool(given) or args.output_format in FORMATS


def _run_job(args: argparse.Namespace, places: list[str], options: dict[str, Any]) -> int:
    results = batch_predict(
        args.checkpoint,
        places,
        output_dir=args.output_dir,
        output_format=args.output_format or FORMATS[0],
        part_size=PART_SIZE if args.part_size is None else args.part_size,
        num_gpus=args.num_gpus,
        ray=args.ray,
        dtype=args.dtype,
        **detector_options(args),
        **options,
    )
    resumed = f", {results.num_resumed} of them done before" if results.num_resumed else ""
    print(
        f"{results.num_objects} objects in {results.num_pictures} pictures{resumed}; see "
        f"{legible(results.folder)}"
    )
    _tell_what_is_not_in(results, results.num_pictures)
    return 1 if results.unreadable else 0


def _tell_what_is_not_in(results: Results | BatchResults, num_files: int) -> None:
    if results.passed_over:
        counts = results.passed_over.most_common()
        told = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in counts)
        kinds = "images or videos" if isinstance(results, Results) else "images"
        print(
            f"{results.passed_over.total()} files in the folders are passed over, as no {kinds} "
            f"by their suffixes: {told}"
        )
    if results.unreadable:
        print(f"{len(results.unreadable)} of {num_files} files could not be read or judged:")
        most = len(results.unreadable) if isinstance(results, Results) else _MOST_UNREADABLE
        for line in results.unreadable[:most]:
            print(f"  {legible(line)}")
        if len(results.unreadable) > most:
            print(f"  and {len(results.unreadable) - most} more, as their rows tell")


def _told(detector: Detector, threshold: dict[str | None, float] | None) -> str:
    """Which scores were asked for."""
    least = detector.select(threshold).thresholds
    if len(set(least)) == 1:
        told = f"with a score of at least {least[0]:g}"
    elif len(least) <= _MOST_NAMES:
        scores = zip(detector.class_names, least)
        told = "with scores of at least " + ", ".join(f"{name} {x:g}" for name, x in scores)
    else:
        told = f"with scores of at least {min(least):g} to {max(least):g} by class"
    if threshold is None and detector.thresholds is not None:
        told += ", the thresholds of the checkpoint"
    return legible(told)


def run(args: argparse.Namespace) -> int:
    names = ("seconds", "frames", "reconnect", "timeout")
    limits = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    is_job = _is_job(args)  # to which an http:// address is a picture
    live = [] if is_job else [address for address in map(live_address, args.source) if address]
    if live and len(args.source) > 1:
        raise ValueError(f"{live[0].shown}: a live source is named alone")
    if is_job and args.track:
        raise ValueError("--track: of videos and live sources, not of a job in parts")
    if limits and not live:
        flags = ", ".join(f"--{name}" for name in limits)
        raise ValueError(f"{flags}: of live sources alone, and {args.source[0]} is none")
    places: list[str] = []
    if isinstance(sys.stdin, io.TextIOWrapper):  # names of files need not be text
        sys.stdin.reconfigure(errors="surrogateescape")
    for source in [] if live else args.source:
        if source == "-":  # a byte order mark is what programs of Windows begin a text with
            lines = (line.strip().lstrip("\ufeff") for line in sys.stdin)
            places += filter(None, lines)
        else:
            places.append(source)
    threshold = dict(args.threshold) or None  # of what is said twice the last counts
    options: dict[str, Any] = {
        "threshold": threshold,
        "classes": args.classes,
        "multi_label": args.multi_label,
        "nms": args.nms,
        "agnostic": args.agnostic,
        "max_detections": args.max_detections,
        "tiles": args.tiles,
        "overlap": args.overlap,
        "batch_size": args.batch_size,
    }
    if is_job:
        return _run_job(args, places, options)
    detector = Detector.from_checkpoint(args.checkpoint, dtype=args.dtype, **detector_options(args))
    options |= {
        "track": args.track,
        "output_dir": args.output_dir,
        "pictures": not args.no_pictures,
    }
    told = _told(detector, threshold)
    if live:
        result = predict_live(detector, live[0], **options, **limits)
        return _tell_live(result, told, args.output_dir)
    results = predict_files(detector, places, **options)
    return _tell(results, told, args.output_dir, not args.no_pictures)


def _tell_live(result: LiveResult, told: str, folder: str) -> int:
    path = os.path.join(folder, "predictions.json")
    copies = "".join(f", {copy}" for copy in result.copies)
    print(
        f"{result.num_objects} objects in {result.num_frames} frames {told}; {result.dropped} more "
        f"frames came meanwhile and were dropped; see {path}, .csv{copies}"
    )
    if result.num_unusable:
        print(f"{result.num_unusable} frames are left out, such as {legible(result.unusable)}")
    if result.problem:
        print(legible(result.problem))
    return 1 if result.num_unusable or result.problem else 0


def _tell(results: Results, told: str, folder: str, pictures: bool) -> int:
    path = os.path.join(folder, "predictions.json")
    print(
        f"{results.num_objects} objects in {len(results)} pictures {told}; see {path} and .csv"
        + (", and the annotated copies beside them" if pictures else "")
    )
    _tell_what_is_not_in(results, results.num_files)
    return 1 if results.unreadable else 0
