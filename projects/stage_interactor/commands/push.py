"""``stage-interactor push``: a trained detector on the Hugging Face hub."""

import argparse

from ..inference.hub import PREFIX
from ..inference.push import push_checkpoint
from . import add_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Uploads a detector to the Hugging Face hub, as model.safetensors with a model card, in "
        "one commit. Log in before: hf auth login."
    )
    parser.add_argument("repo_id", metavar="user/name", help="is made if it is not there")
    add_checkpoint(parser, ".pth or .safetensors")
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="of the weights, as the hub calls it: apache-2.0 (unknown)",
    )
    parser.add_argument("--private", action="store_true", help="others do not see it")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument(
        "--card",
        choices=["keep", "replace"],
        help="what becomes of a README.md that somebody wrote (an error)",
    )


def run(args: argparse.Namespace) -> int:
    pushed = push_checkpoint(
        args.checkpoint,
        args.repo_id,
        license=args.license,
        private=args.private,
        message=args.message,
        card=args.card,
        config_file=args.config_file,
        averaged=args.averaged,
    )
    if not pushed.card:
        print("README.md stays as it is")
    elif args.license is None:
        print("The card says license: unknown; --license NAME says which")
    print(f"Pushed to {pushed.url} as {pushed.commit[:12]}; it is {PREFIX}{args.repo_id} here")
    return 0
