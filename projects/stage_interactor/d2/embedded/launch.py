"""Stands in for ``detectron2.engine.launch``.

Left out: a timeout of one's own. Unlike detectron2's it divides the CPU threads among the processes
of a machine without GPUs, where each would else take all of them, and closes the process group at
the end.
"""

import gc
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import comm

_TIMEOUT = timedelta(minutes=30)
logger = logging.getLogger(__name__)


def launch(
    main_func: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
) -> None:
    """Call ``main_func(*args)`` in every process of a run; a run of one process starts no other.

    Processes communicate by NCCL where there are GPUs, each process having one, else by gloo.

    Args:
        main_func: a function that can be imported, since processes are spawned.
        num_gpus_per_machine: processes on each machine.
        num_machines, machine_rank: how many machines take part, and which of them this is.
        dist_url: where processes meet, e.g. ``tcp://127.0.0.1:8686``; ``"auto"`` takes a free port
            of this machine.

    Raises:
        ValueError: for ``"auto"`` or no ``dist_url`` where one is needed.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if dist_url is None or (dist_url == "auto" and num_machines > 1):
        raise ValueError(
            f"dist_url is {dist_url!r}; {world_size} processes on {num_machines} machines need an "
            "address such as tcp://HOST:PORT ('auto' works for one machine)."
        )
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    if num_machines > 1 and dist_url.startswith("file://"):
        logger.warning("dist_url=%s: between machines tcp:// is more reliable.", dist_url)
    mp.start_processes(
        _run_worker,
        nprocs=num_gpus_per_machine,
        args=(main_func, world_size, num_gpus_per_machine, machine_rank, dist_url, args),
        daemon=False,  # they may start data loaders
    )


def _find_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run_worker(
    local_rank: int,
    main_func: Callable,
    world_size: int,
    num_per_machine: int,
    machine_rank: int,
    dist_url: str,
    args: tuple,
) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu and num_per_machine > torch.cuda.device_count():
        raise ValueError(
            f"{num_per_machine} processes were asked for, but there are only "
            f"{torch.cuda.device_count()} GPUs. Lower --num-gpus."
        )
    if not has_gpu:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_per_machine))
    rank = machine_rank * num_per_machine + local_rank
    try:
        dist.init_process_group(
            backend="nccl" if has_gpu else "gloo",
            init_method=dist_url,
            world_size=world_size,
            rank=rank,
            timeout=_TIMEOUT,
        )
    except Exception:
        logger.error("Process %d could not join the others at %s", rank, dist_url)
        raise
    if has_gpu:
        torch.cuda.set_device(local_rank)
    comm.create_local_process_group(num_per_machine)
    comm.synchronize()  # or fast processes may time out while slow ones still start
    main_func(*args)
    # Threads of a group that outlive the interpreter can abort the process at its end: nobody may
    # still talk to another, and nothing, not even garbage such as a wrapped model, hold a group.
    comm.synchronize()
    comm.forget_groups()
    gc.collect()
    dist.destroy_process_group()
