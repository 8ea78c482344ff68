"""Files of weights: read without running anything in them, written whole or not at all."""

import contextlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from ..errors import UserError, naming

logger = logging.getLogger(__name__)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model."""


def read_checkpoint(path: str, *, mmap: bool = False) -> dict[str, Any]:
    """A ``.pth`` file of ours, a bare state dict, or a ``.safetensors`` file; on the CPU.

    No code in the file is run. With ``mmap`` tensors stay in the file, and are read when they are
    used.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is incomplete, or holds more than tensors and plain values, values that
            are not finite, no weights, or averages that do not fit the weights.
    """
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                loaded = {key: file.get_tensor(key) for key in file.keys()}
                extra = json.loads((file.metadata() or {}).get("extra", "{}"))
            loaded = {"model": loaded, **extra}
        else:
            mmap = mmap and zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be loaded safely (weights_only): it is "
            f"incomplete, or holds more than tensors and plain values ({error})"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, no weights")
    require_finite(loaded, path)
    checkpoint = loaded if "model" in loaded else {"model": loaded}
    states = _states(checkpoint, path)
    if "ema" in states:
        told = f"{path}: its averaged weights do not fit its trained ones"
        require_fit(*_differences(states["ema"], states["model"]), told, "averaged, trained")
    return checkpoint


def require_finite(loaded: Any, path: str) -> None:
    """Raises a CheckpointError that names the tensors of a loaded file with NaN or infinity."""
    if names := not_finite(loaded):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise CheckpointError(
            f"{path}: {len(names)} tensors hold NaN or infinite values: {shown}. The training that "
            "wrote it had diverged: take an earlier checkpoint (--resume takes the one that is "
            "named in last_checkpoint)"
        )


def not_finite(content: Any) -> list[str]:
    """Names of the tensors with NaN or infinity in nested mappings and lists."""
    flags: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in _tensors(content):
        flags.setdefault(tensor.device, {})[name] = tensor.isfinite().all()
    return [
        name
        for found in flags.values()  # one wait for each device
        for name, finite in zip(found, torch.stack([*found.values()]).tolist())
        if not finite
    ]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors and arrays of nested mappings and lists, by their names with dots."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}".lstrip("."))


def _states(checkpoint: Mapping[str, Any], path: str) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts ``model`` and, where there is one, ``ema``; keys as the model has them."""
    states = {}
    for part in ("model", "ema"):
        state = checkpoint.get(part) or {}
        others = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise CheckpointError(f"{path} holds no weights: {others[:3]} of {part} are no tensors")
        if state:
            # Averaging and several processes wrap a model in something.
            states[part] = {key.removeprefix("module."): value for key, value in state.items()}
    if "model" not in states:
        raise CheckpointError(f"{path} holds no weights")
    return states


def choose_weights(
    checkpoint: Mapping[str, Any], path: str, averaged: bool | None
) -> dict[str, torch.Tensor]:
    """Which weights of a checkpoint are used, one rule for all uses; the log says which.

    Args:
        checkpoint: of :func:`read_checkpoint`.
        averaged: None takes the averages over the training where there are any, True insists on
            them, False takes the trained weights.

    Raises:
        CheckpointError: averages are asked for and not there.
    """
    states = _states(checkpoint, path)
    if "ema" not in states:
        if averaged:
            raise CheckpointError(
                f"{path} holds no averaged weights; take what it holds, with "
                "train.model_ema.use_ema_weights_for_eval_only=null or averaged=None"
            )
        logger.info(f"Loading the weights of {path}, which holds no averages")
        return states["model"]
    if averaged is False:
        logger.info(f"Loading the trained weights, not their averages, of {path}")
        return states["model"]
    logger.info(f"Loading the averaged weights of {path}")
    return states["ema"]


def load_weights(model: nn.Module, path: str, *, averaged: bool | None = None) -> None:
    """Gives the model a checkpoint's weights, see :func:`choose_weights`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, does not fit the model, or holds no averages.
    """
    set_weights(model, choose_weights(read_checkpoint(path), path, averaged))


def set_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Gives the model weights; a CheckpointError if keys or shapes are others."""
    require_fit(*_differences(weights, model.state_dict()))
    model.load_state_dict(weights)


def _differences(
    theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]
) -> tuple[Iterable[str], Iterable[str], list[tuple[str, Any, Any]]]:
    """Keys that are missing, keys that are unexpected, and keys with both shapes."""
    misshaped = [
        (key, tuple(value.shape), tuple(ours[key].shape))
        for key, value in theirs.items()
        if key in ours and value.shape != ours[key].shape
    ]
    return ours.keys() - theirs.keys(), theirs.keys() - ours.keys(), misshaped


def require_fit(
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshaped: Iterable[tuple[str, Any, Any]],
    told: str = "the checkpoint does not fit the model of this config",
    sides: str = "checkpoint, model",
) -> None:
    """Raises a CheckpointError that lists how a checkpoint and a model differ, if they do.

    ``misshaped`` are keys with their shapes on both ``sides``.
    """
    misshaped = list(misshaped)
    elsewhere = {key for key, *_ in misshaped}
    problems: dict[str, list] = {
        "missing": sorted(key for key in missing if key not in elsewhere),
        "unexpected": sorted(unexpected),
        f"of another shape ({sides})": misshaped,
    }
    found = [f"{len(keys)} keys {what}: {keys}" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{told}. {'; '.join(found)}")


def save_safetensors(model: torch.nn.Module, extra: Mapping[str, Any], path: str) -> None:
    """A model's weights as ``.safetensors``, with plain values that JSON can hold beside them."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "extra": json.dumps(extra)}
    write_atomically(path, lambda file: file.write(safetensors_bytes(state, metadata)))


def save_atomically(data: Any, path: str) -> None:
    """``torch.save``, such that ``path`` is whole or not there at all.

    Raises:
        OSError: it cannot be written.
    """

    def save(file: IO[bytes]) -> None:
        try:
            torch.save(data, file)
        except RuntimeError as error:  # of its own format, while it handles that of the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(path, save)


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Gives a file its name only after all of it is on disk."""
    temporary = f"{path}.tmp"
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
