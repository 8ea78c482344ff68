"""Communication between the processes of a distributed run."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.comm import *
else:
    from detectron2.utils import comm as _comm
    from detectron2.utils.comm import (
        all_gather,
        create_local_process_group,
        get_local_rank,
        get_rank,
        get_world_size,
        is_main_process,
        synchronize,
    )

    def forget_groups() -> None:
        """Lets go of all groups, so that ``destroy_process_group`` can end their threads."""
        _comm._LOCAL_PROCESS_GROUP = None
        _comm._get_global_gloo_group.cache_clear()
