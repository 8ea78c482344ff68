"""One process of a run: sets it up, trains, evaluates, draws."""

import json
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from omegaconf import DictConfig, ListConfig
from torch import nn

from ..config import (
    ConfigError,
    instantiate,
    load_config,
    save_config,
    without_pretrained_weights,
)
from ..d2 import comm, describe_runtime
from ..d2.data import MetadataCatalog
from ..d2.engine import create_ddp_model, default_setup, hooks
from ..d2.evaluation import inference_on_dataset, print_csv_format
from ..d2.events import JSONWriter, TensorboardXWriter
from ..d2.logger import setup_logger
from ..data import categories_of, check_num_classes, check_readable, set_start_iteration
from ..inference.blueprint import Blueprint, keep_normalisation
from ..inference.prepare import check_options, prepare_for_inference
from ..inference.weights import CheckpointError, load_weights, read_checkpoint
from ..modeling import StageInteractor
from ..ops import current_ops
from ..pages.boxes import save_detection_grid
from .checkpoint import Checkpointer
from .hooks import (
    BestCheckpointer,
    ConsoleWriter,
    ModelEma,
    PeriodicCheckpointer,
    ProgressBar,
)
from .schedule import doubts
from .signals import StopOnSignal
from .trainer import NonFiniteError, Trainer
from .writers import SERVICES

logger = logging.getLogger(__name__)

PLAIN_INFERENCE = {"dtype": "float32", "compile": False, "bucket": 1}  # the model as it is


def do_test(cfg: DictConfig, model: StageInteractor, draw: bool = False) -> dict:
    """Evaluates on ``dataloader.test``: results.json, and with ``draw`` a grid of detections."""
    dataset = instantiate(cfg.dataloader.test.dataset)  # registers it, if it is not builtin
    loader = instantiate({**cfg.dataloader.test, "dataset": dataset})
    num_classes = instantiate(cfg.model.num_classes)
    check_num_classes(cfg.dataloader.evaluator.dataset_name, num_classes)
    evaluator = instantiate(cfg.dataloader.evaluator)
    inference = dict(cfg.train.get("inference") or {})
    prepared: nn.Module = model
    if any(inference.get(key, plain) != plain for key, plain in PLAIN_INFERENCE.items()):
        prepared = prepare_for_inference(model, **inference)
    results = inference_on_dataset(prepared, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
        with open(os.path.join(cfg.train.output_dir, "results.json"), "w") as file:
            json.dump(results, file, indent=2)
        if draw:
            draw_detections(cfg, dataset)
    return results


def draw_detections(cfg: DictConfig, dataset: list[dict]) -> None:
    """A grid of images with detections beside ground truth, from the evaluator's results file.

    Pictures are not worth a result: what keeps them from being drawn is a warning.
    """
    path = os.path.join(cfg.train.output_dir, "detections.jpg")
    try:
        folder = cfg.dataloader.evaluator.get("output_dir") or cfg.train.output_dir
        with open(os.path.join(folder, "coco_instances_results.json")) as file:
            predictions = json.load(file)
        metadata = MetadataCatalog.get(cfg.dataloader.evaluator.dataset_name)
        to_dataset_id = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
        save_detection_grid(
            path, dataset, predictions, metadata.thing_classes, to_dataset_id, **cfg.train.pictures
        )
    except Exception as error:
        logger.warning(f"{path} could not be drawn: {type(error).__name__}: {error}")
    else:
        logger.info(f"Detections beside ground truth: {path}")


def build_model(cfg: DictConfig) -> StageInteractor:
    model = instantiate(cfg.model).to(cfg.train.device)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        f"Model: {parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained"
    )
    mean, std, source = model.normalisation
    order = cfg.dataloader.test.mapper.get("image_format", "RGB")
    logger.info(f"Input: {order} of 0 to 255, mean {mean}, std {std} ({source})")
    # Plain numbers from here on: a checkpoint's blueprint must not depend on timm's version.
    cfg.model.update(pixel_mean=list(mean), pixel_std=list(std))
    return model


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    cfg.optimizer.params.model = None
    for group in optimizer.param_groups:
        # The config's own lists would be in every checkpoint, which could not be read again: they
        # are no plain values. torch's Adam makes tuples of them, others do not.
        group.update({k: tuple(v) for k, v in group.items() if isinstance(v, ListConfig)})
    return optimizer


