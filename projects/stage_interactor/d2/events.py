"""Scalars of a training run and the writers that report them."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.utils.events import (
        EventStorage,
        EventWriter,
        JSONWriter,
        TensorboardXWriter,
        get_event_storage,
    )
else:
    from .embedded.events import (
        EventStorage,
        EventWriter,
        JSONWriter,
        TensorboardXWriter,
        get_event_storage,
    )

__all__ = [
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
]
