"""Stands in for ``detectron2.utils.comm``.

Left out: ``get_local_process_group``. Every function also works in a run of one process.
"""

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_local_group = None  # the processes of this machine; set by create_local_process_group


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes of the run, over all machines."""
    return dist.get_world_size() if _initialized() else 1


def get_rank() -> int:
    """Index of this process among all of the run."""
    return dist.get_rank() if _initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes logs, checkpoints and results."""
    return get_rank() == 0


@functools.lru_cache
def create_local_process_group(num_workers_per_machine: int) -> None:
    """Group the ranks of each machine. All processes must call it, after ``init_process_group``.

    Raises:
        ValueError: if the world size is not a multiple of ``num_workers_per_machine``.
    """
    global _local_group
    if get_world_size() % num_workers_per_machine:
        raise ValueError(
            f"{num_workers_per_machine} processes per machine do not divide the world size "
            f"{get_world_size()}."
        )
    for first in range(0, get_world_size(), num_workers_per_machine):
        ranks = list(range(first, first + num_workers_per_machine))
        group = dist.new_group(ranks)  # every process takes part in the creation of every group
        if get_rank() in ranks:
            _local_group = group


def forget_groups() -> None:
    """Lets go of all groups, so that ``destroy_process_group`` can end their threads."""
    global _local_group
    _local_group = None
    _cpu_group.cache_clear()


def _require_local_group():
    if _local_group is None:
        raise RuntimeError(
            "The processes of this machine have no group yet. Start the run with launch(), or call "
            "create_local_process_group() after torch.distributed.init_process_group()."
        )
    return _local_group


def get_local_rank() -> int:
    """Index of this process among those of its machine."""
    return dist.get_rank(group=_require_local_group()) if _initialized() else 0


def get_local_size() -> int:
    """Number of processes of the run on this machine."""
    return dist.get_world_size(group=_require_local_group()) if _initialized() else 1


def synchronize() -> None:
    """Wait until all processes have come here."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@functools.lru_cache
def _cpu_group():
    """A group of all ranks that carries pickled objects without using GPU memory."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD


def all_gather(data: Any, group=None) -> list:
    """Collect one picklable object per process; every process gets the list, in order of rank."""
    if get_world_size() == 1:
        return [data]
    group = group or _cpu_group()
    gathered = [None] * dist.get_world_size(group=group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group=None) -> list:
    """Collect one picklable object per process on rank ``dst``; the other ranks get ``[]``."""
    if get_world_size() == 1:
        return [data]
    group = group or _cpu_group()
    if dist.get_rank(group=group) != dst:
        dist.gather_object(data, None, dst=dst, group=group)
        return []
    gathered = [None] * dist.get_world_size(group=group)
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered


def shared_random_seed() -> int:
    """A random seed in ``[0, 2**31)`` that all processes agree on; all of them must call this."""
    return all_gather(np.random.randint(2**31))[0]


@torch.no_grad()
def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict:
    """Sum (or average) scalar tensors over all processes; only rank 0 gets the true result."""
    world_size = get_world_size()
    if world_size == 1:
        return input_dict
    names = sorted(input_dict)  # the same order in every process
    values = torch.stack([input_dict[name] for name in names])
    dist.reduce(values, dst=0)
    if average and get_rank() == 0:
        values /= world_size
    return dict(zip(names, values))
