"""``stage-interactor predict``: annotated pictures and videos, COCO JSON and CSV of detections."""

import argparse
import csv
import glob
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import islice
from typing import NamedTuple

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from .data import ImageReadError, read_image
from .inference import DTYPES
from .predictor import Detections, Detector
from .visualization import draw_boxes

logger = logging.getLogger(__name__)

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds objects in images and videos: annotated copies of them, "
        "predictions.json (COCO) and predictions.csv in the output folder. Files that cannot be "
        "read are named and skipped; then the exit status is 1."
    )
    parser.add_argument("--checkpoint", required=True, help=".pth, .safetensors or .onnx")
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
    add_model_options(parser)
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is loaded; see :meth:`Detector.from_checkpoint`."""
    parser.add_argument("--device", help="such as cpu or cuda:1 (a GPU, if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument(
        "--config-file", help="that a checkpoint without a config of its own was trained with"
    )


class Source(NamedTuple):
    path: str
    name: str  # of what is written for it: a path inside the output folder


def find_sources(arguments: Iterable[str]) -> list[Source]:
    """The image and video files that arguments name, each once, in order.

    Raises:
        FileNotFoundError: an argument names nothing, or a folder without images and videos.
    """
    files: dict[str, None] = {}
    for argument in arguments:
        if argument == "-":
            lines = [line.strip() for line in sys.stdin]
            files |= dict.fromkeys(source.path for source in find_sources(filter(None, lines)))
            continue
        matches = (
            [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        )
        if not matches:
            raise FileNotFoundError(f"{argument}: there is no such file or folder")
        found = []
        for match in matches:
            if not os.path.isdir(match):
                found.append(match)
                continue
            for folder, folders, names in os.walk(match):
                folders.sort()
                known = (name for name in sorted(names) if name.lower().endswith(IMAGES + VIDEOS))
                found += [os.path.join(folder, name) for name in known]
        if not found:
            raise FileNotFoundError(f"{argument}: no image or video in it ({' '.join(IMAGES)} ...)")
        files |= dict.fromkeys(found)
    folders = [os.path.dirname(os.path.abspath(path)) for path in files]
    root = os.path.commonpath(folders) if folders else ""
    return [Source(path, os.path.relpath(os.path.abspath(path), root)) for path in files]


class Results:
    """Detections of many pictures as COCO JSON and as CSV."""

    FIELDS = ("file", "frame", "class", "score", "left", "top", "right", "bottom")

    def __init__(self, categories: Sequence[dict]):
        self.categories = categories
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.rows: list[tuple] = []

    def add(self, source: Source, found: Detections, frame: int | None = None) -> None:
        image_id = len(self.images) + 1
        height, width = found.image_size
        image = {"id": image_id, "file_name": source.name, "width": width, "height": height}
        self.images.append(image if frame is None else image | {"frame": frame})
        for box, score, index, name in zip(
            found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), found.names
        ):
            left, top, right, bottom = (round(value, 2) for value in box)
            size = round(right - left, 2), round(bottom - top, 2)
            annotation = {
                "id": len(self.annotations) + 1,
                "image_id": image_id,
                "category_id": self.categories[index]["id"],
                "bbox": [left, top, *size],
                "area": round(size[0] * size[1], 2),
                "iscrowd": 0,
                "score": round(score, 4),
            }
            self.annotations.append(annotation)
            self.rows.append(
                (source.name, frame, name, annotation["score"], left, top, right, bottom)
            )

    def save(self, folder: str) -> None:
        """predictions.json and predictions.csv. Boxes in pixels of the original picture."""
        content = {
            "images": self.images,
            "categories": self.categories,
            "annotations": self.annotations,
        }
        with open(os.path.join(folder, "predictions.json"), "w", encoding="utf-8") as file:
            json.dump(content, file)
        with open(
            os.path.join(folder, "predictions.csv"), "w", encoding="utf-8", newline=""
        ) as file:
            csv.writer(file).writerows([self.FIELDS, *self.rows])


def run(args: argparse.Namespace) -> int:
    """The command; 1 if files could not be read."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must lie between 0 and 1, got {args.threshold}")
    sources = find_sources(args.source)
    options = dict(config_file=args.config_file, device=args.device, dtype=args.dtype)
    detector = Detector.from_checkpoint(args.checkpoint, **options)
    unknown = sorted(set(args.classes or ()) - set(detector.class_names))
    if unknown:
        raise ValueError(f"--classes {unknown}: the detector knows {detector.class_names}")

    originals = {os.path.realpath(source.path) for source in sources}
    for source in sources:
        if os.path.realpath(_annotated(args, source)) in originals:
            raise ValueError(
                f"--output-dir {args.output_dir}: {_annotated(args, source)} would be overwritten "
                "by an annotated copy; name another folder"
            )
    os.makedirs(args.output_dir, exist_ok=True)
    results = Results(detector.categories)
    broken: list[str] = []
    images = [source for source in sources if not source.name.lower().endswith(VIDEOS)]
    videos = [source for source in sources if source.name.lower().endswith(VIDEOS)]
    try:
        _predict_images(args, detector, images, results, broken)
        for source in videos:
            _predict_video(args, detector, source, results, broken)
    finally:  # what was found is kept also when a later file is the end of it
        results.save(args.output_dir)
    path = os.path.join(args.output_dir, "predictions.json")
    print(
        f"{len(results.annotations)} objects in {len(results.images)} pictures with a score of at "
        f"least {args.threshold:g}; see {path} and .csv"
        + ("" if args.no_pictures else ", and the annotated copies beside them")
    )
    if broken:
        print(f"{len(broken)} of {len(sources)} files could not be read:", *broken, sep="\n  ")
    return 1 if broken else 0


