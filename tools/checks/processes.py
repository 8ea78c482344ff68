"""Ends of processes that a test has started."""

import os

import torch.distributed as dist


def leave() -> None:
    """Ends a process of a group, when all are done.

    Without the interpreter's clean-up, in which a thread of gloo that is still there would abort
    the process on a busy machine, after all that it had to do.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
