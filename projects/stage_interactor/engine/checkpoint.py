"""Checkpoints that are whole or not there at all."""

import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes

from ..d2 import RUNTIME
from ..d2.checkpoint import DetectionCheckpointer

BEST = "model_best"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model."""


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, safe against being killed while it writes.

    A file gets its name only after all of it is on disk, and ``last_checkpoint`` names it only
    after that; so whenever the process ends, ``last_checkpoint`` names a whole file.

    Args:
        extra: plain values that every checkpoint is written with.
        strict: raise :class:`CheckpointError` where the checkpoint and the model differ in keys
            or shapes (evaluation, resuming). Otherwise differences are warnings that list them
            (fine-tuning).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        strict: bool = True,
        extra: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(model, save_dir, **kwargs)
        self.strict = strict
        self.extra = dict(extra or {})

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<save_dir>/<name>.pth``: model, checkpointables, ``extra`` and ``kwargs``."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **self.extra, **kwargs}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        save_atomically(data, path)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the checkpoint to resume from. The best one is for use, not for resuming."""
        if last_filename_basename.startswith(BEST):
            return
        path = os.path.join(self.save_dir, "last_checkpoint")
        _write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def _load_file(self, f: str) -> dict[str, Any]:
        """A checkpoint of ours, or a bare state dict; never unpickles code.

        Except that under detectron2 a ``.pkl`` file of its model zoo is read as detectron2 does.
        """
        if f.endswith(".pkl"):
            if RUNTIME != "detectron2":
                raise CheckpointError(f"{f} is of detectron2's model zoo, which needs detectron2")
            return super()._load_file(f)
        return read_checkpoint(f)

    def _load_model(self, checkpoint: Any) -> Any:
        if not self.strict:
            self._drop_other_classes(checkpoint)
        incompatible = super()._load_model(checkpoint)
        misshaped = {key for key, *_ in incompatible.incorrect_shapes}
        problems = {
            "missing": [key for key in incompatible.missing_keys if key not in misshaped],
            "unexpected": incompatible.unexpected_keys,
            "of another shape (checkpoint, model)": incompatible.incorrect_shapes,
        }
        found = [f"{len(keys)} keys {what}: {keys}" for what, keys in problems.items() if keys]
        if found and self.strict:
            raise CheckpointError(
                "the checkpoint does not fit the model of this config. " + "; ".join(found)
            )
        return incompatible

    def _drop_other_classes(self, checkpoint: Any) -> None:
        """Fine-tuning with other classes: the layers of the class scores start anew."""
        theirs, ours = checkpoint["model"], self.model.state_dict()
        keys = [key for key in theirs if ".cls_out." in key and key in ours]
        names = [
            [category["name"] for category in extra.get("blueprint", {}).get("categories", [])]
            for extra in (checkpoint, self.extra)
        ]
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


def read_checkpoint(path: str, *, mmap: bool = False) -> dict[str, Any]:
    """A ``.pth`` file of ours, a bare state dict, or a ``.safetensors`` file; on the CPU.

    No code in the file is run. With ``mmap`` tensors are read when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is incomplete, or holds more than tensors and plain values.
    """
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                loaded = {key: file.get_tensor(key) for key in file.keys()}
                extra = json.loads((file.metadata() or {}).get("extra", "{}"))
            return {"model": loaded, **extra}
        mmap = mmap and zipfile.is_zipfile(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be loaded safely (weights_only): it is "
            f"incomplete, or holds more than tensors and plain values ({error})"
        ) from error
    return loaded if "model" in loaded else {"model": loaded}


def save_safetensors(model: torch.nn.Module, extra: Mapping[str, Any], path: str) -> None:
    """A model's weights as ``.safetensors``, with plain values that JSON can hold beside them."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "extra": json.dumps(extra)}
    _write_atomically(path, lambda file: file.write(safetensors_bytes(state, metadata)))


def save_atomically(data: Any, path: str) -> None:
    """``torch.save``, such that ``path`` is whole or not there at all."""
    _write_atomically(path, lambda file: torch.save(data, file))


def _write_atomically(path: str, write: Any) -> None:
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
