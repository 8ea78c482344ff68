"""``stage-interactor train``: one command from a folder of one's own data to a detector."""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from .blueprint import Blueprint
from .config import ConfigError, load_config
from .data.folders import DataFolder, Split, read_folder, write_coco
from .data.quality import check_trainable
from .data_commands import describe
from .engine import read_checkpoint
from .presets import PRESETS, ROOT, default_preset, find_preset

_HELD_OUT = 10  # every so manieth image, where nothing is there to evaluate on
_SHARE_OF_MEMORY = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains on a folder of images and annotations, with a config of "
        "configs/custom/ whose schedule is scaled to the data, and whose batches are to the "
        "memory. key=value anywhere changes the config. It prints the command that does the same, "
        "to go on from."
    )
    parser.add_argument("path", help="folder, data.yaml, or COCO JSON")
    parser.add_argument("--preset", choices=PRESETS, help="size of the model (base; nano on a CPU)")
    parser.add_argument("--epochs", type=float, help="passes over the data (of the preset)")
    parser.add_argument("--checkpoint", help="to start from; its classes may be others")
    parser.add_argument("--output-dir", help="output/ and the name of the folder")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--dry-run", action="store_true", help="print the command, do not train")
    parser.set_defaults(run=run, overrides=[])  # key=value, anywhere after the path


def run(args: argparse.Namespace) -> int:
    """The command; train_net.py's exit status."""
    preset = args.preset or default_preset()
    config_file = find_preset(preset)
    folder = read_folder(args.path)
    if "train" not in folder.splits:
        raise ValueError(f"{args.path} has no part to train on, only {sorted(folder.splits)}")
    name = Path(folder.path).resolve().name.removesuffix(".json")
    output_dir = args.output_dir or os.path.join("output", name)
    if not (args.resume or args.dry_run) and os.path.exists(
        os.path.join(output_dir, "metrics.json")
    ):
        raise ValueError(
            f"{output_dir} holds a run already: name another folder with --output-dir, or go on "
            "with it with --resume"
        )
    print(describe(folder))
    if "val" not in folder.splits:
        hold_out(folder)
        print(f"No 'val' to evaluate on: every {_HELD_OUT}th image of 'train' is held out for it")
    for part in ("train", "val"):
        for problem in folder.splits[part].problems:
            print(f"Left out of {part}: {problem}")
    check_trainable(folder)
    json_files = write_coco(folder, os.path.join(output_dir, "annotations"))

    chosen = [
        override("data.name", name),
        override("data.train_json", json_files["train"]),
        override("data.val_json", json_files["val"]),
        override("data.image_root", folder.splits["train"].image_root),
        override("data.val_image_root", folder.splits["val"].image_root),
        override("train.output_dir", output_dir),
    ]
    cfg = load_config(config_file, chosen + args.overrides)
    chosen += fit(cfg, folder, args.epochs, args.overrides, args.num_gpus)
    if args.checkpoint:
        check_fits(args.checkpoint, cfg, preset)
        chosen += [override("train.init_checkpoint", args.checkpoint)]
        if "pretrained" in cfg.model.backbone:
            chosen += ["model.backbone.pretrained=false"]
    launch = [str(ROOT / "train_net.py"), "--config-file", config_file]
    launch += ["--num-gpus", str(args.num_gpus)] if args.num_gpus != 1 else []
    launch += ["--resume"] if args.resume else []
    shown = [os.path.relpath(part) if part.startswith(str(ROOT)) else part for part in launch]
    arguments = [shlex.quote(part) for part in chosen + args.overrides]
    print("The same by hand, to go on from:\n")
    print("python " + " \\\n    ".join([" ".join(shown), *arguments]) + "\n", flush=True)
    if args.dry_run:
        return 0
    return run_to_the_end([sys.executable, *launch, *chosen, *args.overrides])


