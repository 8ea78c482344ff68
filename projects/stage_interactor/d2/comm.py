"""Communication between the processes of a distributed run."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.utils.comm import (
        all_gather,
        create_local_process_group,
        get_local_rank,
        get_rank,
        get_world_size,
        is_main_process,
    )
else:
    from .embedded.comm import (
        all_gather,
        create_local_process_group,
        get_local_rank,
        get_rank,
        get_world_size,
        is_main_process,
    )

__all__ = [
    "all_gather",
    "create_local_process_group",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "is_main_process",
]
