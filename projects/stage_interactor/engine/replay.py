"""An iteration of a run once more: the images that it saw, their losses and their labels."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ..config import build, load_config, without_pretrained_weights
from ..d2.events import EventStorage
from ..data import batches_of
from ..inference.blueprint import keep_normalisation
from ..inference.weights import choose_weights, set_weights
from ..modeling import Criterion, StageInteractor
from ..pages.object_trace import trace_objects
from ..pages.replay import Replay, ReplayedImage
from ..untrusted.tensors import CheckpointError
from .milestones import RunState
from .numerics import numerics
from .process import build_model, device_of
from .resume import Previous, check_resumable, checkpoints_before
from .trainer import AMP_DTYPES, has_losses_of_outputs, seed_iteration
from .training_data import TrainingData, weigh_classes
from .validation import has_losses

CONFIG = "config_resolved.yaml"
_NEVER = 2**62
# Of a config what images and losses depend on; which data there are is told by their fingerprint.
_MATTERS = re.compile(
    r"model\..*|dataloader\.train\.(?!dataset\.|num_workers).*"
    r"|train\.(seed|max_iter|amp\.enabled|amp\.dtype|freeze.*|class_weights.*|accumulation_steps)"
)
_OF_PARTS = re.compile(r"dataloader\.train\.(total_batch_size|aspect_ratio_grouping)")


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
    only: the losses are the run's where the checkpoint was written after the iteration before, and
    elsewhere those of weights that are close. What was changed on a resume is as it is now, but for
    the size of batches, the processes and the grouping, which are those of the iteration. Norms
    that train see a process's batch at once, whatever ``train.accumulation_steps`` is.

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
        ValueError: it has no such iteration, or its data have changed.
        TypeError: its loader is one's own.
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
    changes = [
        str(change)
        for change in check_resumable(weights, cfg)
        if _MATTERS.fullmatch(change.key) and not _OF_PARTS.fullmatch(change.key)
    ]
    model = build_model(cfg)
    data = TrainingData.read(cfg, model.num_classes, weights.content, weights.path)
    weigh_classes(cfg, model, data)
    set_weights(model, choose_weights(weights.content, weights.path, averaged=False))
    cfg.dataloader.train.num_workers = 0
    loader = build(cfg, "dataloader.train", dataset=data.records)
    state = RunState()
    newest = (every or [weights])[0]
    if "run" in newest.content:
        state.load_state_dict(newest.content["run"])
    if not state.parts:
        raise ValueError(f"{newest.path} does not say which batches the run had: it is too old")
    if state.data not in ("", data.fingerprint):
        raise ValueError(
            f"the data are not those that {newest.path} was trained on: other images, in another "
            "order, or with other objects. Name those of the run, such as data.train_json=..."
        )
    batches = batches_of(loader, iteration, state.parts)
    with numerics(cfg.train), EventStorage(iteration):  # parts may ask for the iteration
        losses, images = _losses(cfg, model.train(), iteration, batches)
    return Replay(
        iteration,
        weights.path,
        weights.iteration + 1,
        losses,
        changes,
        os.path.realpath(os.path.dirname(weights.path)) == os.path.realpath(run),
        images,
        data.class_names,
        cfg.dataloader.train.mapper.get("image_format", "RGB"),
    )


def _losses(
    cfg: DictConfig, model: StageInteractor, iteration: int, batches: Sequence[list[dict]]
) -> tuple[dict[str, float], list[ReplayedImage]]:
    """Of all processes, as a training writes them: the mean over the processes.

    Where a model adds to the criterion's losses they are those of each process by itself, divided
    by its own number of objects.
    """
    amp = cfg.train.amp
    half = torch.autocast(
        torch.device(cfg.train.device).type,
        AMP_DTYPES[amp.get("dtype", "bfloat16")],
        enabled=amp.get("enabled") is True,
    )
    known = has_losses(model) and has_losses_of_outputs(model)
    criterion = model.criterion if known else None
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
        # Of the queries that detect; where training has others too, these are the first.
        detecting = [
            type(output)(*(part[:, : model.queries.num_queries] for part in output))
            for output in outputs
        ]
        ground_truth = model.ground_truth(batch)
        first = len(images) - len(batch)
        for index, trace in enumerate(trace_objects(criterion, detecting, ground_truth), first):
            images[index] = replace(images[index], trace=trace)
        for index, objects in enumerate(ground_truth):
            alone = [type(o)(*(part[index, None] for part in o)) for o in outputs]
            own_sums, own_counts = criterion.sums(alone, [objects])
            sums.append(own_sums.detach().cpu())
            counts.append(own_counts.cpu())
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