def distributed(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """The model wrapped for several processes, on GPUs or on CPUs."""
    options = dict(cfg.train.ddp)
    if not cfg.train.device.startswith("cuda"):
        options["device_ids"] = None
    return create_ddp_model(model, **options)


def check_evaluated(cfg: DictConfig) -> None:
    """Raises for pictures that the first evaluation would end at, hours later."""
    records = instantiate(cfg.dataloader.test.dataset)
    files = [record["file_name"] for record in records if "file_name" in record]
    check_readable(list(dict.fromkeys(files)))


def do_train(cfg: DictConfig, resume: bool) -> None:
    output_dir, max_iter = cfg.train.output_dir, cfg.train.max_iter
    if resume and os.path.isfile(os.path.join(output_dir, "last_checkpoint")):
        without_pretrained_weights(cfg)
    model = build_model(cfg)
    ema = ModelEma(model, cfg.train.model_ema.decay) if cfg.train.model_ema.enabled else None

    optimizer = build_optimizer(cfg, model)
    loader = instantiate(cfg.dataloader.train)
    dataset_name = cfg.dataloader.train.dataset.get("name") or cfg.dataloader.train.dataset.names
    check_num_classes(dataset_name, model.num_classes)
    if comm.is_main_process():
        check_evaluated(cfg)
    trainer = Trainer(
        distributed(cfg, model),
        loader,
        optimizer,
        amp=cfg.train.amp,
        clip_grad=cfg.train.clip_grad,
        accumulation_steps=cfg.train.accumulation_steps,
        seed=cfg.train.seed,
    )
    checkpointables: dict[str, Any] = {"trainer": trainer} | ({"ema": ema.average} if ema else {})
    blueprint = Blueprint.of_run(cfg, categories_of(dataset_name))
    checkpointer = Checkpointer(model, output_dir, extra=blueprint.as_extra(), **checkpointables)

    def evaluate() -> dict:
        # The last evaluation also draws; its iteration counter stands at the end already.
        return do_test(cfg, ema.average.module if ema else model, draw=trainer.iter >= max_iter)

    main_process = comm.is_main_process()
    services = []
    for name, writer in SERVICES.items() if main_process else ():
        service = cfg.train.get(name) or {}
        if service.get("enabled"):
            config = {**blueprint.config, "output_dir": output_dir}
            services.append(writer(output_dir, config, **(service.get("params") or {})))
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            ema,
            PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main_process else None,
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            BestCheckpointer(cfg.train.eval_period, checkpointer, **cfg.train.best_checkpointer)
            if main_process
            else None,
            hooks.PeriodicWriter(
                [
                    ConsoleWriter(max_iter),
                    JSONWriter(os.path.join(output_dir, "metrics.json")),
                    TensorboardXWriter(output_dir),
                    *services,
                ],
                period=cfg.train.log_period,
            )
            if main_process
            else None,
            ProgressBar(),
            StopOnSignal(checkpointer),
        ]
    )

    start_iter = 0
    if resume and checkpointer.has_checkpoint():
        checkpointer.load(checkpointer.get_checkpoint_file())
        start_iter = trainer.iter + 1
        try:
            set_start_iteration(loader, start_iter)
        except TypeError as error:  # another project's loader
            logger.warning(f"The order of the images starts anew: {error}")
    elif cfg.train.init_checkpoint:
        path = cfg.train.init_checkpoint
        if "://" not in path and not os.path.isfile(path):
            raise CheckpointError(f"train.init_checkpoint={path}: there is no such file")
        Checkpointer(model, strict=False, extra=blueprint.as_extra()).load(
            cfg.train.init_checkpoint
        )
        if ema:
            ema.average.set(model)
    if start_iter >= max_iter:
        logger.info(f"Nothing to train: the checkpoint is of iteration {start_iter} of {max_iter}")
        do_test(cfg, ema.average.module if ema else model, draw=True)
        return
    try:
        trainer.train(start_iter, max_iter)
    except NonFiniteError as error:
        trainer.iter -= 1  # the last iteration that was finished
        name = f"model_{max(trainer.iter, 0):07d}"
        checkpointer.save(name, iteration=trainer.iter)
        raise NonFiniteError(
            f"{error}\nThe state from before this iteration is saved as "
            f"{os.path.join(output_dir, name)}.pth. Look at these images, lower optimizer.lr, or "
            "switch train.amp.enabled off, and go on with --resume."
        ) from error
    if main_process:
        logger.info(
            f"Finished. Checkpoint: {output_dir}/model_final.pth; metrics: "
            f"{output_dir}/metrics.json; pictures: {output_dir}/detections.jpg; predictions: "
            f"{output_dir}/coco_instances_results.json. A page about the run: "
            f"stage-interactor report {output_dir}"
        )


