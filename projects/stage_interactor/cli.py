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
    from . import data_commands, export, predict, report, stages, train_command

    parser = argparse.ArgumentParser(prog="stage-interactor", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (predict, train_command, report, stages, data_commands, export):
        command.add_parser(commands)
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "overrides"):
        args.overrides = [part for part in rest if "=" in part and not part.startswith("-")]
        rest = [part for part in rest if part not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(message)s")
    try:
        return args.run(args)
    except (BackboneError, CheckpointError, ConfigError, ImageReadError, OSError, ValueError) as e:
        print(f"stage-interactor: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
