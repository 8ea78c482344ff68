"""``stage-interactor demo``: a web page of one's own, to try a detector in."""

import argparse

from ..inference.demo import Demo
from ..inference.demo_page import serve
from . import add_checkpoint, add_max_pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A page in the browser: drop a picture, see its boxes, choose a threshold, and click a box "
        "to see what the stages did for it. It is served to this machine alone, and sends nothing "
        "anywhere. Needs the extra demo (gradio)."
    )
    add_checkpoint(parser, ".pth, .safetensors or .onnx; .pt2 with --trust")
    parser.add_argument(
        "--trust", action="store_true", help="whoever wrote a .pt2 file, which can run anything"
    )
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="what it listens on, such as 0.0.0.0 for other machines, without a password "
        "(%(default)s)",
    )  # fmt: skip
    add_max_pixels(parser)
    parser.add_argument("--device", help="such as cpu or cuda:1 (a GPU, if there is one)")


def run(args: argparse.Namespace) -> int:
    demo = Demo.from_checkpoint(
        args.checkpoint,
        config_file=args.config_file,
        averaged=args.averaged,
        device=args.device,
        trusted=args.trust,
    )
    serve(demo, host=args.host, port=args.port)
    return 0
