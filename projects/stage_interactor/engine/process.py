"""One process of a run: sets it up, trains, evaluates, draws."""

import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import (
    ConfigError,
    build,
    flatten,
    load_config,
    save_config,
    without_pretrained_weights,
)
from ..d2 import comm, describe_runtime
from ..d2.engine import create_ddp_model, default_setup, hooks
from ..d2.events import EventWriter
from ..d2.logger import setup_logger
from ..data import Part, set_start_iteration
from ..errors import UserError, explain, naming
from ..inference.blueprint import KEY, Blueprint, class_names_in, keep_normalisation
from ..inference.hub import local_file
from ..inference.precision import half_is_faster
from ..inference.prepare import AUTO, DTYPES, require_compilable
from ..inference.schema import THRESHOLDS
from ..inference.weights import choose_weights, read_checkpoint, set_weights
from ..locking import FolderInUseError, folder_lock
from ..modeling import StageInteractor
from ..modeling.extensions.combined import require_parts_that_fit
from ..ops import current_ops
from ..ops.memory import kept_memory
from ..untrusted.pictures import limit_pixels
from ..untrusted.tensors import CheckpointError
from ..writing import refuse_links
from .checkpoint import Checkpointer
from .early_stopping import EarlyStopping, StoppedEarly
from .evaluation import (
    check_before_training,
    check_evaluation,
    do_test,
    draw_detections,
)
from .hooks import ConsoleWriter, LearningRate, ModelEma, ProgressBar
from .launch import Place, process_group, reason
from .milestones import Best, Milestones, RunState
from .numerics import numerics
from .parameters import freeze
from .resume import (
    Previous,
    check_resumable,
    check_same_classes,
    check_weights_fit,
    checkpoint_to_resume,
    checkpoints_before,
    holds_training,
    last_checkpoint,
    leave_job_id,
    remove_leftovers,
    set_aside,
)
from .schedule import doubts
from .settings import unread_keys
from .signals import GRACE, SIGNALS, StopOnSignal, Stopped
from .trainer import NonFiniteError, Trainer
from .training_data import TrainingData, weigh_classes
from .writers import SERVICES, MetricsWriter, TensorboardWriter

logger = logging.getLogger(__name__)

LOGGERS = ("detectron2", "fvcore", "stage_interactor")
_SAFE_RATE = 1e-4  # of AdamW, for batches of any size


class RunError(UserError):
    """What a machine did to a training; the message says what is left of it."""


