"""``stage-interactor``: train a detector, see what it does, use it, take it away."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

# Module and help of each command. Only the one that is called is imported: PyTorch takes seconds.
COMMANDS = {
    "train": ("train_command", "train on your own data: COCO, YOLO or Pascal VOC"),
    "data": ("data_commands", "check, look at or convert a data set"),
    "report": ("report", "write a page about a run"),
    "stages": ("stages", "show what the stages do with an image"),
    "predict": ("predict", "find objects in images and videos"),
    "export": ("export", "write a detector as an ONNX, torch.export or safetensors file"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status. Mistakes of a user are told in a line, without a trace."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    told = "Train a detector, see what it does, use it, take it away."
    parser = argparse.ArgumentParser(prog="stage-interactor", description=told)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text) for name, (_, text) in COMMANDS.items()}
    name = arguments[0] if arguments else None
    if name in COMMANDS:
        module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
        module.add_arguments(parsers[name])
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "overrides"):
        args.overrides = [part for part in rest if "=" in part and not part.startswith("-")]
        rest = [part for part in rest if part not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(message)s")
    from .data import ImageReadError
    from .engine import CheckpointError

    try:
        return args.run(args)
    except (CheckpointError, ImageReadError, ImportError, OSError, ValueError) as error:
        print(f"stage-interactor: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stage-interactor: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
