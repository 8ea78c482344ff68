"""What a run goes on from, and whether it may."""

import glob
import itertools
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig
from torch import nn

from ..config import by_number, flatten
from ..errors import explain
from ..inference.blueprint import KEY, Blueprint, class_names_in
from ..inference.weights import read_checkpoint
from ..untrusted.files import read_bytes, read_head, require_regular_file
from ..untrusted.tensors import CheckpointError
from ..writing import write_text
from .checkpoint import BEST
from .milestones import RunState

logger = logging.getLogger(__name__)

_FILES = (
    r"metrics\.json|last_checkpoint|model_\w+\.pth|results\.json|detections\.jpg"
    r"|coco_instances_results\.json|instances_predictions\.pth|flight_\d+\.npz"
    r"|stages_ap(_time)?\.(json|csv|svg)|replay_\d+\.html"
)
_JOB = "job_id"  # file with the job, of a scheduler that starts it again, whose run this is


def goes_on(setting: bool | str | None, folder: str) -> tuple[bool, str]:
    """Whether ``train.resume`` means to resume, and what is to be said of it.

    ``"auto"`` resumes what the folder holds, if it holds a checkpoint. Without a setting (None) a
    job that torchrun (``--max-restarts``) or SLURM (requeue) has started again goes on with what it
    has left there itself; else nothing is resumed.
    """
    if isinstance(setting, bool):
        return setting, ""
    if setting == "auto":
        there = os.path.isfile(os.path.join(folder, "last_checkpoint"))
        told = f"goes on with the run in {folder}" if there else f"no checkpoint is in {folder} yet"
        return True, f"train.resume=auto: {told}"
    restarts = [os.environ.get(f"{who}_RESTART_COUNT", "") for who in ("TORCHELASTIC", "SLURM")]
    if not any(count.isdecimal() and int(count) for count in restarts):
        return False, ""
    own = read_head(os.path.join(folder, _JOB)) == _job().encode()
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


class FailedError(CheckpointError):
    """A state from which the next iteration fails, whatever the learning rate."""


class Previous(NamedTuple):
    """A checkpoint that a training can go on from, read and checked.

    Attributes:
        content: of :func:`~stage_interactor.inference.weights.read_checkpoint`; tensors stay in the
            file until they are used.
    """

    path: str
    content: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> "Previous":
        """
        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it cannot be read, or holds less than a training has.
        """
        require_regular_file(path)
        content = read_checkpoint(path, mmap=True)
        iteration = content.get("iteration")
        if (
            not isinstance(content.get("trainer"), dict)
            or not isinstance(iteration, int)
            or iteration < 0
        ):
            raise CheckpointError(
                f"{path} holds weights, and no state of a training: start one from them with "
                f"train.init_checkpoint={path}"
            )
        if "run" in content:  # which earlier versions do not have
            try:
                RunState().load_state_dict(content["run"])
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path} holds no state of a run: {error}") from error
        if content.get("run", {}).get("failed"):
            raise FailedError(f"{path} is of before an iteration whose losses were not finite")
        return cls(path, content)

    @property
    def iteration(self) -> int:
        """The last one that was finished."""
        return self.content["iteration"]


def checkpoint_to_resume(output_dir: str) -> Previous | None:
    """The checkpoint that ``last_checkpoint`` names, or else the newest whole one in the folder.

    None in a folder without checkpoints, and where the one that is named is of before an iteration
    that fails. A warning says so where it is another one than is named.

    Raises:
        CheckpointError: there are checkpoints, and none to go on from.
    """
    tag = os.path.join(output_dir, "last_checkpoint")
    named, wrong = _named_in(tag)
    if named:
        path = os.path.join(output_dir, named)
        try:
            return Previous.read(path)
        except FileNotFoundError:
            wrong = f"{tag} names {named}, which is not there"
        except (CheckpointError, OSError) as error:
            wrong = f"{tag} names {named}, which cannot be gone on from: {explain(error)}"
            if isinstance(error, FailedError):  # an earlier one would be named, were it of use
                logger.warning(f"{wrong}; no earlier one is better: the training starts again")
                return None
    whole, damaged = _checkpoints(output_dir)
    if not (whole or damaged or named):
        return None
    if not whole:
        others = f"nor can {', '.join(damaged)} be gone on from" if damaged else "there is no other"
        raise CheckpointError(
            f"--resume: {wrong}; {others}. Without --resume a new run starts, and what lies in "
            f"{output_dir} is moved to a folder below it"
        )
    newest = whole[0]
    logger.warning(
        f"{wrong}: going on from {newest.path}, of iteration {newest.iteration}, the newest of the "
        f"{len(whole)} that are whole"
    )
    return newest


def last_checkpoint(output_dir: str) -> str | None:
    """The path that ``last_checkpoint`` names, if it is there."""
    name, _ = _named_in(os.path.join(output_dir, "last_checkpoint"))
    path = os.path.join(output_dir, name)
    return path if name and os.path.isfile(path) else None


def checkpoints_before(output_dir: str, iteration: int) -> list[Previous]:
    """Those that a training can go on from, of earlier iterations than this, newest first."""
    return [found for found in _checkpoints(output_dir)[0] if found.iteration < iteration]