def _predict_images(args, detector, sources, results, broken) -> None:
    with tqdm(total=len(sources), unit="image", disable=not sources) as progress:
        for batch in _batches(sources, args.batch_size):
            pictures = []
            for source in batch:
                try:
                    pictures.append((source, read_image(source.path)))
                except ImageReadError as error:
                    broken.append(f"{error.file_name}: {error.reason}")
            detected = _detect(args, detector, [picture for _, picture in pictures])
            for (source, picture), found in zip(pictures, detected):
                results.add(source, found)
                if not args.no_pictures:
                    path = _annotated(args, source)
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    Image.fromarray(_draw(picture, found, detector)).save(path)
            progress.update(len(batch))


def _predict_video(args, detector, source, results, broken) -> None:
    path = _annotated(args, source)
    frames = 0
    try:
        with ExitStack() as stack:
            video = stack.enter_context(av.open(source.path))
            if not video.streams.video:
                raise ValueError("it has no pictures")
            stream = video.streams.video[0]
            stream.thread_type = "AUTO"
            write = None
            progress = stack.enter_context(
                tqdm(total=stream.frames or None, unit="frame", desc=source.name)
            )
            decoded = (_upright(frame) for frame in video.decode(stream))
            for batch in _batches(decoded, args.batch_size):
                for picture, found in zip(batch, _detect(args, detector, batch)):
                    results.add(source, found, frames)
                    frames += 1
                    if not args.no_pictures:
                        if write is None:
                            os.makedirs(os.path.dirname(path), exist_ok=True)
                            rate = stream.average_rate or Fraction(25)
                            write = stack.enter_context(_video_writer(path, rate, picture))
                        write(_draw(picture, found, detector))
                    progress.update()
    except (av.FFmpegError, ValueError) as error:
        broken.append(f"{source.path}: {error} (after {frames} frames)")


def _annotated(args: argparse.Namespace, source: Source) -> str:
    """The path of a source's annotated copy."""
    path = os.path.join(args.output_dir, source.name)
    if source.name.lower().endswith(VIDEOS):
        return path if path.lower().endswith(".mp4") else f"{path}.mp4"
    return path if path.lower().endswith(IMAGES) else f"{path}.png"


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB (H, W, 3), turned as a player would: telephones film on their side."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


@contextmanager
def _video_writer(path: str, rate: Fraction, first: np.ndarray) -> Iterator:
    """Writes frames, RGB arrays (H, W, 3) of one size, as H.264, which browsers play."""
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"
        # Its colours are half as fine as its pixels: both sides must be even.
        stream.height, stream.width = (side - side % 2 for side in first.shape[:2])

        def write(picture: np.ndarray) -> None:
            picture = np.ascontiguousarray(picture[: stream.height, : stream.width])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

        yield write
        file.mux(stream.encode())


def _detect(args, detector: Detector, pictures: list[np.ndarray]) -> list[Detections]:
    detected = detector(pictures, threshold=args.threshold) if pictures else []
    if args.classes is None:
        return detected
    return [found[[name in args.classes for name in found.names]] for found in detected]


def _draw(picture: np.ndarray, found: Detections, detector: Detector) -> np.ndarray:
    return draw_boxes(
        picture,
        found.boxes,
        found.classes,
        found.scores,
        class_names=detector.class_names,
        font_size=max(12, round(min(picture.shape[:2]) / 40)),
    )


def _batches(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
