"""How many images a GPU takes at a time, by trying: a training step of the model itself."""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from ..config import without_pretrained_weights
from ..d2.structures import Boxes, Instances
from ..errors import lacks_memory
from ..inference.precision import half_is_faster
from ..inference.prepare import AUTO, DTYPES
from .process import build_model, build_optimizer

logger = logging.getLogger(__name__)

Trial = Callable[[int], float | None]
"""From a number of images to the GiB that a step of them takes; None where memory ran out."""

Measure = Callable[[DictConfig, tuple[int, int], int], Trial]
"""From a run's config, height and width in pixels and objects of an image to such a trial."""


def images_at_a_time(trial: Trial, most: int, budget: float) -> tuple[int, float | None]:
    """The largest number of images, up to ``most``, that a trial finds to take at most ``budget``
    GiB, and how much they take; 0 and what one takes, if that is too much.

    All of them are tried first, then the middle of what is left.
    """
    fits, fails = 0, most + 1
    taken: float | None = None
    number = most
    while fits + 1 < fails:
        found = trial(number)
        if found is not None and found <= budget:
            fits, taken = number, found
        else:
            fails = number
            taken = found if number == 1 else taken
        number = (fits + fails) // 2
    return fits, taken


def largest_sides(
    augmentation: Sequence[Mapping[str, Any]], sizes: Iterable[tuple[int, int]], grouped: bool
) -> tuple[int, int] | None:
    """Height and width in pixels of the largest batch of pictures that a config resizes.

    Args:
        augmentation: of the config; None is returned where nothing in it resizes by the shorter
            side, which says how large they become.
        sizes: widths and heights of the pictures.
        grouped: a batch holds only wide or only high ones.
    """
    steps = [step for step in augmentation if "short_edge_length" in step]
    if not steps:
        return None
    length = steps[-1]["short_edge_length"]
    short = length if isinstance(length, int) else max(length)
    longest = steps[-1].get("max_size") or 10**9
    resized = []
    for width, height in set(sizes):
        scale = min(short / min(width, height), longest / max(width, height))
        resized.append((max(round(height * scale), 1), max(round(width * scale), 1)))
    groups = [resized]
    if grouped:
        groups = [[hw for hw in resized if (hw[1] > hw[0]) == wide] for wide in (True, False)]
    batches = [(max(h for h, _ in of), max(w for _, w in of)) for of in groups if of]
    return max(batches, key=lambda sides: sides[0] * sides[1])


class StepOnGpu:
    """A :data:`Trial`: forward, backward and optimizer on noise, as the run has them.

    Args:
        cfg: of the run. The model is not pretrained, which takes as much.
        sides: height and width of an image in pixels.
        objects: of an image.
        peak: gives the GiB that were taken at the most since it was called last; PyTorch's own
            count by default.
    """

    def __init__(
        self,
        cfg: DictConfig,
        sides: tuple[int, int],
        objects: int,
        peak: Callable[[], float] | None = None,
    ):
        self._cfg = copy.deepcopy(cfg)
        without_pretrained_weights(self._cfg)
        self._device = torch.device(self._cfg.train.device)
        self._sides, self._objects = sides, objects
        self._peak = self._cuda_peak if peak is None else peak
        amp = self._cfg.train.amp
        self._dtype = DTYPES[amp.get("dtype", "bfloat16")]
        self._half = amp.enabled
        if amp.enabled == AUTO:
            self._half, _ = half_is_faster(self._dtype, self._device)
        self._parts: Any = None  # model, optimizer and what the averages of the weights take

    def __call__(self, images: int) -> float | None:
        self._peak()
        try:
            self._step(images)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            taken = None
        else:
            taken = self._peak()
        if self._parts is not None:
            self._parts[1].zero_grad(set_to_none=True)
        return taken

    def _step(self, images: int) -> None:
        if self._parts is None:
            model = build_model(self._cfg).train()
            averages = copy.deepcopy(model) if self._cfg.train.model_ema.enabled else None
            self._parts = model, build_optimizer(self._cfg, model), averages
        model, optimizer, _ = self._parts
        with torch.autocast(self._device.type, self._dtype, enabled=bool(self._half)):
            losses = model([self._image(model.num_classes) for _ in range(images)])
            total = sum(losses.values())
        total.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()  # which begins with what it keeps of each weight

    def _image(self, num_classes: int) -> dict[str, Any]:
        height, width = self._sides
        instances = Instances((height, width))
        corner = torch.rand(self._objects, 2) * torch.tensor([width, height]) * 0.8
        size = torch.tensor([width, height]) * 0.2
        instances.gt_boxes = Boxes(torch.cat((corner, corner + size), dim=1))
        instances.gt_classes = torch.randint(num_classes, (self._objects,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        return {"image": image, "height": height, "width": width, "instances": instances}

    def _cuda_peak(self) -> float:
        taken = torch.cuda.max_memory_allocated(self._device) / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return taken
