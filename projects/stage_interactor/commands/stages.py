"""``stage-interactor stages``: what the stages do with an image, query by query."""

import argparse
import os
from typing import Any

from ..d2.detections import UnusableDetectionsError
from ..data import objects_of_image, read_picture
from ..inference.blueprint import load_model
from ..pages.live_stages import LiveStages, serve_stages
from ..pages.stages import write_stages
from ..pages.trace import Tracer
from . import add_checkpoint, add_data, add_max_pixels, data_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows sampling points and boxes of the queries on every stage; with "
        "--annotations also the labels that training would give them. A page, or a PNG; or, with "
        "--live, a page in the browser on which a box is dragged and the next stages follow."
    )
    add_checkpoint(parser, ".pth or .safetensors")
    parser.add_argument("image")
    parser.add_argument("--output", help=".html or .png (output/stages.html)")
    parser.add_argument("--queries", type=int, nargs="+", help="these (the 4 with the best scores)")
    parser.add_argument("--live", action="store_true", help="serve it to this machine alone")
    parser.add_argument("--port", type=int, help="of --live (7861)")
    add_data(parser)
    add_max_pixels(parser)


def run(args: argparse.Namespace) -> int:
    if args.live and (args.output or args.queries):
        raise ValueError("--live writes no --output, and its --queries are chosen on the page")
    if args.port is not None and not args.live:
        raise ValueError("--port is of --live")
    model, blueprint = load_model(args.checkpoint, args.config_file, averaged=args.averaged)
    output = args.output or os.path.join("output", "stages.html")
    if os.path.realpath(output) == os.path.realpath(args.image):
        raise ValueError(f"--output {output} is the picture itself: name another file")
    objects = None
    options = data_options(args)
    annotations = options.pop("annotations")
    if not annotations and any(options.values()):
        raise ValueError(
            "--images, --format and --allow-outside say how --annotations are read: name these"
        )
    if annotations:
        objects = objects_of_image(annotations, args.image, blueprint.class_names, **options)
    picture = read_picture(args.image)
    fed: dict[str, Any] = {"augmentation": blueprint.build_augmentation()}
    fed["image_format"] = blueprint.image_format
    title = f"Stages: {os.path.basename(args.image)}"
    shown: dict[str, Any] = dict(class_names=blueprint.class_names, objects=objects, title=title)
    try:
        if args.live:
            live = LiveStages(Tracer(model, picture, **fed), picture, **shown)
            serve_stages(live, port=7861 if args.port is None else args.port)
            return 0
        write_stages(
            output, model, picture, queries=args.queries, subtitle=args.checkpoint, **fed, **shown
        )
    except UnusableDetectionsError as error:
        raise UnusableDetectionsError(f"{args.image}: {error}") from error
    print(f"Wrote {output}")
    return 0
