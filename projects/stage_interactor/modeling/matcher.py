"""One-to-one matching of queries and objects on every stage, as in AdaMixer (section J)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..d2.structures import Instances
from .geometry import iou_and_giou
from .transfer import HostBatch, to_device


class Targets(NamedTuple):
    """The objects of a batch, padded to the image with the most of them (M, at least 1)."""

    boxes: Tensor  # (B, M, 4), xyxy in pixels of the resized image
    classes: Tensor  # (B, M), 0-based
    counts: tuple[int, ...]  # objects of each image; rows from there on are padding
    image_sizes: Tensor  # (B, 2), height and width

    @classmethod
    def from_instances(
        cls,
        instances: Sequence[Instances],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> "Targets":
        """From detectron2 Instances with ``gt_boxes`` and ``gt_classes``; on their device if none
        is named."""
        own = instances[0].gt_boxes.tensor.device
        specs = cls.specs(instances)
        if own.type == "cpu":
            host = HostBatch(device or own, *specs)
            cls.fill(instances, *host.tensors)
            return cls.of_tensors(instances, *host.to_device()).to(dtype)
        tensors = [torch.empty(shape, dtype=kind, device=own) for shape, kind in specs]
        cls.fill(instances, *tensors)
        return cls.of_tensors(instances, *tensors).to(dtype)

    @staticmethod
    def specs(instances: Sequence[Instances]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and precision of boxes, classes and image sizes, as :class:`HostBatch` takes."""
        shape = len(instances), max(1, *(len(image) for image in instances))
        return [((*shape, 4), torch.float32), (shape, torch.long), ((shape[0], 2), torch.float32)]

    @staticmethod
    def fill(instances: Sequence[Instances], boxes: Tensor, classes: Tensor, sizes: Tensor) -> None:
        """Fills tensors of :meth:`specs`; on the host that is done before a transfer."""
        most = classes.shape[1]
        rows = [
            number * most + index
            for number, image in enumerate(instances)
            for index in range(len(image))
        ]
        places = to_device(torch.tensor(rows, dtype=torch.long), classes.device)
        boxes.zero_().view(-1, 4)[places] = torch.cat([i.gt_boxes.tensor for i in instances])
        found = torch.cat([image.gt_classes for image in instances])
        classes.zero_().view(-1)[places] = found.to(torch.long)
        sizes.copy_(torch.tensor([image.image_size for image in instances], dtype=sizes.dtype))

    @classmethod
    def of_tensors(
        cls, instances: Sequence[Instances], boxes: Tensor, classes: Tensor, sizes: Tensor
    ) -> "Targets":
        """Of tensors that :meth:`fill` has filled, wherever they are by now."""
        return cls(boxes, classes, tuple(len(image) for image in instances), sizes)

    def to(self, dtype: torch.dtype) -> "Targets":
        """The same in another precision."""
        return self._replace(boxes=self.boxes.to(dtype), image_sizes=self.image_sizes.to(dtype))

    @property
    def box_scale(self) -> Tensor:
        """(B, 4): width, height, width, height, which normalise boxes xyxy to 0..1."""
        return self.image_sizes.flip(-1).repeat(1, 2)

    def of_matches(self, matched: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (L, B, N, 4) and classes (L, B, N) of matched objects.

        ``matched`` (L, B, N) are a matcher's indices; -1, for none, gets the image's first row.
        """
        index = matched.clamp(min=0)
        boxes = self.boxes.expand(len(matched), -1, -1, -1)
        classes = self.classes.expand(len(matched), -1, -1)
        return boxes.gather(2, index[..., None].expand(-1, -1, -1, 4)), classes.gather(2, index)


class DetrStyleMatcher(nn.Module):
    """A matcher with DETR's interface, such as detrex's, in :class:`HungarianMatcher`'s place.

    Args:
        matcher: called once a stage with ``{"pred_logits": (B, N, C), "pred_boxes": (B, N, 4)}``
            and for each image ``{"labels": (M,), "boxes": (M, 4)}``, boxes cxcywh, 0 to 1; gives
            for each image the indices of matched queries and of their objects.
    """

    def __init__(self, matcher: nn.Module):
        super().__init__()
        self.matcher = matcher

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """See :meth:`HungarianMatcher.forward`."""
        scale = targets.box_scale[:, None]  # (B, 1, 4)
        boxes = box_convert(boxes / scale, "xyxy", "cxcywh")
        objects = box_convert(targets.boxes / scale, "xyxy", "cxcywh")
        truth = [
            {"labels": classes[:count], "boxes": box[:count]}
            for classes, box, count in zip(targets.classes, objects, targets.counts)
        ]
        matched = torch.full(logits.shape[:3], -1, device=logits.device)
        for stage, (stage_logits, stage_boxes) in enumerate(zip(logits, boxes)):
            pairs = self.matcher({"pred_logits": stage_logits, "pred_boxes": stage_boxes}, truth)
            for image, (queries, indices) in enumerate(pairs):
                matched[stage, image, queries] = indices.to(matched.device)
        return matched


class HungarianMatcher(nn.Module):
    """Minimum-cost matching: focal cost + L1 of normalised corners + negative GIoU.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the three costs.
        alpha, gamma: of the focal cost.
    """

    def __init__(
        self,
        *,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma

    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Cost (L, B, M, N) of every object for every query."""
        classes = targets.classes[:, None].expand(*logits.shape[:3], -1)  # (L, B, N, M)
        score = logits.gather(-1, classes).mT.contiguous().sigmoid()
        positive = self.alpha * (1 - score).pow(self.gamma) * -(score + 1e-12).log()
        negative = (1 - self.alpha) * score.pow(self.gamma) * -(1 - score + 1e-12).log()
        scale = targets.box_scale[:, None]  # (B, 1, 4)
        objects = targets.boxes.expand(len(boxes), -1, -1, -1)  # (L, B, M, 4)
        l1 = torch.cdist(objects / scale, boxes / scale, p=1)
        _, giou = iou_and_giou(objects[..., None, :], boxes[..., None, :, :])
        return self.cost_class * (positive - negative) + self.cost_bbox * l1 - self.cost_giou * giou

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """
        Args:
            logits: (L, B, N, C) of all stages.
            boxes: (L, B, N, 4), xyxy in pixels.

        Returns:
            (L, B, N): for each query the index of its object, -1 for none. With more objects than
            queries every query gets one.
        """
        costs = self.cost(logits, boxes, targets)
        # All stages and images in one transfer. What is not finite is for the losses to report.
        cost = costs.nan_to_num(nan=1e8, posinf=1e8, neginf=-1e8).cpu().numpy()
        # The solver takes 25 microseconds for 300 queries and 20 objects: threads cost more.
        matched = np.full(logits.shape[:3], -1)
        for stage_cost, stage_matched in zip(cost, matched):
            for image_cost, image_matched, count in zip(stage_cost, stage_matched, targets.counts):
                objects, queries = linear_sum_assignment(image_cost[:count])
                image_matched[queries] = objects
        return to_device(torch.from_numpy(matched), logits.device)
