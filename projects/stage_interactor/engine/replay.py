"""An iteration of a run once more: the images that it saw, their losses and their labels."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ..config import build, load_config, without_pretrained_weights
from ..data import Part, batches_of
from ..inference.blueprint import keep_normalisation
from ..inference.weights import choose_weights, set_weights
from ..modeling import Criterion, StageInteractor
from ..untrusted.tensors import CheckpointError
from .milestones import RunState
from .numerics import numerics
from .object_trace import ObjectTrace, trace_objects
from .process import build_model, device_of
from .resume import Previous, checkpoints_before
from .trainer import AMP_DTYPES, seed_iteration
from .training_data import TrainingData, weigh_classes
from .validation import has_losses

CONFIG = "config_resolved.yaml"
_NEVER = 2**62


@dataclass(frozen=True)
class ReplayedImage:
    """An image of the iteration.

    Attributes:
        file_name: of the picture, the first one where several are combined.
        process: that had it in its batch.
        image: (3, H, W) as the mapper gives it, in the order of ``image_format``.
        boxes: (M, 4) of its objects, xyxy in pixels of ``image``.
        classes: (M,).
        losses: its share of the losses by their names; None where the criterion is one's own.
        trace: what the stages made of the objects; None likewise.
    """

    file_name: str
    process: int
    image: Tensor
    boxes: Tensor
    classes: Tensor
    losses: dict[str, float] | None = None
    trace: ObjectTrace | None = None

    @property
    def loss(self) -> float | None:
        """The sum of its losses."""
        return None if self.losses is None else sum(self.losses.values())


@dataclass(frozen=True)
class Replay:
    """What an iteration was.

    Attributes:
        iteration: which, from 0.
        checkpoint: whose weights the losses are of.
        trained: how many iterations these have seen: as many as ``iteration`` where the losses are
            those of the run.
        losses: of the whole batch, by their names.
        images: by process, in the order of its batch.
        class_names: by class index.
        image_format: ``"RGB"`` or ``"BGR"``.
    """

    iteration: int
    checkpoint: str
    trained: int
    losses: dict[str, float]
    images: list[ReplayedImage]
    class_names: list[str]
    image_format: str

    @property
    def total_loss(self) -> float:
        return sum(self.losses.values())


def replay(
    run: str | os.PathLike,
    iteration: int,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | os.PathLike | None = None,
    device: str | None = None,
) -> Replay:
    """Builds the batch of an iteration again, for all processes that the run had, and its losses.

    Which images come, and how they are augmented, depends on the seed and on the number of the
    iteration alone. So does dropout. The weights that the run had are at hand at its checkpoints
    only: the losses are exactly the run's where the checkpoint was written after the iteration
    before, and elsewhere those of weights that are close. Norms that train see a process's batch at
    once, whatever ``train.accumulation_steps`` is.

    Args:
        run: folder of a run. Its config is called as in a training: of runs that one trusts.
        iteration: from 0.
        overrides: ``key=value``, such as of data that lie elsewhere now.
        checkpoint: of the weights; by default the run's last one before the iteration, or its first
            one.
        device: by default the config's, or the CPU where there is no GPU.

    Raises:
        FileNotFoundError: it is no folder of a run.
        CheckpointError: there is no checkpoint of a training in it.
        ValueError: it has no such iteration, its data have changed, or its loader is one's own.
    """
    file = os.path.join(run, CONFIG)
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{os.fspath(run)} has no {CONFIG}: is it the folder of a run?")
    cfg = load_config(file, overrides)
    if not 0 <= iteration < cfg.train.max_iter:
        raise ValueError(f"the run has iterations 0 to {cfg.train.max_iter - 1}, not {iteration}")
    if device is not None:
        cfg.train.device = device
    cfg.train.device = device_of(cfg)
    every = checkpoints_before(os.fspath(run), _NEVER)  # newest first
    if checkpoint is not None:
        weights = Previous.read(os.fspath(checkpoint))
    elif every:
        before = [found for found in every if found.iteration < iteration]
        weights = before[0] if before else every[-1]
    else:
        raise CheckpointError(f"{os.fspath(run)} holds no checkpoint of a training: whose weights?")
    without_pretrained_weights(cfg)
    keep_normalisation(cfg, weights.content)
    model = build_model(cfg)
    data = TrainingData.read(cfg, model.num_classes, weights.content, weights.path)
    weigh_classes(cfg, model, data)
    set_weights(model, choose_weights(weights.content, weights.path, averaged=False))
    cfg.dataloader.train.num_workers = 0
    loader = build(cfg, "dataloader.train", dataset=data.records)
    batches = batches_of(loader, iteration, _parts((every or [weights])[0], cfg))
    with numerics(cfg.train):
        losses, images = _losses(cfg, model.train(), iteration, batches)
    return Replay(
        iteration,
        weights.path,
        weights.iteration + 1,
        losses,
        images,
        data.class_names,
        cfg.dataloader.train.mapper.get("image_format", "RGB"),
    )


def _parts(newest: Previous, cfg: DictConfig) -> list[Part]:
    """Of the training, as its newest checkpoint knows them."""
    state = RunState()
    if "run" in newest.content:
        state.load_state_dict(newest.content["run"])
    if state.parts:
        return state.parts
    train = cfg.dataloader.train
    grouped = bool(train.get("aspect_ratio_grouping", True))
    return [Part(0, train.total_batch_size, 1, grouped)]


def _losses(
    cfg: DictConfig, model: StageInteractor, iteration: int, batches: Sequence[list[dict]]
) -> tuple[dict[str, float], list[ReplayedImage]]:
    """Of all processes, as a training writes them: the mean over the processes."""
    amp = cfg.train.amp
    half = torch.autocast(
        torch.device(cfg.train.device).type,
        AMP_DTYPES[amp.get("dtype", "bfloat16")],
        enabled=amp.get("enabled") is True,
    )
    criterion = model.criterion if has_losses(model) else None
    images: list[ReplayedImage] = []
    means: dict[str, float] = {}
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for process, batch in enumerate(batches):
        seed_iteration(cfg.train.seed, process, iteration)
        images += [_image(image, process) for image in batch]
        with half:  # and with gradients: without them operations may take another form
            if not isinstance(criterion, Criterion):
                for name, loss in model(batch).items():
                    means[name] = means.get(name, 0.0) + float(loss) / len(batches)
                continue
            stages = model(batch, with_losses=False)
        outputs = [type(output)(*(part.detach() for part in output)) for output in stages]
        for index, objects in enumerate(model.ground_truth(batch)):
            alone = [type(o)(*(part[index, None] for part in o)) for o in outputs]
            own_sums, own_counts = criterion.sums(alone, [objects])
            sums.append(own_sums.detach().cpu())
            counts.append(own_counts.cpu())
            (trace,) = trace_objects(criterion, alone, [objects])
            at = len(sums) - 1
            images[at] = replace(images[at], trace=trace)
    if isinstance(criterion, Criterion):
        # What divides the losses is the mean over the processes, at least an object altogether.
        count = (torch.stack(counts).sum(0) / len(batches)).clamp(min=1.0 / len(batches))
        for index, own_sums in enumerate(sums):
            named = criterion.named(own_sums / len(batches), count)
            share = {name: float(loss) for name, loss in named.items()}
            images[index] = replace(images[index], losses=share)
            means = {name: means.get(name, 0.0) + loss for name, loss in share.items()}
    return means, images


def _image(image: Mapping[str, Any], process: int) -> ReplayedImage:
    objects = image["instances"]
    return ReplayedImage(
        str(image.get("file_name", "")),
        process,
        image["image"],
        objects.gt_boxes.tensor,
        objects.gt_classes,
    )
