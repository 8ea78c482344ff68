"""A preset of ``configs/custom/`` fitted to data of one's own, and to the memory."""

import copy
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from ..config import ConfigError, configs_folder, load_config, override_text, require_said_once
from ..data.augmentations import FLIPS, POLICIES
from ..data.check import COUNTED, check_trainable, doubts
from ..data.coco import count_background, share_of_background
from ..data.folders import DataFolder, describe, write_coco
from ..data.joining import read_folders
from ..data.reading import count_by_image
from ..data.splitting import hold_out
from ..inference import values
from ..inference.blueprint import KEY, Blueprint
from ..inference.hub import local_file
from ..inference.weights import read_checkpoint
from ..modeling.pretrained import require_package
from ..untrusted.pictures import limit_pixels, limit_restored
from ..writing import inside
from .fitting import Measure, StepOnGpu, images_at_a_time, largest_sides
from .resume import holds_training

PRESETS = ("nano", "lite", "small", "base", "large")
_EVALUATIONS, _PATIENCE = 10, 5  # of a run; without a better one in so many it ends
_SHARE_OF_MEMORY = 0.8
_MOST_QUERIES = 1000  # what the attention between queries still bears


class Fitted(NamedTuple):
    """A config for a data set."""

    config: str  # its path
    overrides: list[str]
    notes: list[str]  # what a person wants to know of how it was fitted
    command: str  # that does the same, to go on from


def default_preset() -> str:
    """The paper's model on a GPU, the smallest one without."""
    return "base" if torch.cuda.is_available() else "nano"


def preset_file(preset: str) -> str:
    """Path of a preset's config."""
    return str(configs_folder() / "custom" / f"{preset}.py")


