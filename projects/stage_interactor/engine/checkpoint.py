"""Checkpoints that are whole or not there at all."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..d2 import RUNTIME
from ..d2.checkpoint import DetectionCheckpointer
from ..inference.blueprint import class_names_in
from ..inference.weights import (
    choose_weights,
    read_checkpoint,
    require_fit,
    save_atomically,
    write_atomically,
)
from ..locking import keep_lock
from ..untrusted.tensors import CheckpointError, not_finite, read_model_zoo
from .trainer import NonFiniteError

BEST = "model_best"

_QUERIES = "queries.content"
_OF_CLASSES = ("denoising.labels.weight",)  # beside the layers of the class scores


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, safe against being killed while it writes.

    A file gets its name only after all of it is on disk, and ``last_checkpoint`` names it only
    after that; so whenever the process ends, ``last_checkpoint`` names a whole file.

    Args:
        extra: plain values that every checkpoint is written with.
        strict: raise :class:`CheckpointError` where the checkpoint and the model differ in keys
            or shapes (evaluation, resuming). Otherwise differences are warnings that list them
            (fine-tuning).
        averaged: which weights are taken if not ``strict``, see :func:`choose_weights`.

    Attributes:
        found: the parts that the file that was loaded last has.
    """

    found: frozenset[str] = frozenset()
    _content: Mapping[str, Any] | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        strict: bool = True,
        averaged: bool | None = None,
        extra: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(model, save_dir, **kwargs)
        self.strict = strict
        self.averaged = averaged
        self.extra = dict(extra or {})

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<save_dir>/<name>.pth``: model, checkpointables, ``extra`` and ``kwargs``.

        Raises:
            NonFiniteError: on every process, if a tensor is not finite; nothing is written.
            FolderInUseError, OSError: the folder is another run's now, or cannot be written to.
        """
        if not self.save_dir:
            return
        data = {"model": self.model.state_dict(), **self.extra, **kwargs}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        if bad := not_finite(data):
            raise NonFiniteError(
                f"{path} is not written, since it would not be finite: {', '.join(bad[:5])}"
                + (f" and {len(bad) - 5} other tensors" if len(bad) > 5 else "")
            )
        if not self.save_to_disk:
            return
        keep_lock(self.save_dir)
        self.logger.info(f"Saving checkpoint to {path}")
        save_atomically(data, path)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the checkpoint to resume from. The best one is for use, not for resuming."""
        if last_filename_basename.startswith(BEST):
            return
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def take(self, content: Mapping[str, Any], path: str) -> None:
        """Loads what :func:`read_checkpoint` has read from ``path``, and not once more."""
        self._content = content
        try:
            self.load(path)
        finally:
            self._content = None

    def _load_file(self, f: str) -> dict[str, Any]:
        # A copy: what lies in a file still would change, or be gone, with the file.
        content = self._read(f) if self._content is None else copy.deepcopy(dict(self._content))
        self.found = frozenset(content)
        return content

    def _read(self, f: str) -> dict[str, Any]:
        """A checkpoint of ours, or a bare state dict; never unpickles code.

        Or, under detectron2, a ``.pkl`` file of its model zoo.
        """
        if f.endswith(".pkl"):
            if RUNTIME != "detectron2":
                raise CheckpointError(f"{f} is of detectron2's model zoo, which needs detectron2")
            return read_model_zoo(f)
        checkpoint = read_checkpoint(f)
        if not self.strict:
            checkpoint["model"] = choose_weights(checkpoint, f, self.averaged)
        return checkpoint

    def _load_model(self, checkpoint: Any) -> Any:
        if not self.strict:
            self._drop_other_classes(checkpoint)
            self._take_queries(checkpoint)
        incompatible = super()._load_model(checkpoint)
        if self.strict:
            require_fit(
                incompatible.missing_keys,
                incompatible.unexpected_keys,
                incompatible.incorrect_shapes,
            )
        return incompatible

    def _take_queries(self, checkpoint: Any) -> None:
        """Fine-tuning with more or fewer queries, or groups of them: those that both have."""
        theirs, ours = checkpoint["model"].get(_QUERIES), self.model.state_dict().get(_QUERIES)
        if theirs is None or ours is None or theirs.shape[1:] != ours.shape[1:]:
            return
        if len(theirs) != len(ours):
            both = min(len(theirs), len(ours))
            taken = torch.cat((theirs[:both].to(ours), ours[both:]))
            checkpoint["model"][_QUERIES] = taken
            self.logger.info(
                f"Fine-tuning: the checkpoint has {len(theirs)} initial queries, the model "
                f"{len(ours)}: the first {both} are the checkpoint's"
            )

    def _drop_other_classes(self, checkpoint: Any) -> None:
        """Fine-tuning with other classes: the layers of the class scores start anew."""
        theirs, ours = checkpoint["model"], self.model.state_dict()
        keys = [key for key in theirs if (".cls_out." in key or key in _OF_CLASSES) and key in ours]
        names = [class_names_in(extra) for extra in (checkpoint, self.extra)]
        other = all(names) and names[0] != names[1]
        if other or any(theirs[key].shape != ours[key].shape for key in keys):
            for key in keys:
                del theirs[key]
            kept = sum(key in theirs for key in ours)
            told = f"classes {names[0]}, the model {names[1]}" if all(names) else "other classes"
            self.logger.info(
                f"Fine-tuning: the checkpoint has {told}. The last layer of each stage's "
                f"classification starts anew ({len(keys)} tensors); {kept} of {len(ours)} tensors "
                "are kept"
            )
