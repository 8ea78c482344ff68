"""``stage-interactor report``: one page that tells how a run went."""

from .command import add_arguments, write_report

__all__ = ["add_arguments", "write_report"]