@limit_restored()
def fit_to_data(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    overrides: Sequence[str] = (),
    *,
    preset: str | None = None,
    epochs: float | None = None,
    checkpoint: str | os.PathLike | None = None,
    output_dir: str | os.PathLike | None = None,
    num_gpus: int = 1,
    resume: bool = False,
    dry_run: bool = False,
    background: str | float | None = None,
    augmentation: str | None = None,
    flip: str | None = None,
    weights: Sequence[float] | None = None,
    images: str | os.PathLike | None = None,
    annotations: str | os.PathLike | None = None,
    format: str | None = None,
    allow_outside: bool | None = None,
    measure: Measure | None = None,
) -> Fitted:
    """Reads a data set and fits a preset to it; annotations as COCO JSON go to ``output_dir``.

    Args:
        path: folder, or the file that describes the data, or several, which become one; see
            :func:`~stage_interactor.data.folders.read_folder` and
            :func:`~stage_interactor.data.joining.join_folders`. Without a part "val" a tenth of the
            images is held out.
        overrides: ``key=value``; they have the last word.
        preset: ``"nano"``, ``"lite"``, ``"small"``, ``"base"`` or ``"large"``: a model, and a
            schedule that is scaled to the number of images. base, or nano on a CPU, by default.
        epochs: passes over the data; the preset's by default.
        checkpoint: to start from; its classes may be others.
        output_dir: of the run; ``output/`` and the name of the data by default.
        num_gpus: that share a batch.
        resume, dry_run: a run that lies in ``output_dir`` already is meant, or none is started.
        background: images without objects, ``"keep"``, ``"drop"`` or their largest share of all;
            the preset's, ``"keep"``, by default.
        augmentation: ``"none"``, ``"light"`` or ``"strong"``; the preset's own by default, see
            :func:`~stage_interactor.data.augmentations.opening_and_closing`.
        flip: ``"none"``, ``"horizontal"``, ``"vertical"`` or ``"both"``; the preset's, horizontal,
            by default.
        weights: of each of several data sets, how often its images come; 1 by default.
        images, annotations, format, allow_outside: of the data, if they are not to be guessed; see
            :func:`~stage_interactor.data.folders.read_folder`.
        measure: what tells how much memory a step takes. By default, on a GPU and unless
            ``dry_run``, one is tried there; else the preset's table tells.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read or trained on, ``output_dir`` holds
            a run already, or a value is out of its range.
        ConfigError: an override is wrong, or ``checkpoint`` is of another model.
    """
    said = {
        "train.output_dir": output_dir,
        "train.init_checkpoint": checkpoint,
        "data.augmentation": augmentation,
        "data.flip": flip,
        "data.background": background,
    }
    require_said_once(overrides, said)
    preset = preset or default_preset()
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {list(PRESETS)}, got {preset!r}")
    if augmentation not in (None, *POLICIES):
        raise ValueError(f"--augmentation must be one of {[*POLICIES]}, got {augmentation!r}")
    if flip not in (None, *FLIPS):
        raise ValueError(f"--flip must be one of {[*FLIPS]}, got {flip!r}")
    if epochs is not None:
        passes = values.number(epochs)
        if passes is None or not 0 < passes < math.inf:
            raise ValueError(f"--epochs must be a finite number of more than 0, got {epochs!r}")
        epochs = passes
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise ValueError("no data set is named: the list of them is empty")
    config, shown = preset_file(preset), f"custom/{preset}.py"
    cfg = load_config(config, overrides)
    require_package(cfg.model.backbone)
    name = "+".join(Path(one).resolve().name.removesuffix(".json") for one in paths)
    output_dir = os.fspath(output_dir or os.path.join("output", name))
    if not (resume or dry_run) and holds_training(output_dir):
        raise ValueError(
            f"{output_dir} holds a run already: name another folder with --output-dir, or go on "
            "with it with --resume"
        )
    annotated = inside(output_dir, "annotations", folder=True)
    cache_file = os.path.join(annotated, "picture_sizes.json")
    limit_pixels(cfg.train.max_pixels)
    folder = read_folders(
        paths,
        weights,
        images=images,
        annotations=annotations,
        format=format,
        allow_outside=allow_outside,
        cache_file=cache_file,
    )
    if "train" not in folder.splits:
        raise ValueError(f"{folder.path} has no part to train on, only {sorted(folder.splits)}")
    notes = [describe(folder)]
    if "val" not in folder.splits:
        hold_out(folder)
        notes.append(
            f"No 'val' to evaluate on: {len(folder.splits['val'].content['images'])} images of "
            "'train' are held out for it"
        )
    for part in ("train", "val"):
        notes += [f"Left out of {part}: {told}" for told in folder.splits[part].summary()]
    check_trainable(folder)
    notes += [f"{part}: {told}" for part, told in doubts(folder, None)]
    json_files = write_coco(folder, annotated)

    chosen = [
        override_text("data.name", name),
        override_text("data.train_json", json_files["train"]),
        override_text("data.val_json", json_files["val"]),
        override_text("data.image_root", folder.splits["train"].image_root),
        override_text("data.val_image_root", folder.splits["val"].image_root),
        override_text("train.output_dir", output_dir),
    ]
    for key in ("data.augmentation", "data.flip", "data.background"):
        if said[key] is not None:
            chosen.append(override_text(key, str(said[key])))
    cfg = load_config(config, [*chosen, *overrides])
    given = {override.split("=")[0].lstrip("+") for override in overrides}
    length = cfg.train.max_iter if "train.max_iter" in given else None
    scaled, told = _room_for_objects(cfg, folder, given)
    notes += told
    if measure is None and torch.cuda.is_available() and not dry_run:
        measure = StepOnGpu
    more, note = _scale(cfg, folder, epochs, length, num_gpus, given, measure, dry_run)
    scaled |= more
    notes.append(note)
    if epochs is not None and length is not None:
        notes.append(f"--epochs {epochs:g} is not used: train.max_iter={length} is the length")
    chosen += [f"{key}={value}" for key, value in scaled.items() if key not in given]
    if checkpoint is not None:
        _check_fits(os.fspath(checkpoint), cfg, preset)
        chosen.append(override_text("train.init_checkpoint", os.fspath(checkpoint)))
        if "pretrained" in cfg.model.backbone:
            chosen.append("model.backbone.pretrained=false")
        if cfg.model.backbone.get("weights"):
            chosen.append("model.backbone.weights=null")
    chosen += overrides
    # A file that is called so here would be taken for it.
    name_of_config = shlex.quote(config) if os.path.isfile(shown) else shown
    launch = ["stage-interactor", "train", "--config-file", name_of_config]
    launch += ["--num-gpus", str(num_gpus)] if num_gpus != 1 else []
    launch += ["--resume"] if resume else []
    command = " \\\n    ".join([" ".join(launch), *map(shlex.quote, chosen)])
    return Fitted(config, chosen, notes, command)


def _room_for_objects(
    cfg: DictConfig, folder: DataFolder, given: set[str]
) -> tuple[dict[str, int], list[str]]:
    """More queries, and more detections that count, if an image has more objects than these."""
    most = max(max(count_by_image(split).values(), default=0) for split in folder.splits.values())
    scaled: dict[str, int] = {}
    notes = []
    for key, now, what in (
        ("model.queries.num_queries", cfg.model.queries.num_queries, "queries"),
        (
            "dataloader.evaluator.max_dets_per_image",
            cfg.dataloader.evaluator.get("max_dets_per_image") or COUNTED,
            "detections of a class that AP looks at",
        ),
    ):
        if most <= now:
            continue
        fit = min(math.ceil(most / 50) * 50, _MOST_QUERIES)
        told = f"An image has {most} objects, more than {now} {what}"
        if key in given:
            notes.append(f"{told}, as {key}={now} says: the rest cannot be found")
        else:
            scaled[key] = fit
            lacks = f"; that is still less than {most}" if fit < most else ""
            notes.append(f"{told}: {key}={fit}{lacks}")
    return scaled, notes


