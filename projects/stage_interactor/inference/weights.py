"""Files of weights: read without running anything in them, written whole or not at all."""

import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model."""


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


def load_weights(model: nn.Module, path: str, *, averaged: bool) -> None:
    """Gives the model a checkpoint's weights, or their average over the training.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, does not fit the model, or holds no average.
    """
    logger.info(f"Loading {'averaged ' if averaged else ''}weights from {path}")
    checkpoint = read_checkpoint(path)
    if averaged and "ema" not in checkpoint:
        raise CheckpointError(
            f"{path} holds no averaged weights; set "
            "train.model_ema.use_ema_weights_for_eval_only=false to evaluate those that it holds"
        )
    weights = checkpoint["ema" if averaged else "model"]
    # What averaging and several processes wrap a model in.
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    ours = model.state_dict()
    misshaped = [
        (key, tuple(value.shape), tuple(ours[key].shape))
        for key, value in weights.items()
        if key in ours and value.shape != ours[key].shape
    ]
    require_fit(ours.keys() - weights.keys(), weights.keys() - ours.keys(), misshaped)
    model.load_state_dict(weights)


def require_fit(
    missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[tuple[str, Any, Any]]
) -> None:
    """Raises a CheckpointError that lists how a checkpoint and a model differ, if they do.

    ``misshaped`` are keys with their shapes in the checkpoint and in the model.
    """
    misshaped = list(misshaped)
    elsewhere = {key for key, *_ in misshaped}
    problems: dict[str, list] = {
        "missing": sorted(key for key in missing if key not in elsewhere),
        "unexpected": sorted(unexpected),
        "of another shape (checkpoint, model)": misshaped,
    }
    found = [f"{len(keys)} keys {what}: {keys}" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            "the checkpoint does not fit the model of this config. " + "; ".join(found)
        )


def save_safetensors(model: torch.nn.Module, extra: Mapping[str, Any], path: str) -> None:
    """A model's weights as ``.safetensors``, with plain values that JSON can hold beside them."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "extra": json.dumps(extra)}
    write_atomically(path, lambda file: file.write(safetensors_bytes(state, metadata)))


def save_atomically(data: Any, path: str) -> None:
    """``torch.save``, such that ``path`` is whole or not there at all."""
    write_atomically(path, lambda file: torch.save(data, file))


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Gives a file its name only after all of it is on disk."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
