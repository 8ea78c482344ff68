"""Buffers, such as BatchNorm's statistics: over a failed iteration, and over several processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..d2 import comm


def on_any_process(flags: Tensor) -> Tensor:
    """Flags, 0 or 1, that are set on any process; all of them must ask."""
    if comm.get_world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process; all of them must ask."""
    if comm.get_world_size() == 1:
        return flag
    return bool(on_any_process(torch.tensor(float(flag), device=device)).item())


class BufferSnapshot:
    """What training changes beside the weights: the buffers of modules in training mode, such as
    BatchNorm's running statistics.

    Args:
        model: buffers that it gets later are not seen.
    """

    def __init__(self, model: nn.Module):
        training = [module for module in model.modules() if module.training]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for module in training:
            for buffer in module.buffers(recurse=False):
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._groups = [(now, [b.clone() for b in now]) for now in by_dtype.values()]

    @torch.no_grad()
    def take(self) -> None:
        for now, then in self._groups:  # a few launches, however many there are
            torch._foreach_copy_(then, now)

    @torch.no_grad()
    def restore(self) -> None:
        for now, then in self._groups:
            torch._foreach_copy_(now, then)


def agree_on_buffers(model: nn.Module, *averages: nn.Module) -> None:
    """Every process gets the same buffers, so that what is evaluated is what is saved.

    Running statistics, of which each process has those of its own images, become their mean over
    the processes; of all other buffers the first process's are taken. All processes must call it.

    Args:
        model: in training mode, as it is trained.
        averages: of the model, over the training.
    """
    if comm.get_world_size() == 1:
        return
    statistics = {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.training
        for key, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }
    for module in (model, *averages):
        for name, buffer in module.named_buffers():
            if name in statistics:
                dist.all_reduce(buffer)
                buffer.div_(comm.get_world_size())
            else:
                dist.broadcast(buffer, 0)
