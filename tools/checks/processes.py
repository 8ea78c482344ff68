"""Processes that a test or a tool starts: how they become a group, and leave it."""

import os
import socket

import torch
import torch.distributed as dist


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(rank: int, port: int, processes: int) -> None:
    """Makes a process one of a group with gloo, with one thread."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)


def leave() -> None:
    """Ends a process of a group, when all are done.

    Without the interpreter's clean-up, in which a thread of gloo that is still there would abort
    the process on a busy machine, after all that it had to do.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
