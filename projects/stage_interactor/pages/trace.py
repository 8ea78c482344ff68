"""What the stages did with an image, recorded: points, boxes, scores, and labels in training."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..d2 import transforms as T
from ..d2.detections import UnusableDetectionsError, usable
from ..d2.structures import Boxes, Instances
from ..data import prepare_picture
from ..modeling import CrossStageAssigner, Decoder, PointSampler, StageInteractor
from ..modeling.extensions.fixed_point import depth
from ..modeling.extensions.settled_decoder import SettledDecoder
from ..modeling.geometry import boxes_to_xyzr, full_precision, xyzr_to_boxes
from ..modeling.matcher import HungarianMatcher, Targets
from ..ops import Pyramid

_FARTHEST = 100  # of a box that is put elsewhere: sides of the picture


class Stage(NamedTuple):
    """What one stage did with one image; all coordinates in pixels of the picture."""

    start: np.ndarray  # (N, 4) boxes xyxy that it started from
    boxes: np.ndarray  # (N, 4) and that it predicted
    scores: np.ndarray  # (N, C)
    points: np.ndarray  # (N, G, K, Q, 2) sampling points
    level_weights: np.ndarray  # (N, G, K, Q, levels)


class Labels(NamedTuple):
    """What training would ask of the queries on one image with M objects."""

    boxes: np.ndarray  # (M, 4) of the objects, xyxy in pixels of the picture
    classes: np.ndarray  # (M,)
    matched: np.ndarray  # (L, N) one-to-one: the object of a query at a stage, -1 for none
    kept: np.ndarray  # (L, L, N) cross-stage: stage i labels query n with its match of stage j


class Edit(NamedTuple):
    """The box of a query put elsewhere."""

    stage: int  # 0-based, the first one that starts from it
    query: int
    box: Sequence[float]  # xyxy in pixels of the picture, of positive width and height


class Tracer:
    """Runs the stages on a picture as often as one likes, and keeps what every stage did.

    What the stages read of the picture is computed once.

    Args:
        model: the detector.
        picture: uint8 (H, W, 3), RGB.
        augmentation, image_format: what the detector is fed through, see
            :class:`stage_interactor.Detector`.

    Raises:
        ValueError: a sampler of one's own does not derive from :class:`PointSampler`.
    """

    def __init__(
        self,
        model: StageInteractor,
        picture: np.ndarray,
        augmentation: T.AugmentationList,
        image_format: str = "RGB",
    ):
        image = prepare_picture(picture, augmentation, image_format)["image"]
        self._decoder = model.eval().decoder
        if isinstance(self._decoder, SettledDecoder):  # how far it goes is not what is asked
            stages: Any = [*self._decoder.stages]
            self._decoder = Decoder(stages, self._decoder.exit_stage).eval()
        self._samplers = [
            module for module in self._decoder.modules() if isinstance(module, PointSampler)
        ]
        if len(self._samplers) != len(self._decoder.stages):
            raise ValueError("what a sampler reads is known of those that derive from PointSampler")
        with torch.no_grad():
            batch = model.preprocess([{"image": image}])
            self._features = Pyramid(model.neck(model.backbone(batch.tensor)))
            self._queries = model.queries(batch.sizes)
        height, width = picture.shape[:2]
        self._size = np.array([width, height])
        self._scale = self._size / [image.shape[2], image.shape[1]]

    @property
    def num_queries(self) -> int:
        return self._queries[0].shape[1]

    @torch.no_grad()
    def __call__(self, edit: Edit | None = None) -> list[Stage]:
        """What the stages do, of all queries; with an edit from its stage on after it.

        Raises:
            ValueError: the edit is of a stage or a query that the model does not have, or its box
                is none.
            UnusableDetectionsError: boxes or scores of a stage are NaN or infinite.
        """
        seen: list[tuple[Tensor, ...]] = []

        def remember(sampler, inputs) -> None:
            _, content, xyzr = inputs
            points, z = sampler.points(full_precision(content), xyzr)
            seen.append((xyzr_to_boxes(xyzr), points, sampler.level_weights(z)))

        with ExitStack() as stack:
            for sampler in self._samplers:
                stack.callback(sampler.register_forward_pre_hook(remember).remove)
            if edit is not None:
                hook = self._editing(edit)
                for stage in self._decoder.stages:  # which may have several turns
                    stack.callback(stage.register_forward_pre_hook(hook).remove)
            outputs = self._decoder(self._features, *self._queries)
        for number, output in enumerate(outputs, start=1):
            kept = usable(output.boxes[0], output.logits[0].amax(-1))
            if not kept.all():
                raise UnusableDetectionsError(
                    f"{int((~kept).sum())} of {len(kept)} queries are NaN, infinite or of negative "
                    f"size after stage {number}: the model overflows; take another checkpoint"
                )
        return [
            Stage(
                start[0].cpu().numpy() * np.tile(self._scale, 2),
                output.boxes[0].cpu().numpy() * np.tile(self._scale, 2),
                output.logits[0].sigmoid().cpu().numpy(),
                points[0].cpu().numpy() * self._scale,
                weights[0].cpu().numpy(),
            )
            for output, (start, points, weights) in zip(outputs, seen)
        ]

    def _editing(self, edit: Edit) -> Callable[..., tuple | None]:
        """What gives the box to the query before a stage, in its turn."""
        stages = depth(self._decoder)
        queries = self.num_queries
        if not 0 <= edit.stage < stages or not 0 <= edit.query < queries:
            raise ValueError(
                f"stage {edit.stage}, query {edit.query}: the model has the stages 0 to "
                f"{stages - 1} and the queries 0 to {queries - 1}"
            )
        box = np.array(edit.box, dtype=float)
        if box.shape != (4,) or not np.isfinite(box).all() or not (box[2:] > box[:2]).all():
            raise ValueError(f"box {edit.box}: left, top, right and bottom, in this order")
        if (np.abs(box) > _FARTHEST * np.tile(self._size, 2)).any():
            raise ValueError(f"box {edit.box}: it lies too far out of the picture")
        xyzr = boxes_to_xyzr(torch.from_numpy(box / np.tile(self._scale, 2)))

        turns = itertools.count()

        def change(stage, inputs) -> tuple | None:
            if next(turns) != edit.stage:
                return None
            features, content, positions, *stored = inputs
            positions = positions.clone()
            positions[:, edit.query] = xyzr.to(positions)
            return features, content, positions, *stored

        return change


def trace_stages(
    model: StageInteractor,
    picture: np.ndarray,
    augmentation: T.AugmentationList,
    image_format: str = "RGB",
) -> list[Stage]:
    """What every stage does with a picture; see :class:`Tracer` for arguments and errors."""
    return Tracer(model, picture, augmentation, image_format)()


def trace_labels(
    model: StageInteractor,
    stages: Sequence[Stage],
    image_size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
) -> Labels:
    """Matches and labels of traced stages.

    Args:
        model: whose matcher and assigner are used; of a model with one-to-one labels the paper's
            cross-stage assigner is shown.
        stages: of :func:`trace_stages`.
        image_size: height and width of the picture.
        boxes, classes: of its objects, xyxy in pixels of the picture, and class indices.
    """
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(torch.from_numpy(np.array(boxes, dtype=float).reshape(-1, 4)))
    instances.gt_classes = torch.tensor(classes, dtype=torch.long)
    targets = Targets.from_instances([instances], torch.float64)
    predicted = torch.from_numpy(np.stack([stage.boxes for stage in stages]))[:, None].double()
    scores = torch.from_numpy(np.stack([stage.scores for stage in stages]))[:, None].double()
    matcher = model.criterion.matcher if model.criterion else HungarianMatcher()
    assigner = model.criterion.assigner if model.criterion else None
    if not isinstance(assigner, CrossStageAssigner):
        assigner = CrossStageAssigner()
    matched = matcher(scores.logit(eps=1e-12), predicted, targets)
    kept = assigner.kept_matches(matched, predicted, targets)
    return Labels(
        np.asarray(boxes, dtype=float).reshape(-1, 4),
        np.asarray(classes, dtype=int),
        matched[:, 0].numpy(),
        kept[:, :, 0].numpy(),
    )


def best_queries(stages: Sequence[Stage], count: int) -> list[int]:
    """The queries with the highest scores at the last stage."""
    return np.argsort(-stages[-1].scores.max(1), kind="stable")[:count].tolist()