def _scale(
    cfg: DictConfig,
    folder: DataFolder,
    epochs: float | None,
    length: int | None,
    num_gpus: int,
    given: set[str],
    measure: Measure | None,
    dry_run: bool,
) -> tuple[dict[str, int], str]:
    """What a preset's schedule and batches become: keys to values, and a sentence about it.

    ``length`` is the number of iterations, if that is decided already; ``given`` are the keys that
    a person decided.
    """
    counts = count_by_image(folder.splits["train"]).values()
    with_objects = sum(count > 0 for count in counts)
    share = share_of_background(cfg.data.background)
    number = with_objects + count_background(share, with_objects, len(counts) - with_objects)
    preset, batch = cfg.preset, cfg.dataloader.train.total_batch_size
    smaller = {}
    key = "dataloader.train.total_batch_size"
    if batch > number and key not in given:
        batch = max(number // max(num_gpus, 1), 1) * max(num_gpus, 1)
        smaller[key] = batch
    least = 0 if epochs is not None else preset.min_images
    images = max((epochs or preset.epochs) * number, least)
    iterations = max(math.ceil(images / batch), 1) if length is None else length
    scaled = smaller | {
        "train.max_iter": iterations,
        "train.eval_period": max(iterations // _EVALUATIONS, 1),
        "train.early_stopping.patience": _PATIENCE,
        "train.checkpointer.period": max(iterations // 10, 1),
        "lr_multiplier.warmup_iters": min(cfg.lr_multiplier.warmup_iters, max(iterations // 10, 1)),
    }
    workers = min(cfg.dataloader.train.num_workers, os.cpu_count() or 1)
    scaled |= {f"dataloader.{part}.num_workers": workers for part in ("train", "test")}
    available = free_memory()
    share = max(batch // max(num_gpus, 1), 1)
    parts, needed, how = _parts_by_trying(cfg, folder, share, available, given, measure) or (
        *_parts_by_table(preset, share, available),
        "by the preset's table; a run tries a step"
        if dry_run and torch.cuda.is_available()
        else "",
    )
    if parts > 1:
        scaled["train.accumulation_steps"] = parts
    told = (
        f"{number} images, {number - with_objects} of them without objects: {iterations} "
        f"iterations of {batch} images, {iterations * batch / max(number, 1):.0f} epochs. About "
        f"{needed:.1f} of {available:.1f} GiB of memory"
        + (f", {how}" if how else "")
        + (f", each batch in {parts} parts" if parts > 1 else "")
        + ("; it may not be enough" if needed > _SHARE_OF_MEMORY * available else "")
    )
    return scaled, told


def _parts_by_table(preset: DictConfig, share: int, available: float) -> tuple[int, float]:
    """In how many parts ``share`` images go through the model, and the GiB that one takes."""
    for parts in (2**power for power in range(share.bit_length())):
        needed = preset.gib + preset.gib_per_image * math.ceil(share / parts)
        if needed <= _SHARE_OF_MEMORY * available:
            break
    return parts, needed


def _parts_by_trying(
    cfg: DictConfig,
    folder: DataFolder,
    share: int,
    available: float,
    given: set[str],
    measure: Measure | None,
) -> tuple[int, float, str] | None:
    """The same by steps that are tried, and a word about it; None where nothing measures, the parts
    are decided, or nothing says how large the images become."""
    if measure is None or "train.accumulation_steps" in given:
        return None
    mapper, split = cfg.dataloader.train.mapper, folder.splits["train"]
    pictures = [(image["width"], image["height"]) for image in split.content["images"]]
    sides = largest_sides(
        mapper.augmentation, pictures, bool(cfg.dataloader.train.get("aspect_ratio_grouping"))
    )
    if sides is None:
        return None
    objects = max(count_by_image(split).values(), default=1)
    trial = measure(cfg, sides, min(objects, cfg.model.queries.num_queries))
    number, taken = images_at_a_time(trial, share, _SHARE_OF_MEMORY * available)
    del trial  # and its model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    parts = math.ceil(share / max(number, 1))
    told = f"measured with images of {sides[1]} x {sides[0]} pixels, {max(number, 1)} at a time"
    return parts, math.inf if taken is None else taken, told


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


def _check_fits(checkpoint: str, cfg: DictConfig, preset: str) -> None:
    """Raises a ConfigError if a checkpoint is of another model; its classes may differ."""
    content = read_checkpoint(local_file(checkpoint), mmap=True)
    if KEY not in content:
        return  # what fits is told when it is loaded
    blueprint = Blueprint.from_checkpoint(content, checkpoint)
    theirs = blueprint.config.get("model", {})
    cfg = copy.deepcopy(cfg)
    ours = Blueprint.of_run(cfg, blueprint.categories).config["model"]
    differing = [
        f"model.{part}.{key}={theirs[part].get(key)} (here {ours[part].get(key)})"
        for part in ("backbone", "neck", "queries", "decoder")
        if part in theirs
        for key in sorted(set(theirs[part]) | set(ours[part]))
        if key not in ("pretrained", "weights") and theirs[part].get(key) != ours[part].get(key)
    ]
    if differing:
        raise ConfigError(
            f"{checkpoint} is of another model than --preset {preset}: {', '.join(differing)}; "
            "choose its preset, or give these as overrides"
        )