def end_at_errors_of_logs() -> None:
    """A log file that cannot be written ends the run, as any other file of it does.

    Left to itself, ``logging`` prints a trace for every line. A terminal that went away is no loss.
    """

    def handle(handler: logging.Handler, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        stream = getattr(handler, "stream", None)
        if not isinstance(error, OSError) or stream in (None, sys.stdout, sys.stderr):
            return
        with contextlib.suppress(OSError):  # what it still holds cannot be written either
            stream.close()
        raise OSError(error.errno, error.strerror, getattr(stream, "name", "log.txt")) from error

    for name in LOGGERS:
        for handler in logging.getLogger(name).handlers:
            handler.handleError = functools.partial(handle, handler)  # type: ignore[method-assign]


def build_model(cfg: DictConfig) -> StageInteractor:
    model = build(cfg, "model").to(cfg.train.device)
    freeze(model, cfg.train.get("freeze") or ())
    if (cfg.train.get("inference") or {}).get("compile"):
        require_compilable(model)  # before hours of training
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
    optimizer = build(cfg, "optimizer")
    cfg.optimizer.params.model = None
    sizes = [
        (group["lr"], sum(p.numel() for p in group["params"])) for group in optimizer.param_groups
    ]
    still = sum(size for rate, size in sizes if rate == 0)
    if 0 < still < sum(size for _, size in sizes):  # of all, doubts() says it
        logger.warning(
            f"{still / 1e6:.1f} M of the parameters that are trained have a learning rate of 0 "
            "(optimizer.params): train.freeze takes a part out of training, which costs less"
        )
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
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
        # What later versions of PyTorch call it, which warn of the name that earlier ones have.
        own = options.pop("broadcast_buffers", True)  # as DistributedDataParallel has it
        options.setdefault("forward_sync_buffers", own)
    return create_ddp_model(model, **options)


def continue_data(
    loader: Any, start_iter: int, parts: Sequence[Part], content: Mapping[str, Any]
) -> list[Part]:
    """Images go on where those of the iterations before end, however large batches were.

    Args:
        parts: of the training, as its checkpoint has them; earlier versions did not say.
        content: of the checkpoint.
    """
    if start_iter and not parts:
        theirs = content.get(KEY, {}).get("config", {}).get("dataloader", {}).get("train", {})
        size, processes = theirs.get("total_batch_size"), comm.get_world_size()
        if size and size % processes == 0:
            grouped = bool(theirs.get("aspect_ratio_grouping", True))
            parts = [Part(start_iter, size // processes, processes, grouped)]
    try:
        new = set_start_iteration(loader, start_iter, parts)
    except TypeError as error:  # another project's loader
        if start_iter:
            logger.warning(f"The order of the images starts anew: {error}")
        return []
    if parts and new[-1].world_size != parts[-1].world_size:
        logger.warning(
            f"changed on resume: processes, {parts[-1].world_size}, {new[-1].world_size}"
        )
    return new


@contextlib.contextmanager
def unfit_state(path: str) -> Iterator[None]:
    """A checkpoint whose state cannot be taken over is told as such, whatever is in it."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} holds no state of a training of this kind ({told})"
        ) from error


def begin_with_weights(cfg: DictConfig, model: StageInteractor, blueprint: Blueprint) -> None:
    """Gives the model those of ``train.init_checkpoint``, a file or an address, as far as they fit.

    Raises:
        CheckpointError: they cannot be had.
    """
    path = local_file(cfg.train.init_checkpoint)
    if "://" not in path and not os.path.isfile(path):
        raise CheckpointError(f"train.init_checkpoint={path}: there is no such file")
    averaged = cfg.train.model_ema.get("use_ema_weights_for_eval_only")
    beginning = Checkpointer(
        model,
        strict=False,
        averaged=False if averaged is False else None,
        extra=blueprint.as_extra(),
    )
    try:
        beginning.load(path)
    except (AssertionError, OSError) as error:  # fvcore's, of what it cannot download
        if "://" not in path:
            raise
        raise CheckpointError(f"train.init_checkpoint={path} cannot be had: {error}") from error


def settle_precision(cfg: DictConfig, previous: Previous | None) -> list[str]:
    """Replaces ``"auto"`` by what it means here, the same on all processes; what to say of it.

    A run that goes on keeps the precision that it began with, on whatever machine.
    """
    theirs = previous.content.get(KEY, {}).get("config", {}) if previous else {}
    device = torch.device(device_of(cfg))
    told = []
    for key, dtype, values in (
        ("train.amp.enabled", DTYPES[cfg.train.amp.get("dtype", "bfloat16")], (False, True)),
        ("train.inference.dtype", torch.bfloat16, tuple(DTYPES)),
    ):
        if OmegaConf.select(cfg, key) != AUTO:
            continue
        value = flatten(theirs, ".").get(key)
        if value in values and type(value) is type(values[0]):
            reason = f"{str(value).lower()}, as the run began"
        else:
            measured = half_is_faster(dtype, device) if comm.is_main_process() else None
            half, reason = next(found for found in comm.all_gather(measured) if found)
            value = values[half]
        OmegaConf.update(cfg, key, value)
        told.append(f"{key}=auto: {reason}")
    return told


def device_of(cfg: DictConfig) -> str:
    """``train.device``, or the CPU for CUDA that is not there."""
    there = torch.cuda.is_available() or not cfg.train.device.startswith("cuda")
    return cfg.train.device if there else "cpu"


def do_train(cfg: DictConfig, resume: bool, previous: Previous | None) -> None:
    output_dir, max_iter = cfg.train.output_dir, cfg.train.max_iter
    if previous:
        without_pretrained_weights(cfg)
    start, content = previous or (local_file(cfg.train.init_checkpoint or ""), {})
    if not previous and os.path.isfile(start) and not start.endswith(".pkl"):
        content = read_checkpoint(start, mmap=True)  # others are told when they are loaded
    if content:
        keep_normalisation(cfg, content)
    changes = check_resumable(previous, cfg) if previous else []
    model = build_model(cfg)
    require_parts_that_fit(model)
    if previous:
        check_weights_fit(previous, model, changes)

    optimizer = build_optimizer(cfg, model)
    data = TrainingData.read(cfg, model.num_classes, content, start)
    names = model.class_names = data.class_names
    check_before_training(cfg, names, data.whose, data.records)
    weigh_classes(cfg, model, data)
    loader = build(cfg, "dataloader.train", dataset=data.records)
    blueprint = Blueprint.of_run(cfg, data.categories)
    fingerprint = data.fingerprint
    del data  # whose records the loader keeps, packed
    if previous:
        check_same_classes(previous, names)
    for change in changes:
        logger.warning(f"changed on resume: {change}")
    trainer = Trainer(
        distributed(cfg, model),
        loader,
        optimizer,
        amp=cfg.train.amp,
        clip_grad=cfg.train.clip_grad,
        accumulation_steps=cfg.train.accumulation_steps,
        cuda_graph=cfg.train.get("cuda_graph", "auto"),
        fold_norms=cfg.train.get("fold_norms", "auto"),
        seed=cfg.train.seed,
    )
    ema = ModelEma(model, cfg.train.model_ema.decay) if cfg.train.model_ema.enabled else None
    state = RunState()
    checkpointables: dict[str, Any] = {"trainer": trainer, "run": state}
    if ema:
        checkpointables["ema"] = ema.average
    checkpointer = Checkpointer(model, output_dir, extra=blueprint.as_extra(), **checkpointables)

    start_iter = 0
    if previous:
        with unfit_state(start):
            checkpointer.take(content, start)
        start_iter = trainer.iter + 1
        state.best = Best.in_folder(output_dir)
        if "run" not in checkpointer.found:  # of an earlier version
            state.written = trainer.iter
        if ema and "ema" not in checkpointer.found:
            ema.average.set(model)
            logger.info("The averages of the weights begin with those of the checkpoint")
        elif not ema and "ema" in checkpointer.found:
            logger.warning("The averages of the checkpoint end here: train.model_ema.enabled=false")
    else:
        if resume:
            logger.info(f"There is no checkpoint in {output_dir} to resume from: a new run")
        if start:
            begin_with_weights(cfg, model, blueprint)
            if ema:
                ema.average.set(model)
    state.parts = continue_data(loader, start_iter, state.parts, content)
    if state.data not in ("", fingerprint):
        logger.warning(
            "changed on resume: the images that are trained on, or their order: what comes next is "
            "not what would have come"
        )
    state.data = fingerprint

    evaluated = ema.average.module if ema else model
    if previous:
        evaluated.thresholds = content.get(KEY, {}).get(THRESHOLDS)

    def describe(is_evaluated: bool) -> dict:
        thresholds = evaluated.thresholds if is_evaluated else None
        return replace(blueprint, thresholds=thresholds).as_extra()

    # A kill may have come before the last of the last iteration's files.
    early_stopping = EarlyStopping(**cfg.train.get("early_stopping", {}))
    ended_early = early_stopping.ends(state.waiting)
    whole = start.endswith("model_final.pth")
    unfinished = start_iter == max_iter and not whole
    ended = ended_early and whole or start_iter >= max_iter and not unfinished
    if ended and not state.pending:
        logger.info(f"Nothing to train: the checkpoint is of iteration {start_iter} of {max_iter}")
        if ended_early and start_iter < max_iter:
            logger.info(f"The run has ended early: {early_stopping.told(state.waiting)}")
        do_test(cfg, evaluated, draw=True)
        return
    main_process = comm.is_main_process()
    first = state.written + 1  # of which metrics are written
    writers: list[EventWriter] = []
    if main_process:
        failed = previous is None and last_checkpoint(output_dir)
        if (not resume or failed) and (earlier := set_aside(output_dir)):
            logger.warning(f"What an earlier training left in {output_dir} is in {earlier} now")
        leave_job_id(output_dir)
        writers = [
            ConsoleWriter(max_iter),
            MetricsWriter(os.path.join(output_dir, "metrics.json"), first),
            TensorboardWriter(output_dir, first),
        ]
    for name, writer in SERVICES.items() if main_process else ():
        service = cfg.train.get(name) or {}
        if service.get("enabled"):
            config = {**blueprint.config, "output_dir": output_dir}
            writers.append(writer(output_dir, config, first, **(service.get("params") or {})))
    milestones = Milestones(
        state,
        checkpointer,
        lambda last: do_test(cfg, evaluated, draw=last, iteration=trainer.iter),
        lambda: draw_detections(cfg, build(cfg, "dataloader.test.dataset")),
        [model, *([ema.average.module] if ema else [])],
        writers,
        eval_period=cfg.train.eval_period,
        log_period=cfg.train.log_period,
        early_stopping=early_stopping,
        describe=describe,
        **cfg.train.checkpointer,
        **cfg.train.best_checkpointer,
    )
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            LearningRate(build(cfg, "lr_multiplier")),
            ema,
            milestones,
            ProgressBar(),
            StopOnSignal(milestones.save),
        ]
    )
    try:
        with contextlib.suppress(StoppedEarly):
            trainer.train(start_iter, max_iter)
    except NonFiniteError as error:
        trainer.iter -= 1  # the last iteration that was finished
        told = save_and_advise(cfg, error, trainer, model, milestones, output_dir)
        raise NonFiniteError(f"{error}\n{told}") from error
    except OSError as error:
        left = last_checkpoint(output_dir) or next(
            (found.path for found in checkpoints_before(output_dir, max_iter)), None
        )
        advice = f"--resume goes on from {left}" if left else "there is no checkpoint yet"
        raise RunError(f"{explain(error)}. The training has ended; {advice}") from error
    if main_process:
        files = {
            "Checkpoint": "model_final.pth",
            "metrics": "metrics.json",
            "pictures": "detections.jpg",
            "predictions": "coco_instances_results.json",
        }
        paths = {what: os.path.join(output_dir, name) for what, name in files.items()}
        told = "; ".join(f"{what}: {path}" for what, path in paths.items() if os.path.isfile(path))
        logger.info(f"Finished. {told}. A page about the run: stage-interactor report {output_dir}")


def save_and_advise(
    cfg: DictConfig,
    error: NonFiniteError,
    trainer: Trainer,
    model: StageInteractor,
    milestones: Milestones,
    output_dir: str,
) -> str:
    """Keeps the state from before an iteration that failed, and says how to go on.

    From that state the iteration fails again whatever the learning rate is, which has an effect
    from its end on. So where half precision is not at fault, the run goes on from an earlier state.
    """
    adaptive = "betas" in trainer.optimizer.defaults  # each step moves a weight by the rate itself
    lower = min(cfg.optimizer.lr / 10, _SAFE_RATE if adaptive else 100 * _SAFE_RATE)
    name = f"model_{max(trainer.iter, 0):07d}"
    path = os.path.join(output_dir, f"{name}.pth")
    earlier = checkpoints_before(output_dir, trainer.iter)
    images = error.images or []
    precision = trainer.amp_enabled and trainer.is_finite(images)
    saved = True
    try:
        milestones.save(name, failed=not precision)
        told = f"The state from before this iteration is saved as {path}."
    except NonFiniteError as unusable:
        told = f"The state from before this iteration is of no use: {unusable}."
        precision = saved = False
    if precision:
        return (
            f"{told} In float32 the losses of these images are finite: go on with "
            "--resume train.amp.enabled=false"
        )
    flag, start = "--resume ", "starts again"
    for path, content in earlier:
        _, rates = content.get("run", {}).get("scalars", {}).get("lr", (False, []))
        if adaptive and any(rate > 100 * _SAFE_RATE for rate, _ in rates):
            continue  # finite, and ruined
        set_weights(model, content["model"])
        if trainer.is_finite(images):
            milestones.name_last(os.path.basename(path))
            start = f"goes on from {path}"
            break
    else:
        if earlier and not saved:  # the last of them is what --resume would go on from
            flag, start = "", "without --resume starts a new run"
    return (
        f"{told} If these images are as they should be, the learning rate is too high, and that "
        f"state has suffered from it: {flag}optimizer.lr={lower:g} {start}"
    )


def do_eval_only(cfg: DictConfig) -> dict:
    if not cfg.train.init_checkpoint:
        raise ConfigError("--eval-only needs the weights: train.init_checkpoint=path/to/model.pth")
    path = local_file(cfg.train.init_checkpoint)
    checkpoint = read_checkpoint(path, mmap=True)
    names = class_names_in(checkpoint) or None
    if names is not None:
        check_evaluation(cfg, names, f"the checkpoint {path}")
    keep_normalisation(cfg, checkpoint)
    without_pretrained_weights(cfg)
    model = build_model(cfg)
    averaged = cfg.train.model_ema.get("use_ema_weights_for_eval_only")
    set_weights(model, choose_weights(checkpoint, path, averaged))
    model.class_names = names
    return do_test(cfg, model, draw=True)


class Job(NamedTuple):
    """What all processes of a run are told."""

    config: DictConfig | None  # None: read from the file
    config_file: str  # empty for a config that came from none
    overrides: tuple[str, ...]
    resume: bool
    eval_only: bool
    notes: tuple[str, ...] = ()  # for the log


def check_config(cfg: DictConfig) -> None:
    """What can be known before anything is written.

    Raises:
        ConfigError: the evaluation's predictions would replace those of another run.
        OSError: for a link at the place of a file that the runtime writes to as it finds it.
    """
    limit_pixels(cfg.train.get("max_pixels"))
    output_dir = cfg.train.output_dir
    predictions = cfg.dataloader.evaluator.get("output_dir") or output_dir
    refuse_links(output_dir, ("config.yaml", "log.txt", "metrics.json"))
    refuse_links(predictions, ("coco_instances_results.json", "instances_predictions.pth"))
    if os.path.realpath(predictions) != os.path.realpath(output_dir) and holds_training(
        predictions
    ):
        raise ConfigError(
            f"dataloader.evaluator.output_dir={predictions} holds another run than this one of "
            f"train.output_dir={output_dir}, whose predictions would be written over; add "
            "dataloader.evaluator.output_dir='${train.output_dir}'"
        )


def run(job: Job) -> None:
    """Trains, or evaluates, in a process of the run.

    Raises:
        Stopped: by a signal.
        FolderInUseError: another run writes into the output folder.
    """
    with SIGNALS.taken(), kept_memory(), torch.enable_grad():  # whatever the caller computes
        try:
            cfg = job.config or load_config(job.config_file, job.overrides)
            grace = cfg.train.get("grace_seconds", GRACE)
            SIGNALS.grace = grace
            check_config(cfg)
            with _output_folder(cfg.train.output_dir, grace), numerics(cfg.train):
                _run(cfg, job)
        except Stopped as stopped:
            stopped.tell("while there was nothing to save.")
            raise
        except RuntimeError as error:
            if not SIGNALS.received or isinstance(error, UserError):
                raise
            # A process that the signal has ended is missed.
            end = Stopped(SIGNALS.received)
            end.tell(f"({reason(error)}); --resume goes on from the last checkpoint.")
            raise end from None


@contextmanager
def _output_folder(folder: str, grace: float) -> Iterator[None]:
    """Is the run's own: the main process, which alone writes there, holds it for all."""
    with ExitStack() as stack:
        error: Exception | None = None
        if comm.is_main_process():
            try:
                stack.enter_context(folder_lock(folder, grace))
                remove_leftovers(folder)
            except (FolderInUseError, OSError) as found:
                error = found
        errors = [found for found in comm.all_gather(error) if found]
        if errors:
            raise errors[0]
        yield


def _run(cfg: DictConfig, job: Job) -> None:
    # What detectron2 reads, and logs, of its command line.
    arguments = SimpleNamespace(
        config_file=job.config_file,
        opts=list(job.overrides),
        resume=job.resume,
        eval_only=job.eval_only,
    )
    output_dir = cfg.train.output_dir
    with naming(output_dir):
        raises, logging.raiseExceptions = logging.raiseExceptions, False  # traces of a full disk
        try:
            default_setup(cfg, arguments)
        finally:
            logging.raiseExceptions = raises
        setup_logger(output_dir, distributed_rank=comm.get_rank(), name="stage_interactor")
        end_at_errors_of_logs()
        logger.info(describe_runtime())
        for note in job.notes:
            logger.info(note)
        resumes = job.resume and not job.eval_only
        previous = checkpoint_to_resume(output_dir) if resumes else None
        for told in settle_precision(cfg, previous):
            logger.info(told)
        if comm.is_main_process():
            # detectron2's name for it, written by default_setup with its keys sorted, and ours.
            for name in ("config.yaml", "config_resolved.yaml"):
                save_config(cfg, os.path.join(output_dir, name))
    cfg.train.device = device_of(cfg)  # of this run: the saved config is for any machine
    if cfg.train.device == "cpu":
        torch.set_float32_matmul_precision("highest")  # train.float32_precision is for GPUs
    if current_ops() != "fast":
        logger.info(f"Operations: {current_ops()} (STAGE_INTERACTOR_OPS)")
    if cfg.train.device == "cpu":
        logger.info(f"Running on the CPU with {torch.get_num_threads()} threads a process")
    for told in unread_keys(cfg):
        logger.warning(told)
    if job.eval_only:
        do_eval_only(cfg)
    else:
        for doubt in doubts(cfg.lr_multiplier, cfg.train.max_iter, cfg.optimizer.get("lr")):
            logger.warning(doubt)
        do_train(cfg, job.resume, previous)


def run_under_torchrun(job: Job) -> None:
    """torchrun has started the processes already: join them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    with SIGNALS.taken(), process_group(Place(*(int(os.environ[n]) for n in names)), "env://"):
        run(job)
