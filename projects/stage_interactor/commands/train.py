"""``stage-interactor train``, and what ``train_net.py`` is: the flags of detectron2."""

import argparse
import os
import sys

from ..config import is_config, load_config, require_said_once, require_sections
from ..data.augmentations import FLIPS, POLICIES
from ..engine.presets import PRESETS, fit_to_data
from ..engine.training import train
from ..errors import call, legible
from . import add_data, add_trace, data_options, split_words, take_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s DATA | --config-file CONFIG [options] [key=value ...]"
    parser.description = (
        "Trains on a folder of images and annotations, with a config of configs/custom/ whose "
        "schedule is scaled to the data, and whose batches are to the memory; it prints the "
        "command that does the same, to go on from. Or trains as a config says, as train_net.py "
        "does. key=value anywhere changes the config."
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="DATA",
        help="folder, or the file that describes the data; of several the classes are joined by "
        "name; key=value",
    )
    own = parser.add_argument_group("your own data")
    own.add_argument("--preset", choices=PRESETS, help="model (base; nano on a CPU)")
    own.add_argument("--epochs", type=float, help="passes over the data (of the preset)")
    own.add_argument(
        "--background",
        type=_background,
        metavar="keep|drop|SHARE",
        help="pictures without objects: train on them (keep), leave them out, or keep so many that "
        "they are this share of all",
    )
    own.add_argument(
        "--augmentation",
        choices=POLICIES,
        help="of pictures, in place of the preset's: none, light, or strong, which ends light",
    )
    own.add_argument(
        "--flip",
        choices=FLIPS,
        help="half of the pictures, in place of the preset's (horizontal): none where left and "
        "right differ, as in text; both where nothing has a top, as under a microscope",
    )
    own.add_argument(
        "--weights",
        type=_weights,
        metavar="W,W",
        help="of several data sets, how often the pictures of each come (1,1)",
    )
    add_data(own)
    own.add_argument("--dry-run", action="store_true", help="print the command, do not train")
    parser.add_argument("--checkpoint", help="to start from; its classes may be others")
    parser.add_argument("--output-dir", help="of the run (output/ and the name of the folder)")
    parser.add_argument(
        "--freeze",
        metavar="PARTS",
        help="not trained: backbone,neck or decoder.stages.0, with commas between them",
    )
    add_launch_arguments(parser)


def _weights(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _background(text: str) -> str | float:
    return text if text in ("keep", "drop") else float(text)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """detectron2's flags."""
    parser.add_argument(
        "--config-file",
        default="",
        metavar="CONFIG",
        help="a file, or the name of one of this package's: quickstart.py",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output folder"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on each machine")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="which machine this is, from 0")
    # The port depends on the user only, so that a process left over from an earlier run shows
    # itself by an occupied port.
    user = os.getuid() if hasattr(os, "getuid") else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + user % 2**14}",
        help="where the processes meet, tcp://HOST:PORT",
    )


def launch_options(args: argparse.Namespace) -> dict:
    """What the flags are as arguments of :func:`stage_interactor.train`."""
    names = ("resume", "eval_only", "num_gpus", "num_machines", "machine_rank", "dist_url")
    return {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> int:
    paths, overrides = split_words(args.words)
    if args.freeze is not None:
        parts = ",".join(filter(None, map(str.strip, args.freeze.split(","))))
        if not parts:
            raise ValueError(f"--freeze {args.freeze!r} names no part")
        require_said_once(overrides, {"train.freeze": f"[{parts}]"})
        overrides.append(f"train.freeze=[{parts}]")
    several = len(paths) > 1 and not any(map(is_config, paths))
    if not several and len(paths) + bool(args.config_file) != 1 or several and args.config_file:
        told = f"got {paths}" if paths else "got neither"
        raise ValueError(f"name data sets, or one config with --config-file; {told}")
    options = launch_options(args) | {"output_dir": args.output_dir, "checkpoint": args.checkpoint}
    data = data_options(args) | {
        "weights": args.weights,
        "background": args.background,
        "augmentation": args.augmentation,
        "flip": args.flip,
    }
    if args.config_file or is_config(paths[0]):
        own = {
            "preset": args.preset,
            "epochs": args.epochs,
            "dry-run": args.dry_run or None,
            **data,
        }
        if given := [f"--{k.replace('_', '-')}" for k, v in own.items() if v is not None]:
            raise ValueError(f"{', '.join(given)}: for data of your own, not for a config")
        _require_config(args.config_file)
        train(args.config_file or paths[0], overrides, **options)
        return 0
    if args.eval_only:
        raise ValueError("--eval-only needs a config: --config-file")
    fitted = fit_to_data(
        paths,
        overrides,
        preset=args.preset,
        epochs=args.epochs,
        checkpoint=args.checkpoint,
        output_dir=args.output_dir,
        num_gpus=args.num_gpus,
        resume=args.resume,
        dry_run=args.dry_run,
        **data,
    )
    print("\n".join(legible(line) for note in fitted.notes for line in note.splitlines()))
    print(f"The same by hand, to go on from:\n\n{fitted.command}\n", flush=True)
    if not args.dry_run:
        train(fitted.config, fitted.overrides, **launch_options(args))
    return 0


def _require_config(file: str | None) -> None:
    """What is named as a config must be one: ``train`` would take another YAML file for data."""
    if file:
        require_sections(load_config(file), file)


def train_net_parser(opts: str = argparse.REMAINDER) -> argparse.ArgumentParser:
    """The command line of detectron2's training scripts; with ``opts="*"`` in any order."""
    parser = argparse.ArgumentParser(
        epilog="""examples:
  python train_net.py --config-file configs/quickstart.py
  python train_net.py --config-file ... --num-gpus 8 [--resume] [key=value ...]
  python train_net.py --config-file ... --eval-only train.init_checkpoint=model.pth
  torchrun --nproc-per-node 8 train_net.py --config-file ...""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_launch_arguments(parser)
    add_trace(parser)
    parser.add_argument("opts", default=None, nargs=opts, help="config overrides, key=value")
    return parser


def train_net() -> None:
    """What ``train_net.py`` does."""
    args = train_net_parser("*").parse_intermixed_args()
    take_trace(args)
    sys.exit(call("train_net.py", _train_net, args, mistake=1))


def _train_net(args: argparse.Namespace) -> None:
    if not args.config_file:
        raise ValueError("name a config, such as --config-file configs/quickstart.py")
    _require_config(args.config_file)
    train(args.config_file, args.opts, **launch_options(args))
