"""Lazy configs: descriptions of objects that are edited first and built later."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.config import *
else:
    from detectron2.config import LazyCall, LazyConfig, instantiate
