"""Stands in for ``detectron2.utils.comm``.

Left out: groups of one's own, ``get_local_size``, ``reduce_dict``, ``shared_random_seed``. Every
function also works in a run of one process.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "all_gather",
    "create_local_process_group",
    "forget_groups",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "is_main_process",
    "synchronize",
]

# The processes of this machine; set by create_local_process_group.
_local_group: "dist.ProcessGroup | None" = None


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
        if isinstance(group, dist.ProcessGroup):  # this process belongs to it
            _local_group = group


def forget_groups() -> None:
    """Lets go of all groups, so that ``destroy_process_group`` can end their threads."""
    global _local_group
    _local_group = None
    _cpu_group.cache_clear()


def get_local_rank() -> int:
    """Index of this process among those of its machine.

    Raises:
        RuntimeError: if the run has several processes and nobody has grouped them by machine.
    """
    if not _initialized():
        return 0
    if _local_group is None:
        raise RuntimeError(
            "The processes of this machine have no group yet. Start the run with launch(), or call "
            "create_local_process_group() after torch.distributed.init_process_group()."
        )
    return dist.get_rank(group=_local_group)


def synchronize() -> None:
    """Wait until all processes have come here."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@functools.lru_cache
def _cpu_group() -> "dist.ProcessGroup | None":
    """A group of all ranks that carries pickled objects without using GPU memory."""
    if dist.get_backend() != "nccl":
        return dist.group.WORLD
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank belongs to it
    return group


def all_gather(data: Any) -> list:
    """Collect one picklable object per process; every process gets the list, in order of rank."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, data, group=_cpu_group())
    return gathered


def gather(data: Any) -> list:
    """Collect one picklable object per process on rank 0; the other ranks get ``[]``."""
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(data, gathered, dst=0, group=_cpu_group())
    return gathered or []
