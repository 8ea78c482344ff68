"""Loggers that write to the terminal and to log.txt."""

from typing import TYPE_CHECKING

from . import RUNTIME

if TYPE_CHECKING or RUNTIME == "embedded":
    from .embedded.logger import *
else:
    from detectron2.utils.logger import setup_logger
