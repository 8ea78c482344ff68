"""Stands in for ``detectron2.utils.env`` and ``detectron2.utils.collect_env``.

Left out: ``DETECTRON2_ENV_MODULE``, seeds drawn by chance, and the details of CUDA compilers and
compiled extensions.
"""

import importlib.metadata
import os
import platform
import random
import sys

import numpy as np
import torch
from tabulate import tabulate

_PACKAGES = "torchvision timm numpy Pillow fvcore iopath omegaconf hydra-core pycocotools".split()


def seed_all_rng(seed: int) -> None:
    """Seed torch (all devices), numpy and ``random``."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)  # for the Python processes that this one starts


def collect_env_info() -> str:
    """A table of versions and devices, for the start of a log."""
    from .. import describe_runtime

    rows = [
        ("sys.platform", sys.platform),
        ("Python", platform.python_version()),
        ("Runtime", describe_runtime()),
        ("PyTorch", f"{torch.__version__} from {os.path.dirname(torch.__file__)}"),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    rows.append(("CPU threads", str(torch.get_num_threads())))
    rows.append(("GPU available", str(torch.cuda.is_available())))
    for index in range(torch.cuda.device_count()):
        rows.append((f"GPU {index}", torch.cuda.get_device_name(index)))
    if torch.cuda.is_available():
        rows.append(("CUDA", str(torch.version.cuda)))
        rows.append(("cuDNN", str(torch.backends.cudnn.version())))
    return tabulate(rows)
