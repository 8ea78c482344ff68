"""Stands in for ``detectron2.checkpoint``.

Left out: files other than fvcore's (model-zoo and Caffe2 weights, pycls weights, bare state dicts),
and the broadcast of a checkpoint that only the main process can read.
"""

from typing import Any

from fvcore.common.checkpoint import Checkpointer
from torch import nn

from . import comm
from .paths import PathManager

__all__ = ["DetectionCheckpointer"]


class DetectionCheckpointer(Checkpointer):
    """fvcore's checkpointer, writing on the main process only.

    Args:
        model: the model; a DistributedDataParallel wrapper is taken off.
        save_dir: folder of the checkpoints and of the file ``last_checkpoint``.
        save_to_disk: whether this process writes; by default if it is the main process.
        **checkpointables: what else to save and load by ``state_dict``, e.g. ``trainer=trainer``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        super().__init__(
            model,
            save_dir,
            save_to_disk=comm.is_main_process() if save_to_disk is None else save_to_disk,
            **checkpointables,
        )
        self.path_manager = PathManager

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        # The config sets the pixel statistics; a checkpoint without them is complete.
        buffers = dict(self.model.named_buffers(recurse=False))
        for name in ("pixel_mean", "pixel_std"):
            if name in buffers and name in incompatible.missing_keys:
                incompatible.missing_keys.remove(name)
        return incompatible
