"""Stands in for ``detectron2.engine.defaults``.

Left out: ``DefaultPredictor``, ``DefaultTrainer``, ``default_writers``, yacs configs, runs without
an output folder or a seed, colours in the logged config; the command line is in ``commands/``.
"""

import os
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import comm
from .config import LazyConfig
from .env import collect_env_info, seed_all_rng
from .logger import setup_logger
from .paths import PathManager


def create_ddp_model(
    model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any
) -> nn.Module:
    """Wrap a model in DistributedDataParallel if the run has several processes.

    Args:
        fp16_compression: whether gradients are exchanged in half precision.
        **kwargs: for DistributedDataParallel. ``device_ids`` is this process's GPU if the model is
            on one.
    """
    if comm.get_world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        kwargs.setdefault("device_ids", [comm.get_local_rank()])
    ddp = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        ddp.register_comm_hook(state=None, hook=fp16_compress_hook)
    return ddp


def default_setup(cfg: DictConfig, args: Any) -> None:
    """Start a run: log files, environment, arguments and config, ``config.yaml``, random seeds.

    Args:
        cfg: its ``train`` has ``output_dir`` and ``seed`` (each process adds its rank), and may
            have ``cudnn_benchmark`` and ``float32_precision`` (``"highest"``, ``"high"`` or
            ``"medium"``; only with a GPU).
        args: with ``config_file`` and ``eval_only``, as of detectron2's command line.
    """
    output_dir = cfg.train.output_dir
    if comm.is_main_process():
        PathManager.mkdirs(output_dir)
    rank = comm.get_rank()
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    logger = setup_logger(output_dir, distributed_rank=rank)
    logger.info("Rank of this process: %d of %d", rank, comm.get_world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    config_file = getattr(args, "config_file", "")
    if config_file:
        with PathManager.open(config_file) as file:
            logger.info("Contents of %s:\n%s", config_file, file.read())
    if comm.is_main_process():
        path = os.path.join(output_dir, "config.yaml")
        LazyConfig.save(cfg, path)
        logger.info("The full config is saved in %s", path)

    seed_all_rng(cfg.train.seed + rank)
    if not getattr(args, "eval_only", False):  # not worth it for the few sizes of an evaluation
        torch.backends.cudnn.benchmark = cfg.train.get("cudnn_benchmark", False)
    precision = cfg.train.get("float32_precision")
    if precision and torch.cuda.is_available():
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
        logger.info("Precision of float32 products: %s", precision)
