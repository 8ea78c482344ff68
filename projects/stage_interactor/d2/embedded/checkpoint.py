"""Stands in for ``detectron2.checkpoint``.

Left out: conversion of model-zoo and Caffe2 weights (``.pkl``), pycls weights (``.pyth``), and the
broadcast of a checkpoint that only the main process can read. Files are loaded with
``weights_only=True``: a checkpoint cannot run code.
"""

import pickle
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

from . import comm
from .paths import PathManager

__all__ = ["DetectionCheckpointer", "PeriodicCheckpointer"]


class DetectionCheckpointer(Checkpointer):
    """fvcore's checkpointer, writing on the main process only.

    Args:
        model: the model; a DistributedDataParallel wrapper is taken off.
        save_dir: folder of the checkpoints and of the file ``last_checkpoint``.
        save_to_disk: whether this process writes; by default if it is the main process.
        **checkpointables: what else to save and load by ``state_dict``, e.g. ``trainer=trainer``.
    """

    def __init__(self, model, save_dir: str = "", *, save_to_disk=None, **checkpointables):
        super().__init__(
            model,
            save_dir,
            save_to_disk=comm.is_main_process() if save_to_disk is None else save_to_disk,
            **checkpointables,
        )
        self.path_manager = PathManager

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a checkpoint, or a bare state dict as the model's part of one.

        Raises:
            ValueError: if the file holds more than tensors and plain Python data.
        """
        try:
            loaded = torch.load(filename, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"Checkpoint {filename} cannot be loaded safely: it is damaged, or holds objects "
                f"other than tensors and plain data ({error}). Save its state dict alone and load "
                "that."
            ) from error
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: dict):
        incompatible = super()._load_model(checkpoint)
        # The config sets the pixel statistics; a checkpoint without them is complete.
        buffers = dict(self.model.named_buffers(recurse=False))
        for name in ("pixel_mean", "pixel_std"):
            if name in buffers and name in incompatible.missing_keys:
                incompatible.missing_keys.remove(name)
        return incompatible
