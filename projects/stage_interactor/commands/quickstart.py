"""``stage-interactor quickstart``: from nothing to a trained detector."""

import argparse

from ..config import configs_folder
from ..engine.training import train
from . import split_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Generates images of shapes (datasets/shapes), trains a small detector on them, evaluates "
        "it and draws what it finds (output/quickstart): minutes on two CPU cores. key=value "
        "changes its config, quickstart.py."
    )
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")


def run(args: argparse.Namespace) -> int:
    paths, overrides = split_words(args.words)
    if paths:
        raise ValueError(f"{' '.join(paths)}: only key=value is taken; for your own data there is "
                         "stage-interactor train")  # fmt: skip
    train(configs_folder() / "quickstart.py", overrides, resume=args.resume)
    return 0
