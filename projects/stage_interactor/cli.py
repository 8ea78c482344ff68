"""``stage-interactor``: what a trained detector is used for, from the command line."""

import argparse
import logging
import sys
from collections.abc import Sequence

from .config import ConfigError
from .data import ImageReadError
from .engine import CheckpointError
from .modeling import BackboneError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status. Mistakes of a user are told in a line, without a trace."""
    from . import export, predict

    parser = argparse.ArgumentParser(prog="stage-interactor", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (predict, export):
        command.add_parser(commands)
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        return args.run(args)
    except (BackboneError, CheckpointError, ConfigError, ImageReadError, OSError, ValueError) as e:
        print(f"stage-interactor: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
