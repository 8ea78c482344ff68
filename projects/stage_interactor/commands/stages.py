"""``stage-interactor stages``: what the stages do with an image, query by query."""

import argparse
import os

from ..d2.detections import UnusableDetectionsError
from ..data import objects_of_image, read_picture
from ..inference.blueprint import load_model
from ..pages.stages import write_stages
from . import add_checkpoint, add_data, add_max_pixels, data_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows sampling points and boxes of the queries on every stage; with "
        "--annotations also the labels that training would give them. A page, or a PNG."
    )
    add_checkpoint(parser, ".pth or .safetensors")
    parser.add_argument("image")
    parser.add_argument("--output", default="output/stages.html", help=".html or .png")
    parser.add_argument("--queries", type=int, nargs="+", help="these (the 4 with the best scores)")
    add_data(parser)
    add_max_pixels(parser)


def run(args: argparse.Namespace) -> int:
    model, blueprint = load_model(args.checkpoint, args.config_file, averaged=args.averaged)
    if os.path.realpath(args.output) == os.path.realpath(args.image):
        raise ValueError(f"--output {args.output} is the picture itself: name another file")
    objects = None
    options = data_options(args)
    annotations = options.pop("annotations")
    if not annotations and any(options.values()):
        raise ValueError(
            "--images, --format and --allow-outside say how --annotations are read: name these"
        )
    if annotations:
        objects = objects_of_image(annotations, args.image, blueprint.class_names, **options)
    try:
        write_stages(
            args.output,
            model,
            read_picture(args.image),
            augmentation=blueprint.build_augmentation(),
            image_format=blueprint.image_format,
            class_names=blueprint.class_names,
            queries=args.queries,
            objects=objects,
            title=f"Stages: {os.path.basename(args.image)}",
            subtitle=args.checkpoint,
        )
    except UnusableDetectionsError as error:
        raise UnusableDetectionsError(f"{args.image}: {error}") from error
    print(f"Wrote {args.output}")
    return 0