def _checkpoints(output_dir: str) -> tuple[list[Previous], list[str]]:
    """The whole checkpoints, newest first, and the names of the others."""
    whole, damaged = [], []
    for path in glob.glob(os.path.join(glob.escape(output_dir), "model_*.pth")):
        try:
            whole.append(Previous.read(path))
        except (CheckpointError, OSError):
            damaged.append(os.path.basename(path))
    # Of one iteration the best one comes last: it is written before the others.
    best = os.path.join(output_dir, f"{BEST}.pth")
    whole.sort(key=lambda found: (found.iteration, found.path != best, found.path), reverse=True)
    return whole, sorted(damaged)


def _named_in(tag: str) -> tuple[str, str]:
    """The name of a checkpoint that a file ``last_checkpoint`` holds, empty if that is none, and
    then what is wrong with it."""
    try:
        name = read_bytes(tag, 1000).decode().strip()
    except FileNotFoundError:
        return "", f"there is no {tag}"
    except (OSError, ValueError) as error:
        return "", f"{tag} holds no name ({error})"
    if not name.isprintable() or os.path.basename(name) != name or name in ("", ".", ".."):
        return "", f"{tag} holds {name[:200]!r}, not the name of a checkpoint beside it"
    return name, ""


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


class Change(NamedTuple):
    """A value of a config that is another one than in the run that is gone on with."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}, {_shown(self.before)}, {_shown(self.now)}"


class _Absent:
    def __repr__(self) -> str:
        return "(not given)"


ABSENT = _Absent()


def check_resumable(previous: Previous, cfg: DictConfig) -> list[Change]:
    """What a run now has in another way than the one that wrote the checkpoint.

    Raises:
        CheckpointError: what cannot change: the backbone, how images are normalised, how an
            attention or a mixing divides its channels, or the weights to start from. Weights that
            have learned one are wrong for the other.
    """
    path, content = previous
    if KEY not in content:
        logger.warning(f"{path} does not say with which settings it was trained: none is compared")
        return []
    theirs = Blueprint.from_checkpoint(content, path)
    ours = Blueprint.of_run(cfg, theirs.categories)
    old, new = _comparable(theirs.config), _comparable(ours.config)
    changes = [
        Change(key, old.get(key, ABSENT), new.get(key, ABSENT))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    ]
    if theirs.version != ours.version:  # a newer one has keys of its own, with its defaults
        unknown = [change for change in changes if change.before is ABSENT]
        if unknown:
            told = ", ".join(f"{change.key}={_shown(change.now)}" for change in unknown)
            logger.info(f"{path}, of version {theirs.version}, does not know: {told}")
        changes = [change for change in changes if change not in unknown]
    if refused := [change for change in changes if _FIXED.fullmatch(change.key)]:
        raise _cannot_change(path, refused)
    start = next((change for change in changes if change.key == "train.init_checkpoint"), None)
    if start and start.now:
        raise CheckpointError(
            f"--resume: {start.key} was {_shown(start.before)}, and now it is {start.now}, but a "
            f"run that goes on has its weights from {path}: leave it out, or start a new run from "
            "these weights, with another train.output_dir"
        )
    return changes


def check_weights_fit(previous: Previous, model: nn.Module, changes: Sequence[Change]) -> None:
    """Raises a CheckpointError if the weights of a checkpoint have not the model's names and
    shapes, which names the keys of the config that changed, with both values."""
    ours = {key: value.shape for key, value in model.state_dict().items()}
    theirs = {key: value.shape for key, value in previous.content["model"].items()}
    of_model = [change for change in changes if change.key.startswith("model.")]
    if ours != theirs and of_model:
        raise _cannot_change(previous.path, of_model)


def check_same_classes(previous: Previous, names: Sequence[str]) -> None:
    """Raises a CheckpointError if a checkpoint was trained on other classes than ``names``, or on
    these in another order."""
    learned = class_names_in(previous.content)
    if learned and learned != list(names):
        raise _cannot_change(previous.path, [Change("class names", learned, list(names))])


def _cannot_change(path: str, changes: Sequence[Change]) -> CheckpointError:
    told = "; ".join(
        f"{change.key} was {_shown(change.before)}, and now it is {_shown(change.now)}"
        for change in changes
    )
    return CheckpointError(
        f"--resume: {path} was trained with another model or other data: {told}. Give the run what "
        "it was trained with, or start a new one from these weights: "
        f"train.init_checkpoint={path} and another train.output_dir"
    )


# What no shape of a weight tells.
_FIXED = re.compile(
    r"model\.pixel_(mean|std)|dataloader\.test\.mapper\.image_format"
    r"|model\.backbone\.(name|_target_)|model\.decoder\.num_(heads|groups)"
)


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values by their keys; places that only say from where weights come, or in which
    module something is defined, left out."""
    return {
        key: value.rpartition(".")[2] if key.endswith("_target_") else value
        for key, value in flatten(by_number(config), ".").items()
        if not key.endswith((".pretrained", "backbone.weights"))
        and key != "optimizer.params.model"  # put there later
    }


def _shown(value: Any) -> str:
    return "null" if value is None else str(value) or "''"