def do_eval_only(cfg: DictConfig) -> dict:
    if not cfg.train.init_checkpoint:
        raise ConfigError("--eval-only needs the weights: train.init_checkpoint=path/to/model.pth")
    without_pretrained_weights(cfg)
    model = build_model(cfg)
    averaged = cfg.train.model_ema.use_ema_weights_for_eval_only
    load_weights(model, cfg.train.init_checkpoint, averaged=averaged)
    return do_test(cfg, model, draw=True)


class Job(NamedTuple):
    """What all processes of a run are told."""

    config: DictConfig | None  # None: read from the file
    config_file: str  # empty for a config that came from none
    overrides: tuple[str, ...]
    resume: bool
    eval_only: bool
    notes: tuple[str, ...] = ()  # for the log


def holds_training(folder: str) -> bool:
    """Whether a training was begun in a folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return any(
        re.fullmatch(r"metrics\.json|last_checkpoint|model_\w+\.pth", name) for name in names
    )


def check_folders(cfg: DictConfig) -> None:
    """Raises a ConfigError if the evaluation's predictions would replace those of another run."""
    output_dir = cfg.train.output_dir
    predictions = cfg.dataloader.evaluator.get("output_dir") or output_dir
    if os.path.realpath(predictions) != os.path.realpath(output_dir) and holds_training(
        predictions
    ):
        raise ConfigError(
            f"dataloader.evaluator.output_dir={predictions} holds another run than this one of "
            f"train.output_dir={output_dir}, whose predictions would be written over; add "
            "dataloader.evaluator.output_dir='${train.output_dir}'"
        )


def run(job: Job) -> None:
    """Trains, or evaluates, in a process of the run."""
    cfg = job.config or load_config(job.config_file, job.overrides)
    check_folders(cfg)
    if cfg.train.seed < 0:
        raise ConfigError(f"train.seed must be 0 or larger, got {cfg.train.seed}")
    try:
        check_options(**(cfg.train.get("inference") or {}))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # What detectron2 reads, and logs, of its command line.
    arguments = SimpleNamespace(
        config_file=job.config_file,
        opts=list(job.overrides),
        resume=job.resume,
        eval_only=job.eval_only,
    )
    default_setup(cfg, arguments)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="stage_interactor")
    logger.info(describe_runtime())
    for note in job.notes:
        logger.info(note)
    if comm.is_main_process():
        # detectron2's name for it, written by default_setup with its keys sorted, and ours.
        for name in ("config.yaml", "config_resolved.yaml"):
            save_config(cfg, os.path.join(cfg.train.output_dir, name))
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        cfg.train.device = "cpu"  # of this run: the saved config is for any machine
    if current_ops() != "fast":
        logger.info(f"Operations: {current_ops()} (STAGE_INTERACTOR_OPS)")
    if cfg.train.device == "cpu":
        logger.info(f"Running on the CPU with {torch.get_num_threads()} threads a process")
    start = cfg.train.init_checkpoint
    last = Path(cfg.train.output_dir, "last_checkpoint")
    if job.resume and not job.eval_only and last.is_file():
        start = str(last.with_name(last.read_text().strip()))
    if os.path.isfile(start) and not start.endswith(".pkl"):  # others are told when it is loaded
        keep_normalisation(cfg, read_checkpoint(start, mmap=True))
    if job.eval_only:
        do_eval_only(cfg)
    else:
        for doubt in doubts(cfg.lr_multiplier, cfg.train.max_iter):
            logger.warning(doubt)
        do_train(cfg, job.resume)


def run_under_torchrun(job: Job) -> None:
    """torchrun has started the processes already: join them."""
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    run(job)
    dist.barrier()  # what the first process writes is there when any goes on
    dist.destroy_process_group()
