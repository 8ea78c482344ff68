"""detectron2 where it is installed, a small stand-in where it is not.

Nothing outside this package imports detectron2. The choice is made here, once per process:

* ``STAGE_INTERACTOR_RUNTIME=detectron2`` or ``=embedded`` decides, if it is set;
* otherwise detectron2 is used if it is installed, and :mod:`.embedded` if not.

An installed detectron2 that cannot be imported is an error: results must never depend on a
switch that nobody noticed.

Each module here hands on a few names, those of detectron2 or those of ``__all__`` in the module of
:mod:`.embedded` that is called the same. Type checkers see the stand-in's, which have types.

Attributes:
    RUNTIME (str): ``"detectron2"`` or ``"embedded"``.
"""

import importlib
import importlib.util
import os

__all__ = ["RUNTIME", "describe_runtime"]

_VARIABLE = "STAGE_INTERACTOR_RUNTIME"
_INSTALL = "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git"


def _choose_runtime() -> str:
    requested = os.environ.get(_VARIABLE, "")
    if requested not in ("", "detectron2", "embedded"):
        raise ValueError(
            f"The environment variable {_VARIABLE} is {requested!r}; it must be 'detectron2', "
            "'embedded', or unset to use detectron2 where it is installed."
        )
    if requested == "embedded":
        return "embedded"

    # A plain folder that happens to be called detectron2 (the root of a checkout in the current
    # directory) is found as a namespace package, without a file of its own: not an installation.
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        if requested == "detectron2":
            raise ImportError(
                f"The environment variable {_VARIABLE} asks for detectron2, which is not installed."
                f" Install it with `{_INSTALL}`, or set {_VARIABLE}=embedded."
            )
        return "embedded"

    try:
        importlib.import_module("detectron2")
    except Exception as error:
        raise ImportError(
            f"detectron2 is installed at {spec.origin} but cannot be imported "
            f"({type(error).__name__}: {error}). Reinstall it with `{_INSTALL}`, or set "
            f"{_VARIABLE}=embedded to run without it."
        ) from error
    return "detectron2"


RUNTIME = _choose_runtime()


def describe_runtime() -> str:
    """One line for logs: which runtime this process uses, its version, and who chose it."""
    chosen = f"set by {_VARIABLE}" if os.environ.get(_VARIABLE) else "found by import"
    if RUNTIME == "detectron2":
        version = importlib.import_module("detectron2").__version__
        return f"Runtime: detectron2 {version} ({chosen})"
    from .. import __version__

    return f"Runtime: embedded stand-in for detectron2, stage_interactor {__version__} ({chosen})"
