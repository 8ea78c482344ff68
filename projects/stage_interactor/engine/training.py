"""Training and evaluating as one function: what train_net.py, the command line and Python call."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from ..config import (
    ConfigError,
    find_config,
    is_config,
    load_config,
    override_text,
    require_list,
    require_runnable,
    require_said_once,
)
from ..d2.logger import setup_logger
from ..locking import folder_lock
from ..untrusted.files import read_json
from ..untrusted.pictures import limit_restored
from ..writing import inside
from .launch import launch
from .presets import fit_to_data
from .process import LOGGERS, Job, check_config, run, run_under_torchrun
from .resume import goes_on, holds_training
from .settings import check_settings
from .signals import GRACE

EVALUATION = "eval_only"  # folder of an evaluation, in that of a training


@dataclass(frozen=True)
class Run:
    """What a run left in its folder.

    Attributes:
        output_dir: the folder.
        metrics: of the last evaluation, ``{"bbox": {"AP": ..., "AP50": ...}}``, in percent, None
            where there was no object to find; empty before the first one.
    """

    output_dir: str
    metrics: dict[str, Any]

    @classmethod
    def in_folder(cls, output_dir: str | os.PathLike) -> "Run":
        """Of a run that was made before.

        Raises:
            OSError, ValueError: its results.json cannot be read.
        """
        output_dir = os.fspath(output_dir)
        path = os.path.join(output_dir, "results.json")
        metrics = {}
        if os.path.isfile(path):
            metrics = read_json(path)  # versions before this wrote NaN, which is None now
            if not isinstance(metrics, dict):
                raise ValueError(f"{path} holds no metrics of an evaluation")
        return cls(output_dir, metrics)

    def path(self, name: str) -> str | None:
        """Of a file of the run, such as ``"detections.jpg"``; None if there is none."""
        path = os.path.join(self.output_dir, name)
        return path if os.path.isfile(path) else None

    @property
    def checkpoint(self) -> str | None:
        """The weights at the end of the training."""
        return self.path("model_final.pth")

    @property
    def best_checkpoint(self) -> str | None:
        """The weights of the best evaluation."""
        return self.path("model_best.pth")


@limit_restored()
def train(
    config_or_data: DictConfig | str | os.PathLike | Sequence[str | os.PathLike],
    overrides: Sequence[str] = (),
    *,
    output_dir: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    preset: str | None = None,
    epochs: float | None = None,
    resume: bool = False,
    eval_only: bool = False,
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    **data: Any,
) -> Run:
    """Trains and evaluates a detector, in this process unless there are several GPUs.

        run = stage_interactor.train("quickstart.py", ["train.max_iter=60"])
        run = stage_interactor.train("cells", preset="nano", output_dir="output/cells")
        print(run.metrics["bbox"]["AP"], run.checkpoint)

    SIGTERM, Ctrl-C and SIGHUP end it after the current iteration, or in an evaluation at once, by a
    SystemExit, with a checkpoint that ``resume`` goes on from. Started by ``torchrun``, it joins
    the processes that are there.

    Args:
        config_or_data: a config, its file, or the name of one of this package's; or data of one's
            own, which a preset is fitted to: a folder, or the file that describes it, or a list of
            such.
        overrides: ``key=value``, as on the command line.
        output_dir: ``train.output_dir``.
        checkpoint: ``train.init_checkpoint``, weights to start from or to evaluate.
        preset, epochs: for data of one's own, see
            :func:`stage_interactor.engine.presets.fit_to_data`.
        resume: go on from the last checkpoint in ``output_dir``.
        eval_only: evaluate ``checkpoint``, do not train; below ``output_dir``, in ``eval_only/``,
            if a training lies there.
        num_gpus: processes on each machine, as for ``num_machines``, ``machine_rank`` and
            ``dist_url`` by detectron2's flags.
        data: ``background``, ``augmentation``, ``flip``, ``weights``, ``images``, ``annotations``,
            ``format``, ``allow_outside`` of data of one's own, see
            :func:`stage_interactor.engine.presets.fit_to_data`.

    Raises:
        ConfigError: the config, an override or an argument cannot be meant.
        ValueError, FileNotFoundError: data that cannot be read or trained on.
        BackboneError: the backbone, or its pretrained weights, cannot be had.
        CheckpointError: weights that cannot be read or do not fit.
        NonFiniteError: a loss or gradient became infinite or NaN.
        FolderInUseError: another run writes into ``output_dir``.
        LostProcess: a process of several was killed, or has crashed.
    """
    require_list(overrides)
    if min(num_gpus, num_machines) < 0:
        raise ConfigError(f"num_gpus is {num_gpus}, num_machines {num_machines}: not less than 0")
    if not 0 <= machine_rank < max(num_machines, 1):
        raise ConfigError(
            f"machine_rank is {machine_rank}; of {num_machines} it is one from 0 to "
            f"{max(num_machines, 1) - 1}"
        )
    chosen = list(overrides)
    notes: list[str] = []
    if (
        not isinstance(config_or_data, (DictConfig, str, os.PathLike))  # several data sets
        or not isinstance(config_or_data, DictConfig)
        and not is_config(config_or_data)
    ):
        if eval_only:
            raise ConfigError("eval_only needs a config: data of one's own alone has none")
        fitted = fit_to_data(
            config_or_data,
            chosen,
            preset=preset,
            epochs=epochs,
            checkpoint=checkpoint,
            output_dir=output_dir,
            num_gpus=num_gpus,
            resume=resume,
            **data,
        )
        notes = fitted.notes
        config_or_data, chosen = fitted.config, fitted.overrides
    elif given := [
        key
        for key, value in {"preset": preset, "epochs": epochs, **data}.items()
        if value is not None
    ]:
        told = "are" if len(given) > 1 else "is"
        raise ConfigError(
            f"{' and '.join(given)} {told} for data of one's own; a config has its schedule and "
            "its data"
        )
    else:
        said = {"train.output_dir": output_dir, "train.init_checkpoint": checkpoint}
        require_said_once(chosen, said)
        for key, path in said.items():
            if path is not None:
                chosen.append(override_text(key, os.fspath(path)))
    cfg = load_config(config_or_data, chosen)
    joins = "TORCHELASTIC_RUN_ID" in os.environ
    check_settings(cfg, int(os.environ["WORLD_SIZE"]) if joins else num_gpus * num_machines)
    require_runnable(cfg)
    if not (resume or eval_only):
        resume, told = goes_on(cfg.train.get("resume"), cfg.train.output_dir)
        notes += [told] if told else []
    if eval_only and holds_training(cfg.train.output_dir):
        old, new = cfg.train.output_dir, inside(cfg.train.output_dir, EVALUATION, folder=True)
        chosen.append(override_text("train.output_dir", new))
        cfg = load_config(config_or_data, chosen)
        if cfg.dataloader.evaluator.get("output_dir") == old:  # a config without references
            chosen.append(override_text("dataloader.evaluator.output_dir", new))
            cfg = load_config(config_or_data, chosen)
        notes.append(f"{old} holds a training, which stays as it is: the evaluation goes to {new}")
    elif not resume and holds_training(cfg.train.output_dir):
        notes.append(
            f"{cfg.train.output_dir} holds a training already, which is moved to a folder below "
            "it: --resume would go on with it"
        )
    file = "" if isinstance(config_or_data, DictConfig) else find_config(config_or_data)
    job = Job(cfg, file, tuple(chosen), resume, eval_only, tuple(notes))
    with _own_logging():
        if joins:
            run_under_torchrun(job)
        elif num_gpus * num_machines <= 1:  # 0 is one process, as for detectron2
            run(job)
        else:
            check_config(cfg)
            grace = cfg.train.get("grace_seconds", GRACE)
            if machine_rank == 0:
                with folder_lock(cfg.train.output_dir, grace):
                    pass  # free: no run that is still ending has the folder, or the address
            launch(
                run,
                # Processes are spawned, and a config may hold what cannot be sent to them: where
                # it came from a file each reads that itself.
                (job._replace(config=None) if file else job,),
                processes=num_gpus,
                num_machines=num_machines,
                machine_rank=machine_rank,
                dist_url=dist_url,
                grace=grace,
            )
    return Run.in_folder(cfg.train.output_dir)


@contextmanager
def _own_logging() -> Iterator[None]:
    """Takes the handlers of a run away after it: a second run has a log file of its own."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = {item.name: (list(item.handlers), item.propagate, item.level) for item in loggers}
    try:
        yield
    finally:
        for item in loggers:
            handlers, item.propagate, item.level = before[item.name]
            for handler in set(item.handlers) - set(handlers):
                item.removeHandler(handler)
                with suppress(OSError, ValueError):  # of a full disk, which has been told
                    handler.close()
        if hasattr(setup_logger, "cache_clear"):  # detectron2's remembers what it has set up
            setup_logger.cache_clear()