def override(key: str, value: str) -> str:
    """``key='value'`` as Hydra's grammar reads it back, whatever is in the value."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def run_to_the_end(command: list[str]) -> int:
    """A process's exit status; signals go to it, which may want to save what it has."""
    process = subprocess.Popen(command)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches it without us
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hold_out(folder: DataFolder) -> None:
    """Takes every tenth image out of "train" for "val"."""
    whole = folder.splits["train"]
    images = sorted(whole.content["images"], key=lambda image: str(image["file_name"]))
    held = {image["id"] for image in images[_HELD_OUT - 1 :: _HELD_OUT] or images[-1:]}
    if len(held) == len(images):
        raise ValueError(f"{folder.path}: one image alone is not enough to train and to evaluate")

    def part(which) -> Split:
        content = {
            **whole.content,
            "images": [item for item in images if which(item["id"])],
            "annotations": [a for a in whole.content["annotations"] if which(a["image_id"])],
        }
        return Split(content, whole.image_root, None, [])

    problems = whole.problems
    folder.splits["val"] = part(lambda key: key in held)
    folder.splits["train"] = part(lambda key: key not in held)
    folder.splits["train"].problems = problems


def fit(
    cfg: DictConfig,
    folder: DataFolder,
    epochs: float | None,
    overrides: list[str],
    num_gpus: int,
) -> list[str]:
    """Overrides that scale a preset: length of the schedule, parts that a batch is computed in."""
    given = {override.split("=")[0].lstrip("+") for override in overrides}
    objects = {item["image_id"] for item in folder.splits["train"].content["annotations"]}
    preset, batch = cfg.preset, cfg.dataloader.train.total_batch_size
    if epochs is not None and epochs <= 0:
        raise ValueError(f"--epochs must be more than 0, got {epochs}")
    least = 0 if epochs is not None else preset.min_images
    images = max((epochs or preset.epochs) * len(objects), least)
    iterations = max(math.ceil(images / batch), 1)
    chosen = {
        "train.max_iter": iterations,
        "train.eval_period": max(iterations // 5, 1),
        "train.checkpointer.period": max(iterations // 10, 1),
        "lr_multiplier.warmup_iters": min(cfg.lr_multiplier.warmup_iters, max(iterations // 10, 1)),
    }
    workers = min(cfg.dataloader.train.num_workers, os.cpu_count() or 1)
    chosen |= {f"dataloader.{part}.num_workers": workers for part in ("train", "test")}
    available = free_memory()
    share = batch // max(num_gpus, 1)
    for parts in (2**power for power in range(share.bit_length())):
        needed = preset.gib + preset.gib_per_image * math.ceil(share / parts)
        if needed <= _SHARE_OF_MEMORY * available:
            break
    if parts > 1:
        chosen["train.accumulation_steps"] = parts
    print(
        f"{len(objects)} images with objects: {iterations} iterations of {batch} images, "
        f"{iterations * batch / max(len(objects), 1):.0f} epochs. About {needed:.1f} of "
        f"{available:.1f} GiB of memory"
        + (f", each batch in {parts} parts" if parts > 1 else "")
        + ("; it may not be enough" if needed > _SHARE_OF_MEMORY * available else "")
    )
    return [f"{key}={value}" for key, value in chosen.items() if key not in given]


def free_memory() -> float:
    """GiB of a GPU, or of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 2**30
    try:  # what could be had, files in memory included
        lines = Path("/proc/meminfo").read_text().splitlines()
        (found,) = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
        return int(found) / 2**20
    except (OSError, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def check_fits(checkpoint: str, cfg: DictConfig, preset: str) -> None:
    """Raises a ConfigError if a checkpoint is of another model; its classes may differ."""
    content = read_checkpoint(checkpoint, mmap=True)
    if "blueprint" not in content:
        return  # train_net.py tells what fits
    theirs = Blueprint.from_checkpoint(content, checkpoint).config["model"]
    cfg = OmegaConf.create(OmegaConf.to_container(cfg), flags={"allow_objects": True})
    cfg.model.num_classes = theirs["num_classes"]
    ours = Blueprint.of_run(cfg, [{}] * theirs["num_classes"]).config["model"]
    differing = [
        f"model.{part}.{key}={theirs[part].get(key)} (here {ours[part].get(key)})"
        for part in ("backbone", "neck", "queries", "decoder")
        for key in sorted(set(theirs[part]) | set(ours[part]))
        if key != "pretrained" and theirs[part].get(key) != ours[part].get(key)
    ]
    if differing:
        raise ConfigError(
            f"{checkpoint} is of another model than --preset {preset}: {', '.join(differing)}; "
            "choose its preset, or give these as overrides"
        )
