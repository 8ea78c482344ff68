"""``stage-interactor demo``: a web page of one's own, to try a detector in."""

import argparse

from ..inference.demo import Demo
from ..inference.demo_page import serve
from . import add_detector, add_max_pixels, detector_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A page in the browser: drop a picture, see its boxes, choose a threshold, and click a box "
        "to see what the stages did for it. It is served to this machine alone, and sends nothing "
        "anywhere. Needs the extra demo (gradio)."
    )
    add_detector(parser)
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="what it listens on, such as 0.0.0.0 for other machines, without a password "
        "(%(default)s)",
    )  # fmt: skip
    add_max_pixels(parser)


def run(args: argparse.Namespace) -> int:
    demo = Demo.from_checkpoint(args.checkpoint, **detector_options(args))
    serve(demo, host=args.host, port=args.port)
    return 0
