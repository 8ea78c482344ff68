"""What a run goes on from, and whether it may."""

import glob
import itertools
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any

from ..config import ConfigError, flatten
from ..inference.blueprint import KEY, Blueprint
from ..inference.weights import CheckpointError
from ..writing import write_text
from .checkpoint import BEST

logger = logging.getLogger(__name__)

_FILES = (
    r"metrics\.json|last_checkpoint|model_\w+\.pth|results\.json|detections\.jpg"
    r"|coco_instances_results\.json|instances_predictions\.pth"
)
_JOB = "job_id"  # file with the job, of a scheduler that starts it again, whose run this is


def goes_on(setting: Any, folder: str) -> tuple[bool, str]:
    """Whether ``train.resume`` means to resume, and what is to be said of it.

    ``"auto"`` resumes what the folder holds, if it holds a checkpoint. Without a setting (None) a
    job that torchrun (``--max-restarts``) or SLURM (requeue) has started again goes on with what it
    has left there itself; else nothing is resumed.

    Raises:
        ConfigError: for another setting.
    """
    if setting not in (None, True, False, "auto"):
        raise ConfigError(f"train.resume must be true, false, auto or null, got {setting!r}")
    if isinstance(setting, bool):
        return setting, ""
    if setting == "auto":
        there = os.path.isfile(os.path.join(folder, "last_checkpoint"))
        told = f"goes on with the run in {folder}" if there else f"no checkpoint is in {folder} yet"
        return True, f"train.resume=auto: {told}"
    restarts = [os.environ.get(f"{who}_RESTART_COUNT", "") for who in ("TORCHELASTIC", "SLURM")]
    if not any(count.isdecimal() and int(count) for count in restarts):
        return False, ""
    try:
        with open(os.path.join(folder, _JOB), encoding="utf-8") as file:
            own = file.read(1000) == _job()
    except (OSError, UnicodeDecodeError):
        own = False
    told = "goes on with its run" if own else "begins anew, since it has not begun to train yet"
    return own, f"This job was started again: it {told} in {folder} (train.resume=false: anew)"


def leave_job_id(folder: str) -> None:
    """Says whose run this is, for :func:`goes_on` when the job is started again."""
    if job := _job():
        write_text(os.path.join(folder, _JOB), job)


def _job() -> str:
    """The job that this process is of, the same when it is started again; empty without one."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"SLURM {job}"
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # What torchrun calls a run that has no name: the agent stays when it starts processes again.
    return f"torchrun {socket.gethostname()} {os.getppid()}" if job == "none" else job


def remove_leftovers(folder: str) -> None:
    """Files of a run that a kill has left half written."""
    names = rf"({_FILES}|config\.yaml|config_resolved\.yaml|{_JOB})(\.[0-9a-f]+)?\.tmp"
    for name in filter(re.compile(names).fullmatch, os.listdir(folder)):
        os.remove(os.path.join(folder, name))


def checkpoint_to_resume(output_dir: str) -> str | None:
    """The checkpoint that ``last_checkpoint`` names; None in a folder without checkpoints.

    A run that was killed before its first periodic checkpoint may have left its best one alone.

    Raises:
        CheckpointError: it is not there, but others are: which one is meant, the user must say.
    """
    tag = os.path.join(output_dir, "last_checkpoint")
    name = ""
    if os.path.isfile(tag):
        with open(tag, encoding="utf-8") as file:
            name = file.read().strip()
    path = os.path.join(output_dir, name)
    if name and os.path.isfile(path):
        return path
    there = glob.glob(os.path.join(glob.escape(output_dir), "model_*.pth"))
    if not name and not there:
        return None
    newest_first = sorted(there, key=os.path.getmtime, reverse=True)
    names = [os.path.basename(path) for path in newest_first]
    if not name and names == [f"{BEST}.pth"]:
        return there[0]
    lacks = f"{tag} names {name}, which is not there" if name else f"there is no {tag}"
    raise CheckpointError(
        f"--resume: {lacks}; newest first there are {names}. Write the name of the one to go on "
        f"from into {tag}, or train without --resume"
    )


def holds_training(folder: str) -> bool:
    """Whether a training was begun in a folder."""
    return bool(_files_of_training(folder))


def set_aside(folder: str) -> str | None:
    """Moves what another training left in a folder to a new one below it, which is returned.

    A new training must not take it for its own, when it looks for its best or goes on after a kill.
    """
    if not (names := _files_of_training(folder)):
        return None
    numbers = itertools.count(1)
    target = next(
        path
        for number in numbers
        if not os.path.exists(path := os.path.join(folder, f"earlier_run_{number}"))
    )
    os.mkdir(target)
    # What others follow from goes first: whenever it ends, nothing of the old run is resumed.
    for name in sorted(names, key=lambda name: name != "last_checkpoint"):
        os.replace(os.path.join(folder, name), os.path.join(target, name))
    return target


def _files_of_training(folder: str) -> list[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [name for name in names if re.fullmatch(_FILES, name)]
    begun = {"metrics.json", "last_checkpoint"}.intersection(found)
    return found if begun or any(name.startswith("model_") for name in found) else []


def check_resumable(content: Mapping[str, Any], path: str, ours: Blueprint) -> None:
    """Compares what a checkpoint, read from ``path``, was trained on with what a run now has.

    Other settings than before are logged: they are followed from now on.

    Raises:
        CheckpointError: the classes, their order, or how images are normalised differ: weights
            that have learned one are wrong for the other.
    """
    if KEY not in content:
        return
    theirs = Blueprint.from_checkpoint(content, path)
    fixed: dict[str, Callable[[Blueprint], Any]] = {
        "class names": lambda blueprint: blueprint.class_names,
        "order of channels": lambda blueprint: blueprint.image_format,
        "model.pixel_mean": lambda blueprint: blueprint.config["model"].get("pixel_mean"),
        "model.pixel_std": lambda blueprint: blueprint.config["model"].get("pixel_std"),
    }
    for what, of in fixed.items():
        before, now = of(theirs), of(ours)
        if before != now:
            raise CheckpointError(
                f"--resume: {path} was trained with the {what} {before}, and now they are {now}. "
                "Give the run what it was trained with, or start a new one from these weights: "
                f"train.init_checkpoint={path} and another train.output_dir"
            )
    old, new = (
        {  # a module may have moved since
            key: str(value).rpartition(".")[2] if key.endswith("_target_") else value
            for key, value in flatten(blueprint.config, ".").items()
        }
        for blueprint in (theirs, ours)
    )
    changed = [  # keys that a newer version has are none
        f"{key}={new.get(key)!r} (was {value!r})"
        for key, value in sorted(old.items())
        if new.get(key) != value and not key.endswith(".pretrained")
    ]
    if changed:
        logger.warning(f"Resuming with other settings than before: {', '.join(changed)}")
