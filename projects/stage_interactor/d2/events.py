"""Scalars of a training run and the writers that report them."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.events import *
else:
    from detectron2.utils.events import (
        EventStorage,
        EventWriter,
        get_event_storage,
    )
