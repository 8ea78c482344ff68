"""The configs of ``configs/custom/``, for data of one's own."""

from pathlib import Path

import torch

from .config import ConfigError

ROOT = Path(__file__).parents[2]  # of the repository
PRESETS = ("nano", "small", "base", "large")


def default_preset() -> str:
    """The paper's model on a GPU, the smallest one without."""
    return "base" if torch.cuda.is_available() else "nano"


def find_preset(name: str | None = None) -> str:
    """Path of a preset's config file.

    Raises:
        ConfigError: the package was installed without its repository.
    """
    path = ROOT / "configs" / "custom" / f"{name or default_preset()}.py"
    if not path.is_file() or not (ROOT / "train_net.py").is_file():
        raise ConfigError(
            f"this needs the repository with train_net.py and configs/, which are not in {ROOT}; "
            "clone it and install it with pip install -e ."
        )
    return str(path)
