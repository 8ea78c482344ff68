"""How a process computes while a run lasts: precision of products, determinism."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch

# PyTorch names it because of other sizes of windows: where they do not overlap nothing is added up.
_DETERMINISTIC_ALL_THE_SAME = "avg_pool2d_backward_cuda"


@contextmanager
def numerics(train: Mapping[str, Any]) -> Iterator[None]:
    """What a run sets of PyTorch, by its config or as detectron2 does, ends with the run.

    Args:
        train: the config's section. With ``deterministic`` operations have forms whose results
            depend on their inputs alone; PyTorch warns of those that have none.
    """
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    precision = torch.get_float32_matmul_precision()
    flags = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    algorithms = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = memory.fill_uninitialized_memory
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        with warnings.catch_warnings():
            if train.get("deterministic"):
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True, warn_only=True)
                memory.fill_uninitialized_memory = False
                cudnn.deterministic = True
                warnings.filterwarnings("ignore", message=_DETERMINISTIC_ALL_THE_SAME)
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = flags
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        memory.fill_uninitialized_memory = fills
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
