"""``stage-interactor report``: one page that tells how a run went."""

from .command import add_parser, write_report

__all__ = ["add_parser", "write_report"]
