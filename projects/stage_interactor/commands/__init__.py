"""``stage-interactor``: train a detector, see what it does, use it, take it away.

The command line and nothing else: a file a command, each with ``add_arguments`` and a ``run`` that
calls what does the work.
"""

import argparse
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Sequence

from ..errors import TRACE, call, end_on_signals, leave_on_signals
from ..untrusted.pictures import limit_pixels

# Module and help of each command. Only the one that is called is imported: PyTorch takes seconds.
COMMANDS = {
    "quickstart": "train, evaluate and draw on generated images, in minutes",
    "train": "train on your own data, or from a config",
    "data": "check, look at or convert a data set",
    "report": "write a page about a run",
    "replay": "build the batch of an iteration of a run again",
    "stages": "show what the stages do with an image",
    "predict": "find objects in images and videos",
    "demo": "look at pictures and at the stages in a browser",
    "export": "write a detector as an ONNX, OpenVINO, torch.export or safetensors file",
    "push": "put a detector on the Hugging Face hub",
    "config": "list the configs, print one, or copy it to edit it",
}

# How often one of PyTorch's threads looks whether the others have come before it sleeps. By
# libgomp's own number it looks for longer than the system lets a thread compute at a time: beside
# another program that takes a core, the threads then keep each other from computing. These are long
# enough for the gaps between two operations.
_SPINS = "20000"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status. Mistakes of a user are told in a line, without a trace."""
    program = arguments is None
    if arguments is None:
        arguments = sys.argv[1:]
        begin_program()
    return call("stage-interactor", _main, list(arguments), program)


def begin_program() -> None:
    """What is decided before PyTorch is imported: that takes seconds, in which signals end a
    program without a trace, and reads how its threads wait for each other."""
    leave_on_signals()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _main(arguments: list[str], program: bool) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    if "" in arguments:  # it would mean the folder that one is in
        raise ValueError("an argument is empty: has a variable of the shell no value?")
    told = "Train a detector, see what it does, use it, take it away."
    parser = argparse.ArgumentParser(prog="stage-interactor", description=told)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    name = arguments[0] if arguments else None
    if name in COMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        parsers[name].set_defaults(run=getattr(module, "run", None))
        module.add_arguments(parsers[name])
        add_trace(parsers[name])
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "words"):  # that may stand between flags
        args.words += [part for part in rest if not part.startswith("-")]
        rest = [part for part in rest if part.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("stage_interactor.inference.weights").setLevel(logging.INFO)  # tells which
    take_trace(args)
    take_max_pixels(args)
    if program and name not in ("quickstart", "train"):  # whose runs take signals to save
        end_on_signals()
    return args.run(args)


def add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", action="store_true", help="show where an error comes from")


def take_trace(args: argparse.Namespace) -> None:
    """In the environment, where the processes of a run look for it too."""
    if args.trace:
        os.environ[TRACE] = "1"


def add_data(parser: argparse._ActionsContainer) -> None:
    """What a data set is, where that is not to be guessed."""
    parser.add_argument("--images", metavar="DIR", help="the folder of the pictures")
    parser.add_argument(
        "--annotations", metavar="FILE_OR_DIR", help="the annotations, if others are not meant"
    )
    parser.add_argument("--format", metavar="NAME", help="yolo, voc, coco, cvat, via, labelme, "
                        "csv or keras")  # fmt: skip
    parser.add_argument(
        "--allow-outside",
        action="store_const",
        const=True,
        help="names in its files may lead to pictures outside of it",
    )


def data_options(args: argparse.Namespace) -> dict:
    """The same, as arguments of :func:`stage_interactor.data.folders.read_folder`."""
    names = ("images", "annotations", "format", "allow_outside")
    return {name: getattr(args, name) for name in names}


def add_max_pixels(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="larger pictures, and frames of videos, are not read (178956970)",
    )


def take_max_pixels(args: argparse.Namespace) -> None:
    """In the environment, where the threads and processes that read pictures look for it."""
    if getattr(args, "max_pixels", None) is not None:
        limit_pixels(args.max_pixels)


def add_checkpoint(parser: argparse.ArgumentParser, suffixes: str) -> None:
    """Which detector, and where it does not say how it is built, its config."""
    parser.add_argument("--checkpoint", required=True, help=suffixes)
    parser.add_argument(
        "--config-file", help="that a checkpoint without a config of its own was trained with"
    )
    parser.add_argument(
        "--trained-weights",
        dest="averaged",
        action="store_const",
        const=False,
        help="not their averages, which are taken where the checkpoint has them",
    )


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Which detector, of a checkpoint or an exported file, and where it computes."""
    add_checkpoint(parser, ".pth, .safetensors or .onnx; .pt2 and .xml with --trust")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="whoever wrote a .pt2 or .xml file, which can run anything",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (a GPU, if there is one)")


def detector_options(args: argparse.Namespace) -> dict:
    """The same, as arguments of :meth:`stage_interactor.Detector.from_checkpoint`."""
    names = ("config_file", "averaged", "device")
    return {name: getattr(args, name) for name in names} | {"trusted": args.trust}


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths, and overrides ``key=value``; what exists as a file or folder is a path."""
    overrides = [
        word
        for word in words
        if re.match(r"\+{0,2}[A-Za-z_][\w.]*=", word) and not os.path.exists(word)
    ]
    return [word for word in words if word not in overrides], overrides
