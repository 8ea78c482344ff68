"""``stage-interactor config``: the configs that a run can be made of."""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from ..config import copy_config, list_configs, load_config, save_config, save_resolved
from . import split_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [NAME] [key=value ...] [--resolve | --copy [FOLDER]]"
    parser.description = (
        "Prints a config as YAML, which can be run as the config itself; without a name the names "
        "that there are."
    )
    parser.add_argument("words", nargs="*", metavar="NAME", help="name or file; key=value")
    parser.add_argument(
        "--resolve", action="store_true", help="values in place of references, for reading"
    )
    parser.add_argument(
        "--copy", nargs="?", const="configs", metavar="FOLDER",
        help="write it, and the configs that it imports, to a folder (%(const)s), to be edited",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    names, overrides = split_words(args.words)
    if not names and not overrides and args.copy is None:
        print("\n".join(list_configs()))
    elif len(names) != 1:
        raise ValueError(f"name one config, got {names}; stage-interactor config lists them")
    elif args.copy is None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "config.yaml")
            save = save_resolved if args.resolve else save_config
            save(load_config(names[0], overrides), file)
            sys.stdout.write(file.read_text(encoding="utf-8"))
    else:
        path, others = copy_config(names[0], args.copy, overrides)
        print(
            f"Wrote {path}"
            + (f", and beside it what it imports: {', '.join(others)}" if others else "")
        )
        print(f"Edit it, and run: stage-interactor train --config-file {shlex.quote(path)}")
    return 0
