"""Thresholds of an evaluation kept in a checkpoint that is there already."""

import logging
import os

from ..config import read_saved
from ..data import match_classes
from ..pages.thresholds import Thresholds, thresholds_of_run
from .blueprint import KEY, class_names_in
from .schema import THRESHOLDS
from .weights import CheckpointError, read_checkpoint, save_atomically, write_safetensors

logger = logging.getLogger(__name__)


def save_thresholds(
    output_dir: str | os.PathLike, checkpoint: str | os.PathLike, *, allow_outside: bool = False
) -> Thresholds:
    """Writes the thresholds of the last evaluation in a folder into a checkpoint.

    Trainings do so themselves; this is for checkpoints of before, and for weights that were
    evaluated on other data. The file is replaced as a whole; all else in it stays. A checkpoint
    that the folder does not say to have evaluated is told, and so are thresholds that it had.

    Args:
        output_dir: of a run, or of ``--eval-only``; see
            :func:`stage_interactor.pages.report.write_report`.
        checkpoint: that was evaluated, ``.pth`` or ``.safetensors``.
        allow_outside: of a run whose data have ``allow_outside``.

    Raises:
        FileNotFoundError: there is no such checkpoint, or there was no evaluation.
        CheckpointError: it cannot be read, or does not say which classes it has.
        ValueError: it has other classes, or there is nothing to choose by.
        OSError: it cannot be written.
    """
    path = os.fspath(checkpoint)
    content = read_checkpoint(path)
    names = class_names_in(content)
    if not names:
        raise CheckpointError(
            f"{path} does not say which classes it has, so that it cannot keep their thresholds: "
            "give them to predict, --threshold"
        )
    chosen = thresholds_of_run(output_dir, allow_outside)
    if chosen is None:
        raise ValueError(
            f"{output_dir}: no thresholds can be chosen, there are fewer than 10 objects, or none "
            "is found"
        )
    order = match_classes(
        names, [item.name for item in chosen.classes], path, f"the evaluation in {output_dir}"
    )
    thresholds = [chosen.classes[index].threshold for index in order]
    _tell_of_doubts(path, os.fspath(output_dir), content[KEY].get(THRESHOLDS), thresholds)
    content[KEY] = {**content[KEY], THRESHOLDS: thresholds}
    if path.endswith(".safetensors"):
        write_safetensors(content.pop("model"), content, path)
    else:
        save_atomically(content, path)
    return chosen


def _tell_of_doubts(path: str, output_dir: str, before: object, thresholds: list[float]) -> None:
    saved = read_saved(os.path.join(output_dir, "config_resolved.yaml"))
    given = saved.get("train.init_checkpoint")
    here = os.path.realpath(path)
    evaluated = isinstance(given, str) and here == os.path.realpath(given)
    if not evaluated and os.path.dirname(here) != os.path.realpath(output_dir):
        told = f"; the weights given there were {given}" if given else ""
        logger.warning(
            f"Nothing says that {path} is what was evaluated in {output_dir}{told}: thresholds of "
            "another model are not its own"
        )
    if before is not None and before != thresholds:
        logger.warning(f"{path} had other thresholds, which are replaced: {before}")
