"""Thresholds of an evaluation kept in a checkpoint that is there already."""

import os

from ..data import match_classes
from ..pages.thresholds import Thresholds, thresholds_of_run
from .blueprint import KEY, class_names_in
from .schema import THRESHOLDS
from .weights import CheckpointError, read_checkpoint, save_atomically, write_safetensors


def save_thresholds(
    output_dir: str | os.PathLike, checkpoint: str | os.PathLike, *, allow_outside: bool = False
) -> Thresholds:
    """Writes the thresholds of the last evaluation in a folder into a checkpoint.

    Trainings do so themselves; this is for checkpoints of before, and for weights that were
    evaluated on other data. The file is replaced as a whole; all else in it stays.

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
    content[KEY] = {**content[KEY], THRESHOLDS: thresholds}
    if path.endswith(".safetensors"):
        write_safetensors(content.pop("model"), content, path)
    else:
        save_atomically(content, path)
    return chosen
