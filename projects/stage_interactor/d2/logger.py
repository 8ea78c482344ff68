"""Loggers that write to the terminal and to log.txt."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.utils.logger import setup_logger
else:
    from .embedded.logger import setup_logger

__all__ = [
    "setup_logger",
]
