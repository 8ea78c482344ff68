"""StageInteractor: a query-based object detector with cross-stage interaction (ICCV 2023)."""

__version__ = "0.1.0"
