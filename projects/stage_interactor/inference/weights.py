"""Files of weights: read without running anything in them, written whole or not at all."""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from ..untrusted.tensors import CheckpointError, load_tensors, shown
from ..writing import write_atomically as write_atomically
from .schema import KEY, Misfit, require_blueprint

logger = logging.getLogger(__name__)

_SHOWN = 8  # keys, where many differ


def read_checkpoint(path: str, *, mmap: bool = False) -> dict[str, Any]:
    """A ``.pth`` file of ours, a bare state dict, or a ``.safetensors`` file; on the CPU.

    No code in the file is run. With ``mmap`` tensors stay in the file, and are read when they are
    used.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is incomplete or damaged, or holds more than tensors and plain values,
            values that are not finite, tensors that claim more than the file holds, no weights,
            averages that do not fit the weights, or a blueprint that is none.
    """
    loaded = load_tensors(path, mmap=mmap)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, no weights")
    checkpoint = loaded if "model" in loaded else {"model": loaded}
    states = _states(checkpoint, path)
    if "ema" in states:
        told = f"{path}: its averaged weights do not fit its trained ones"
        require_fit(*differences(states["ema"], states["model"]), told, "averaged, trained")
    if KEY in checkpoint:
        try:
            require_blueprint(checkpoint[KEY])
        except Misfit as misfit:
            raise CheckpointError(f"{path}: its blueprint is damaged: {misfit}") from misfit
    return checkpoint


def _states(checkpoint: Mapping[str, Any], path: str) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts ``model`` and, where there is one, ``ema``; keys as the model has them."""
    states = {}
    for part in ("model", "ema"):
        state = {} if checkpoint.get(part) is None else checkpoint[part]
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{path} holds no weights: {part} is {shown(state)}")
        if any(not isinstance(key, str) for key in state):
            raise CheckpointError(f"{path} holds no weights: keys of {part} are no names")
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
    require_fit(*differences(weights, model.state_dict()))
    model.load_state_dict(weights)


def differences(
    theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]
) -> tuple[Iterable[str], Iterable[str], list[tuple[str, Any, Any]]]:
    """Keys that are missing, keys that are unexpected, and keys with both shapes, or kinds."""
    misshaped: list[tuple[str, Any, Any]] = []
    for key in theirs.keys() & ours.keys():
        one, other = theirs[key], ours[key]
        if one.shape != other.shape:
            misshaped.append((key, tuple(one.shape), tuple(other.shape)))
        elif other.is_floating_point() and not one.is_floating_point():  # cut to whole numbers
            misshaped.append((key, one.dtype, other.dtype))
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
        f"of another shape ({sides})": sorted(misshaped, key=lambda found: found[0]),
    }
    found = [
        f"{len(keys)} keys {what}: {keys[:_SHOWN]}" + (" and others" if len(keys) > _SHOWN else "")
        for what, keys in problems.items()
        if keys
    ]
    if found:
        raise CheckpointError(f"{told}. {'; '.join(found)}")


def save_safetensors(model: torch.nn.Module, extra: Mapping[str, Any], path: str) -> None:
    """A model's weights as ``.safetensors``, with plain values that JSON can hold beside them."""
    write_safetensors(model.state_dict(), extra, path)


def write_safetensors(
    weights: Mapping[str, torch.Tensor], extra: Mapping[str, Any], path: str
) -> None:
    """A state dict as :func:`save_safetensors` writes a model's."""
    state = {key: value.contiguous() for key, value in weights.items()}
    metadata = {"format": "pt", "extra": json.dumps(extra)}
    write_atomically(path, lambda file: file.write(safetensors_bytes(state, metadata)))


def save_atomically(data: Any, path: str) -> None:
    """``torch.save``, such that ``path`` is whole or not there at all."""
    write_atomically(path, lambda file: torch.save(data, file))
