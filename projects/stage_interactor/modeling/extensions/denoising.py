"""Queries that start near an object in training, and shall find it: no matching to be learned.

DN-DETR (Li et al., CVPR 2022, sections 4.2 to 4.4): K groups of noised objects go through the
decoder beside the queries that detect. Their boxes are moved and sized, some of their labels are
wrong, and each is asked for the object that it was made of. A mask in the attention keeps them
apart: queries that detect do not see them, groups do not see each other. Detection has none.

``model._target_``, ``model.denoising`` and ``model.decoder.parts.attention`` go together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from ...d2.structures import Instances
from ..assigner import OneToOneAssigner
from ..attention import OverlapAttention
from ..criterion import mean_over_processes
from ..decoder import Decoder
from ..detector import StageInteractor
from ..geometry import boxes_to_xyzr, full_precision
from ..matcher import Targets
from ..stage import StageOutput
from .iou_aware import IoUAssigner
from .query_groups import as_targets, require_whole
from .settled_decoder import SettledDecoder

_SURELY_NOT = -1e4  # a logit
_LEAST_SIZE = 1e-2  # pixels, of a box, which has a logarithm


class Noised(NamedTuple):
    """Queries made of the objects of a batch, groups of M, the most that an image has."""

    content: Tensor  # (B, K * M, D)
    xyzr: Tensor  # (B, K * M, 4)
    objects: Tensor  # (B, K * M), which object a query is made of; -1 for padding
    num_groups: int  # K


class Denoising(nn.Module):
    """Makes queries of objects.

    Args:
        num_classes, embed_dim: C, D.
        num_groups: K at most (5 in DN-DETR).
        max_queries: so many in all at most: where images have many objects there are fewer groups,
            down to one, since the attention grows with the square of the queries.
        label_noise: share of the queries that start with a class drawn from all.
        box_noise: by which share of half its size a box's centre is moved at most, and of its size
            it is made wider or narrower, higher or lower.
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        embed_dim: int = 256,
        num_groups: int = 5,
        max_queries: int = 1000,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
    ):
        super().__init__()
        require_whole(num_groups=num_groups, max_queries=max_queries)
        if not 0 <= label_noise <= 1 or not 0 <= box_noise < 1:
            raise ValueError(
                "label_noise must lie between 0 and 1, and box_noise too and below 1: a box keeps "
                f"a size; got {label_noise} and {box_noise}"
            )
        self.num_classes = num_classes
        self.num_groups, self.max_queries = num_groups, max_queries
        self.label_noise, self.box_noise = label_noise, box_noise
        self.labels = nn.Embedding(num_classes, embed_dim)

    def forward(self, targets: Targets) -> Noised:
        """
        Args:
            targets: the objects of a batch.
        """
        boxes, classes, counts, sizes = targets
        most = max(counts)
        index = torch.arange(most, device=boxes.device)
        is_object = index < torch.tensor(counts, device=boxes.device)[:, None]  # (B, M)
        groups = max(min(self.num_groups, self.max_queries // max(most, 1)), 1)
        objects = torch.where(is_object, index, -1).repeat(1, groups)
        classes = self.with_wrong_labels(classes[:, :most].repeat(1, groups))
        height, width = sizes.unbind(-1)
        whole = torch.stack((0 * width, 0 * height, width, height), -1)[:, None]
        boxes = torch.where(is_object[..., None], boxes[:, :most], whole)  # padding has a size too
        boxes = self.moved(boxes.repeat(1, groups, 1), sizes)
        content = F.layer_norm(self.labels(classes), self.labels.weight.shape[-1:])
        return Noised(content, boxes_to_xyzr(boxes), objects, groups)

    def with_wrong_labels(self, classes: Tensor) -> Tensor:
        """Classes, some of them drawn anew."""
        drawn = torch.randint_like(classes, self.num_classes)
        is_wrong = torch.rand(classes.shape, device=classes.device) < self.label_noise
        return torch.where(is_wrong, drawn, classes)

    def moved(self, boxes: Tensor, image_sizes: Tensor) -> Tensor:
        """Boxes (B, ..., 4) xyxy in pixels with noise; centres stay in the image of (B, 2)."""
        whole = image_sizes.flip(-1).repeat(1, 2)[:, None]
        centred = box_convert(boxes, "xyxy", "cxcywh")
        size = centred[..., 2:]
        noise = 2 * torch.rand_like(centred) - 1
        noised = centred + self.box_noise * noise * torch.cat((size / 2, size), -1)
        noised = torch.minimum(noised.clamp(min=_LEAST_SIZE), whole)
        return box_convert(noised, "cxcywh", "xyxy")


class MaskedOverlapAttention(OverlapAttention):
    """:class:`OverlapAttention` in which not all queries see each other, while a mask is set."""

    visible: Tensor | None = None  # (B, N, N) or (N, N): whether query i sees query j

    def bias(self, xyzr: Tensor) -> Tensor:
        bias = super().bias(xyzr)
        if self.visible is None:
            return bias
        return bias.masked_fill(~self.visible.unsqueeze(-3), -torch.inf)


class DenoisingStageInteractor(StageInteractor):
    """:class:`StageInteractor` that learns from noised objects too.

    Its losses are those of :class:`StageInteractor`, and ``dn_loss_class``, ``dn_loss_bbox``,
    ``dn_loss_giou`` of each stage, with the same weights, divided by the number of noised objects.

    Args:
        denoising: makes the queries.
        others: as of :class:`StageInteractor`; the stages' attention is
            :class:`MaskedOverlapAttention`.
    """

    def __init__(self, *, denoising: Denoising, **others):
        super().__init__(**others)
        self.denoising = denoising
        kinds = {type(stage.attention) for stage in self.decoder.stages}
        if kinds != {MaskedOverlapAttention}:
            raise ValueError(
                "denoising queries need a mask: set model.decoder.parts.attention to "
                "MaskedOverlapAttention"
            )
        if type(self.decoder) not in (Decoder, SettledDecoder):
            raise ValueError(
                f"denoising does not go with {type(self.decoder).__name__}: leave one of them out "
                "(model.denoising, model.decoder.parts.cascade)"
            )

    def losses(
        self,
        images: Tensor,
        image_sizes: Tensor,
        ground_truth: Targets | Sequence[Instances],
    ) -> dict[str, Tensor]:
        """As :meth:`StageInteractor.losses`, with those of the noised objects."""
        if self.criterion is None:
            raise ValueError("StageInteractor was built without a criterion: it cannot be trained")
        features = self.neck(self.backbone(images))
        content, xyzr = self.queries(image_sizes)
        targets = as_targets(ground_truth, full_precision(xyzr)).to(full_precision(xyzr).dtype)
        noised = self.denoising(targets)
        count = content.shape[1]
        visible = visible_to_each(count, noised.objects, noised.num_groups)
        with self._masked(visible):
            outputs = self.decoder(
                features,
                torch.cat((content, noised.content.to(content.dtype)), 1),
                torch.cat((xyzr, noised.xyzr.to(xyzr.dtype)), 1),
            )
        detecting, denoised = (
            [StageOutput(*(field[:, part] for field in output)) for output in outputs]
            for part in (slice(count), slice(count, None))
        )
        named = self.criterion(detecting, targets)
        return named | self._reconstruction(denoised, targets, noised.objects)

    def _reconstruction(
        self, outputs: Sequence[StageOutput], targets: Targets, objects: Tensor
    ) -> dict[str, Tensor]:
        criterion = self.criterion
        assert criterion is not None
        with torch.autocast(objects.device.type, enabled=False):
            logits = full_precision(torch.stack([output.logits for output in outputs]))
            boxes = full_precision(torch.stack([output.boxes for output in outputs]))
            targets = targets.to(boxes.dtype)
            matched = objects.expand(len(outputs), -1, -1)  # known, and the same on each stage
            assigner = criterion.assigner
            own: OneToOneAssigner | IoUAssigner = OneToOneAssigner()
            if isinstance(assigner, IoUAssigner):
                fit = assigner.temperature
                least = 0.0 if fit is None else assigner.middle
                own = IoUAssigner(scope=("i",), iou_threshold=least, temperature=fit)
            # Padding is no query: at such a logit a class that is not there costs nothing.
            logits = logits.masked_fill((objects < 0)[None, ..., None], _SURELY_NOT)
            labels = own(matched, boxes.detach(), targets, criterion.num_classes)
            losses = criterion.losses(logits, boxes, targets, matched, labels)
            number = mean_over_processes((objects >= 0).sum().to(boxes.dtype))
            counts = number.expand(2, len(outputs))
            named = criterion.named(torch.stack(losses), counts)
        return {f"dn_{name}": loss for name, loss in named.items()}

    @contextmanager
    def _masked(self, visible: Tensor) -> Iterator[None]:
        attentions: Any = [stage.attention for stage in self.decoder.stages]
        for attention in attentions:
            attention.visible = visible
        try:
            yield
        finally:
            for attention in attentions:
                attention.visible = None


def visible_to_each(num_queries: int, objects: Tensor, num_groups: int) -> Tensor:
    """(B, N + K * M, N + K * M): whether query i sees query j.

    Args:
        num_queries: N, those that detect, which come first and see each other alone.
        objects: (B, K * M), as of :class:`Noised`. Noised queries see those that detect and their
            own group, without its padding. Each query sees itself.
        num_groups: K.
    """
    batch, noised = objects.shape
    group = torch.arange(noised, device=objects.device) // max(noised // num_groups, 1)
    group = F.pad(group, (num_queries, 0), value=-1)  # of those that detect: -1
    same = group[:, None] == group
    is_real = F.pad(objects >= 0, (num_queries, 0), value=True)  # (B, N + K * M)
    visible = (same | (group == -1)) & is_real[:, None]
    return visible | torch.eye(len(group), dtype=torch.bool, device=objects.device)
