"""Stands in for ``detectron2.engine.defaults``.

Left out: ``DefaultPredictor``, ``DefaultTrainer``, ``default_writers``, yacs configs, runs without
an output folder or a seed, colours in the logged config.
"""

import argparse
import os
import sys
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


def default_argument_parser() -> argparse.ArgumentParser:
    """The command line of a training script; ``opts`` takes config overrides ``key=value``."""
    program = sys.argv[0]
    parser = argparse.ArgumentParser(
        epilog=f"""examples:
  one machine with 8 GPUs:
    {program} --config-file cfg.py --num-gpus 8
  other settings:
    {program} --config-file cfg.py train.max_iter=1000 optimizer.lr=5e-5
  two machines:
    {program} --config-file cfg.py --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
    {program} --config-file cfg.py --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:PORT
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="path of the config")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in the output"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on each machine")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="which machine this is, from 0")
    # The port depends on the user only, so that a process left over from an earlier run shows
    # itself by an occupied port.
    user = os.getuid() if hasattr(os, "getuid") else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + user % 2**14}",
        help="where the processes meet, tcp://HOST:PORT",
    )
    parser.add_argument(
        "opts",
        default=None,
        nargs=argparse.REMAINDER,
        help="config overrides, key=value, after all flags",
    )
    return parser


def default_setup(cfg: DictConfig, args: Any) -> None:
    """Start a run: log files, environment, arguments and config, ``config.yaml``, random seeds.

    Args:
        cfg: its ``train`` has ``output_dir`` and ``seed`` (each process adds its rank), and may
            have ``cudnn_benchmark`` and ``float32_precision`` (``"highest"``, ``"high"`` or
            ``"medium"``; only with a GPU).
        args: of :func:`default_argument_parser`, or with a part of its attributes.
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
