"""Lazy configs: descriptions of objects that are edited first and built later."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.config import LazyCall, LazyConfig, instantiate
else:
    from .embedded.config import LazyCall, LazyConfig, instantiate

__all__ = [
    "LazyCall",
    "LazyConfig",
    "instantiate",
]
