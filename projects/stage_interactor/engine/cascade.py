"""What the stages of a cascade are worth: AP of each, and without parts of them.

One pass over the data: features are computed once for an image, and the decoder several times.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..d2.evaluation import DatasetEvaluator
from ..modeling import Decoder, StageInteractor, StageOutput
from ..modeling.batches import detect_by_size
from ..modeling.extensions.hybrid_matching import HybridDecoder
from ..modeling.extensions.query_groups import GroupedDecoder
from ..modeling.extensions.recollection import RecollectingDecoder
from ..modeling.extensions.settled_decoder import SettledDecoder
from ..modeling.geometry import box_iou
from ..modeling.matcher import HungarianMatcher, Targets
from ..modeling.mixing import CascadeMixing, StaticMixing
from ..ops import Pyramid
from .evaluation import scores
from .validation import in_model_classes, with_decoder

ORACLE = "best box of each object"
NO_REUSE, NO_STATIC = "no reuse", "no static mixing"


@dataclass(frozen=True)
class CascadeScores:
    """What came of a data set.

    Attributes:
        metrics: COCO's metrics in percent, such as ``{"AP": 43.1, ...}``: of ``"stage 1"`` and all
            others; of :data:`ORACLE`, the last stage with each object's box of the stage where it
            overlaps the object best; and of the last stage without the filters of earlier stages
            (``"no reuse"``) or without static mixing, on all stages or on one (``"no reuse on stage
            3"``).
        iou: of each stage, the mean IoU of the objects with the boxes of their queries, which are
            those that the last stage's matching gives to them.
        best: of each stage, how many objects have their best box there.
    """

    metrics: dict[str, dict[str, float]]
    iou: list[float]
    best: list[int]


def score_stages(
    model: StageInteractor,
    loader: Any,
    evaluator: Callable[[], DatasetEvaluator],
    classes: Sequence[int] | None = None,
) -> CascadeScores:
    """Evaluates every stage of a detector, an oracle, and the last stage without parts of others.

    Labels across stages are of the training alone: there is nothing of them to leave out here.

    Args:
        model: the detector.
        loader: of images with their ``instances``.
        evaluator: makes one, which each of these is evaluated by.
        classes: by the model's class index that of the data, if they differ.

    Raises:
        ValueError: images come without their objects, or the cascade is one of one's own.
        UnusableDetectionsError: there are detections that are NaN or infinite.
    """
    model.eval()
    variants = _Variants(model, classes)
    metrics = scores(variants, loader, _Each({name: evaluator() for name in variants.names}))
    count = max(variants.objects, 1)
    return CascadeScores(metrics, [total / count for total in variants.iou], variants.best)


def _plain_stages(model: StageInteractor) -> list[Any]:
    decoder: Any = type(model.decoder)
    known = (Decoder, SettledDecoder, GroupedDecoder, HybridDecoder, RecollectingDecoder)
    if decoder not in known:
        raise ValueError(
            f"model.decoder.parts.cascade is {decoder.__name__}, whose stages cannot be taken one "
            "by one, as far as is known"
        )
    return [*model.decoder.stages]


class Exit(NamedTuple):
    """A cascade that ended early."""

    name: str  # "stage 4", or "IoU 0.95"
    metrics: dict[str, float]  # COCO's, in percent
    stages: float  # that an image took, the mean
    milliseconds: float  # that an image took, the median


def score_exits(
    model: StageInteractor,
    loader: Any,
    evaluator: Callable[[], DatasetEvaluator],
    exit_ious: Sequence[float] = (0.7, 0.8, 0.9, 0.95),
) -> list[Exit]:
    """Evaluates a detector whose cascade ends after each of its stages, or by what is found.

    Args:
        model: the detector, which is not changed.
        loader: of one image at a time.
        evaluator: makes one.
        exit_ious: at which a cascade ends, see :class:`SettledDecoder`.

    Raises:
        ValueError: one of them is no IoU, or the cascade is one of one's own.
    """
    model = model.eval()
    stages = _plain_stages(model)
    exits: dict[str, Decoder] = {
        f"stage {number + 1}": Decoder(stages, number + 1) for number in range(len(stages))
    }
    exits |= {f"IoU {iou:g}": SettledDecoder(stages, exit_iou=iou) for iou in exit_ious}
    found = []
    for name, decoder in exits.items():
        timed = _Timed(with_decoder(model, decoder))
        metrics = scores(timed, loader, evaluator())["bbox"]
        milliseconds = 1e3 * statistics.median(timed.seconds)
        found.append(Exit(name, metrics, statistics.mean(timed.stages), milliseconds))
    return found


class _Timed:
    """A detector that is given one image at a time."""

    def __init__(self, model: StageInteractor):
        self._model = model
        self.size_divisibility = model.size_divisibility
        self.seconds: list[float] = []
        self.stages: list[int] = []

    @torch.no_grad()
    def __call__(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        start = time.perf_counter()
        found = self._model(batched_inputs)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        self.seconds.append(time.perf_counter() - start)
        decoder = self._model.decoder
        if isinstance(decoder, SettledDecoder):
            self.stages += decoder.num_stages
        else:
            self.stages.append(decoder.exit_stage or len(decoder.stages))
        return found


class _Each(DatasetEvaluator):
    """An evaluator of each of several outputs that an image has."""

    def __init__(self, evaluators: Mapping[str, DatasetEvaluator]):
        self._evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self._evaluators.values():
            evaluator.reset()

    def process(self, inputs: list, outputs: list) -> None:
        for name, evaluator in self._evaluators.items():
            evaluator.process(inputs, [found[name] for found in outputs])

    def evaluate(self) -> dict:
        found = {name: evaluator.evaluate() for name, evaluator in self._evaluators.items()}
        return {name: results["bbox"] for name, results in found.items() if results}


class _Variants:
    """Takes the place of a detector, and gives what each variant finds."""

    def __init__(self, model: StageInteractor, classes: Sequence[int] | None):
        self._model = model
        self._classes = classes
        self._cascade = Decoder(_plain_stages(model)).eval()  # whatever ends it early
        self._without = dict(_parts_to_leave_out(self._cascade.stages))
        self._matcher = getattr(model.criterion, "matcher", None) or HungarianMatcher()
        stages = len(self._cascade.stages)
        self.names = [f"stage {number + 1}" for number in range(stages)]
        self.names += [ORACLE, *self._without]
        self.size_divisibility = model.size_divisibility
        self.iou, self.best, self.objects = [0.0] * stages, [0] * stages, 0

    def __call__(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        return detect_by_size(self._detect, batched_inputs, self.size_divisibility)

    @torch.no_grad()
    def _detect(self, batched_inputs: list[Mapping[str, Any]]) -> list[dict]:
        model = self._model
        for image in batched_inputs:
            if "instances" not in image:
                raise ValueError(f"{image.get('file_name', 'an image')} comes without its objects")
        objects = [in_model_classes(image["instances"], self._classes) for image in batched_inputs]
        batch = model.preprocess(batched_inputs, objects)
        features = Pyramid(model.neck(model.backbone(batch.tensor)))
        queries = model.queries(batch.sizes)
        stages = self._cascade(features, *queries)
        outputs = {name: output for name, output in zip(self.names, stages)}
        assert batch.targets is not None
        outputs[ORACLE] = self._with_best_boxes(stages, batch.targets)
        for name, leave_out in self._without.items():
            with leave_out():
                outputs[name] = self._cascade(features, *queries)[-1]
        found: list[dict[str, Any]] = [{} for _ in batched_inputs]
        for name, output in outputs.items():
            pairs = model.best_pairs(output)
            detections = model.postprocess(
                pairs, batch.image_sizes, batched_inputs, model.nms_threshold
            )
            for variants, detection in zip(found, detections):
                variants[name] = detection
        return found

    def _with_best_boxes(self, stages: Sequence[StageOutput], targets: Targets) -> StageOutput:
        boxes = torch.stack([output.boxes for output in stages])  # (L, B, N, 4)
        last = stages[-1]
        targets = targets.to(boxes.dtype)
        matched = self._matcher(last.logits[None], last.boxes[None], targets)  # (1, B, N)
        iou = box_iou(boxes, targets.of_matches(matched)[0])  # (L, B, N)
        # Of stages that are equally good the last one.
        best = len(stages) - 1 - iou.flip(0).argmax(0)  # (B, N)
        has_object = matched[0] >= 0
        for stage, of_stage in enumerate(iou[:, has_object]):
            self.iou[stage] += float(of_stage.sum())
            self.best[stage] += int((best[has_object] == stage).sum())
        self.objects += int(has_object.sum())
        best = torch.where(has_object, best, len(stages) - 1)
        index = best[None, ..., None].expand(1, -1, -1, 4)
        return last._replace(boxes=boxes.gather(0, index)[0])


def _parts_to_leave_out(stages: Iterable[nn.Module]) -> Iterator[tuple[str, partial]]:
    """Names, and what leaves a part out while it is entered."""
    reuse: dict[int, list[nn.Module]] = {}
    static: dict[int, list[nn.Module]] = {}
    for number, stage in enumerate(stages, start=1):
        mixing = stage.mixing
        if not isinstance(mixing, CascadeMixing):  # of one's own
            continue
        if mixing.spatial_reuse is not None:
            reuse[number] = [mixing]
        added: list[nn.Module] = [
            module
            for module in mixing.modules()
            if isinstance(module, StaticMixing) and module.kind != "none"
        ]
        if added:
            static[number] = added
    for name, parts, hook in (
        (NO_REUSE, reuse, _own_filters),
        (NO_STATIC, static, _nothing_added),
    ):
        if parts:
            yield name, partial(_hooked, [module for of in parts.values() for module in of], hook)
        if len(parts) > 1:
            for number, modules in parts.items():
                yield f"{name} on stage {number}", partial(_hooked, modules, hook)


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[[nn.Module], Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            handle = hook(module)
            stack.callback(handle.remove)
        yield


def _own_filters(mixing: nn.Module) -> Any:
    """In place of those of earlier stages: a blend of a filter with itself is this filter."""

    def change(module: CascadeMixing, inputs: tuple) -> tuple:
        sampled, content, stored = inputs
        return sampled, content, [module.generate(content)] * len(stored)

    return mixing.register_forward_pre_hook(change)


def _nothing_added(static: nn.Module) -> Any:
    """What static mixing adds to is what it gives."""

    def change(module: StaticMixing, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        return inputs[1]

    return static.register_forward_hook(change)
