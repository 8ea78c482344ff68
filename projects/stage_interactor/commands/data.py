"""``stage-interactor data``: what is in a data set, and what is wrong with it."""

import argparse
import os

from ..config import load_config
from ..data.augmentations import FLIPS, POLICIES
from ..data.check import check_folder
from ..data.folders import describe, write_coco
from ..data.joining import read_folders
from ..engine.presets import default_preset, preset_file
from ..errors import legible
from ..pages.dataset import write_view
from . import add_data, add_max_pixels, data_options

_DATA = "folder, or the file that describes the data; of several the classes are joined by name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every action has a ``run`` of its own."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="tell what is wrong in it",
        description="Tells what a data set holds and what is wrong in it. The exit status is 1 if "
        "training or evaluation would leave something out or fail.",
    )
    check.add_argument("path", nargs="+", help=_DATA)
    add_data(check)
    add_max_pixels(check)
    check.add_argument("--all", action="store_true", help="every message, not ten of a kind")
    check.add_argument("--no-decode", action="store_true", help="do not look at the pixels")
    check.set_defaults(run=run_check)
    view = actions.add_parser(
        "view",
        help="a page of what training gets of it",
        description="Writes a page: classes and sizes, pictures after augmentation, suspicious "
        "boxes.",
    )
    view.add_argument("path", nargs="+", help=_DATA)
    add_data(view)
    add_max_pixels(view)
    view.add_argument("--output", default="output/data.html")
    view.add_argument(
        "--config-file", help="whose augmentation is shown (that of stage-interactor train)"
    )
    view.add_argument(
        "--augmentation", choices=POLICIES, help="of that config, in place of its own"
    )
    view.add_argument("--flip", choices=FLIPS, help="of that config, in place of its own")
    view.add_argument("--pictures", type=int, default=12, help="how many (%(default)s)")
    view.set_defaults(run=run_view)
    convert = actions.add_parser("convert", help="write it as COCO JSON")
    convert.add_argument("path", nargs="+", help=_DATA)
    add_data(convert)
    add_max_pixels(convert)
    convert.add_argument("output_dir")
    convert.set_defaults(run=run_convert)


def run_check(args: argparse.Namespace) -> int:
    try:
        folder = read_folders(args.path, **data_options(args))
    except ValueError as error:
        print(f"Error: {legible(str(error))}")
        return 1
    print("\n".join(map(legible, describe(folder).splitlines())))
    queries = load_config(preset_file(default_preset())).model.queries.num_queries
    found = check_folder(folder, decode=not args.no_decode, num_queries=queries)
    for kind, messages in (("Error", found.errors), ("Warning", found.warnings)):
        for name, texts in messages.items():
            shown = texts if args.all else texts[:10]
            for text in shown:
                print(f"{kind}{f' in {name}' if name else ''}: {legible(text)}")
            if len(texts) > len(shown):
                print(f"... and {len(texts) - len(shown)} more of these: --all shows them")
    wrong = any(found.errors.values())
    if not wrong and not any(found.warnings.values()):
        print("Nothing is wrong.")
    return int(wrong)


def run_view(args: argparse.Namespace) -> int:
    # Also of configs that have no data.augmentation.
    choices = {"policy": args.augmentation, "flip": args.flip}
    chosen = [f"dataloader.train.mapper.{key}={value}" for key, value in choices.items() if value]
    cfg = load_config(args.config_file or preset_file(default_preset()), chosen)
    write_view(
        args.output, read_folders(args.path, **data_options(args)), cfg, num_pictures=args.pictures
    )
    print(f"Wrote {args.output}")
    return 0


def run_convert(args: argparse.Namespace) -> int:
    folder = read_folders(args.path, **data_options(args))
    print("\n".join(map(legible, describe(folder).splitlines())))
    for name in folder.splits:
        path = os.path.join(args.output_dir, f"{name}.json")
        if os.path.exists(path):
            raise ValueError(f"{path} is there already: name another folder")
    for name, path in write_coco(folder, args.output_dir).items():
        split = folder.splits[name]
        print(f"{name}: {path}, images in {split.image_root}")
        for problem in split.problems:
            print(f"Left out: {legible(problem)}")
    return 1 if any(split.problems for split in folder.splits.values()) else 0
