"""Loggers that write to the terminal and to log.txt."""

from . import RUNTIME

if RUNTIME == "detectron2":
    from detectron2.utils.logger import create_small_table, setup_logger
else:
    from .embedded.logger import create_small_table, setup_logger

__all__ = [
    "create_small_table",
    "setup_logger",
]
