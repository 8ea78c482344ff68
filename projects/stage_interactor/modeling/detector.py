"""StageInteractor: images in, losses or detections out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from ..d2.detections import usable
from ..d2.structures import Boxes, Instances
from .backbone import Normalisation, normalisation_of
from .batches import Batch, detect_by_size
from .criterion import Criterion
from .decoder import Decoder
from .matcher import Targets
from .queries import InitialQueries
from .stage import StageOutput


class Predictions(NamedTuple):
    """The K best (query, class) pairs of each image, best first."""

    boxes: Tensor  # (B, K, 4), xyxy in pixels of the resized image
    scores: Tensor  # (B, K), 0 to 1
    classes: Tensor  # (B, K), 0-based
    num_undefined: Tensor  # (B,), further pairs whose score is NaN, with those above at most K


class StageInteractor(nn.Module):
    """A query-based detector: backbone, 1x1 neck, initial queries, cascade of stages.

    Args:
        num_classes: C.
        backbone: RGB images (B, 3, H, W) to a mapping of feature maps.
        neck: that mapping to a list of levels, each with D channels.
        queries, decoder: see there.
        criterion: needed in training only.
        pixel_mean, pixel_std: of the input's channels, in the units of the input (0 to 255); None
            takes what the backbone's weights were trained with, or ImageNet's where it says none.
        max_detections: detections of an image, the best of all (query, class) pairs; None takes as
            many as there are queries.
        nms_threshold: detections of a class that overlap a better one of the same class with more
            than this IoU, both within the image, are removed (Table 5); None, the default, has no
            NMS.
        size_divisibility: images are padded to a multiple of it: the coarsest stride.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    class_names: list[str] | None = None  # by class index, where the training told them
    frozen_parts: tuple[str, ...] = ()  # modules that stay as evaluated while the rest is trained
    thresholds: list[float] | None = None  # of scores, by class index, by the last evaluation

    def __init__(
        self,
        *,
        num_classes: int = 80,
        backbone: nn.Module,
        neck: nn.Module,
        queries: InitialQueries,
        decoder: Decoder,
        criterion: Criterion | None = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        max_detections: int | None = None,
        nms_threshold: float | None = None,
        size_divisibility: int = 32,
    ):
        super().__init__()
        if nms_threshold is not None and not 0 < nms_threshold <= 1:
            raise ValueError(f"nms_threshold must be an IoU, 0 to 1, or None; got {nms_threshold}")
        self.num_classes = num_classes
        self.backbone = backbone
        self.neck = neck
        self.queries = queries
        self.decoder = decoder
        self.criterion = criterion
        self.max_detections = max_detections or queries.num_queries
        self.nms_threshold = nms_threshold
        self.size_divisibility = size_divisibility
        mean, std, source = normalisation_of(backbone)
        if pixel_mean is not None:
            mean, source = tuple(pixel_mean), "model.pixel_mean"
        if pixel_std is not None:
            std, source = tuple(pixel_std), f"{source}, model.pixel_std"
        self.normalisation = Normalisation(mean, std, source)
        for name, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> "StageInteractor":
        super().train(mode)
        for name in self.frozen_parts:
            self.get_submodule(name).eval()
        return self

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]], with_losses: bool = True) -> Any:
        """
        Args:
            batched_inputs: one dict an image, as detectron2's loaders give: ``image`` (3, H, W)
                in the units of ``pixel_mean``; in training ``instances`` with ``gt_boxes`` and
                ``gt_classes``; at inference ``height`` and ``width`` of the original image (the
                input's own size if absent).
            with_losses: False gives, in training, what the losses are computed from.

        Returns:
            in training a dict of losses, or the output of every stage; otherwise a list of
            ``{"instances": Instances}`` with ``pred_boxes`` (xyxy in pixels of the original
            image), ``scores``, ``pred_classes``, which do not depend on the other images. What the
            model could not compute is NaN there; see :meth:`postprocess`.
        """
        if not self.training:
            return detect_by_size(self._detect, batched_inputs, self.size_divisibility)
        if not with_losses:
            batch = self.preprocess(batched_inputs)
            return self.decode(batch.tensor, batch.sizes)
        batch = self.preprocess(batched_inputs, self.ground_truth(batched_inputs))
        assert batch.targets is not None
        return self.losses(batch.tensor, batch.sizes, batch.targets)

    def _detect(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        """Of images of one padded size."""
        batch = self.preprocess(batched_inputs)
        found = self.predict(batch.tensor, batch.sizes)
        return self.postprocess(found, batch.image_sizes, batched_inputs, self.nms_threshold)

    def decode(self, images: Tensor, image_sizes: Tensor) -> list[StageOutput]:
        """The model itself: every stage's output for normalised, padded images (B, 3, H, W).

        ``image_sizes`` (B, 2) are height and width of each image without padding.
        """
        features = self.neck(self.backbone(images))
        content, xyzr = self.queries(image_sizes)
        return self.decoder(features, content, xyzr)

    def losses(
        self,
        images: Tensor,
        image_sizes: Tensor,
        ground_truth: Targets | Sequence[Instances],
    ) -> dict[str, Tensor]:
        """The criterion of what :meth:`decode` gives and of the objects of each image."""
        if self.criterion is None:
            raise ValueError("StageInteractor was built without a criterion: it cannot be trained")
        return self.criterion(self.decode(images, image_sizes), ground_truth)

    @torch.no_grad()
    def predict(self, images: Tensor, image_sizes: Tensor) -> Predictions:
        """The best (query, class) pairs of each image. Tensors in and out: what can be compiled."""
        return self.best_pairs(self.decode(images, image_sizes)[-1])

    def best_pairs(self, output: StageOutput) -> Predictions:
        """The same, of what a stage predicts."""
        logits = output.logits.flatten(1)  # (B, N * C)
        # Neither NaN nor infinity. These come last, or topk would take NaN for the best scores.
        defined = logits < math.inf
        scores = torch.where(defined, logits.sigmoid(), -1.0)
        scores, pairs = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        undefined = scores < 0
        num_undefined = (defined.shape[1] - defined.sum(1)).clamp(max=scores.shape[1])
        num_classes = output.logits.shape[-1]
        queries = (pairs // num_classes)[..., None].expand(-1, -1, 4)
        return Predictions(
            output.boxes.gather(1, queries),
            torch.where(undefined, math.nan, scores),
            pairs % num_classes,
            num_undefined - undefined.sum(1),
        )

    def preprocess(
        self,
        batched_inputs: Sequence[Mapping[str, Any]],
        ground_truth: Sequence[Instances] | None = None,
    ) -> Batch:
        """Images on the model's device, normalised and padded, with their objects if given."""
        images = [image["image"] for image in batched_inputs]
        batch = Batch.of_images(images, self.size_divisibility, self.device, ground_truth)
        return batch.normalised(self.pixel_mean, self.pixel_std)

    def ground_truth(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[Instances]:
        """The objects of each image.

        Raises:
            ValueError: if ``instances`` are missing or a class is not one of the model's.
        """
        for image in batched_inputs:
            if "instances" not in image:
                name = image.get("file_name", "an image")
                raise ValueError(f"{name} has no 'instances': training needs ground truth")
        found = [image["instances"] for image in batched_inputs]
        classes = torch.cat([instances.gt_classes for instances in found])
        if len(classes) and not 0 <= classes.min() <= classes.max() < self.num_classes:
            for image, instances in zip(batched_inputs, found):
                labels = set(instances.gt_classes.tolist())
                if not labels <= set(range(self.num_classes)):
                    raise ValueError(
                        f"{image.get('file_name', 'an image')} has objects of the classes "
                        f"{sorted(labels)}, but the model has the classes 0 to "
                        f"{self.num_classes - 1}: set model.num_classes"
                    )
        return found

    @staticmethod
    def postprocess(
        found: Predictions,
        image_sizes: Sequence[tuple[int, int]],
        batched_inputs: Sequence[Mapping[str, Any]],
        nms_threshold: float | None = None,
    ) -> list[dict[str, Instances]]:
        """Predictions as detectron2's Instances, boxes in pixels of the original images.

        Boxes are clipped to the image. A detection that is infinite or turned inside out, which
        clipping would hide, becomes NaN; ``num_undefined`` beside the instances are those that are
        not even among them, see :class:`Predictions`.
        """
        detections = []
        for boxes, scores, classes, undefined, size, image in zip(
            *found, image_sizes, batched_inputs
        ):
            height, width = image.get("height") or size[0], image.get("width") or size[1]
            scales = (width / size[1], height / size[0]) * 2
            sides = [side * scale for side, scale in zip(boxes.unbind(-1), scales)]
            # Not Boxes.clip, which waits for the device to see that all is finite.
            clipped = [side.clamp(0, most) for side, most in zip(sides, (width, height) * 2)]
            inside = torch.stack(clipped, dim=-1)
            defined = usable(torch.stack(sides, dim=-1), scores)
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(torch.where(defined[:, None], inside, math.nan))
            instances.scores = scores
            instances.pred_classes = classes
            if nms_threshold is not None:
                kept = ~defined  # to be seen; they suppress nothing
                for label in classes.unique():
                    (members,) = (defined & (classes == label)).nonzero(as_tuple=True)
                    kept[members[nms(inside[members], scores[members], nms_threshold)]] = True
                instances = instances[kept]
            detections.append({"instances": instances, "num_undefined": undefined})
        return detections
