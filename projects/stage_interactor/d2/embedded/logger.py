"""Stands in for ``detectron2.utils.logger``.

Left out: ``log_every_n`` and the like, logs on remote storage, and all options of the format. The
default logger is ``stage_interactor``, under which all modules of this runtime log.
"""

import logging
import os
import sys
from typing import Any

from tabulate import tabulate
from termcolor import colored

from ...writing import open_to_append
from .paths import PathManager

__all__ = ["setup_logger"]

_PLAIN = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
_TIME = "%m/%d %H:%M:%S"


class _ColorFormatter(logging.Formatter):
    """Green time stamp and logger name, marked warnings and errors."""

    def __init__(self) -> None:
        super().__init__(colored("[%(asctime)s %(name)s]: ", "green") + "%(message)s", _TIME)

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if record.levelno >= logging.WARNING:
            color = "yellow" if record.levelno == logging.WARNING else "red"
            line = colored(record.levelname, color) + " " + line
        return line


class _LogFile(logging.FileHandler):
    """That is not written through a link."""

    def _open(self) -> Any:
        return open_to_append(self.baseFilename)


def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    name: str = "stage_interactor",
) -> logging.Logger:
    """Let a logger write to the terminal (rank 0 only) and to a file (every rank its own).

    Calling it again adds no second handler for the same place.

    Args:
        output: a folder for ``log.txt``. Ranks above 0 append ``.rank<N>``. None writes no file.
        name: the logger; those below it, separated by dots, are included.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    present = {handler.get_name() for handler in logger.handlers}

    if distributed_rank == 0 and "terminal" not in present:
        terminal = logging.StreamHandler(sys.stdout)
        terminal.set_name("terminal")
        terminal.setFormatter(_ColorFormatter())
        logger.addHandler(terminal)

    if output is not None:
        path = os.path.join(output, "log.txt")
        if distributed_rank > 0:
            path += f".rank{distributed_rank}"
        path = os.path.abspath(path)
        if path not in present:
            PathManager.mkdirs(os.path.dirname(path))
            # appends, and is closed at exit by the logging module
            file = _LogFile(path)
            file.set_name(path)
            file.setFormatter(logging.Formatter(_PLAIN, _TIME))
            logger.addHandler(file)
    return logger


def create_wide_table(rows: list[tuple], headers: list[str], **options: Any) -> str:
    """A table of three rows beside one another, where there are so many."""
    return tabulate(
        [sum(rows[i : i + 3], ()) for i in range(0, len(rows), 3)],
        headers=headers * min(3, len(rows)),
        tablefmt="pipe",
        **options,
    )


def create_small_table(small_dict: dict) -> str:
    """A table of one row, with the keys of a dict as its header."""
    return tabulate(
        [list(small_dict.values())],
        headers=list(small_dict),
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )
