"""The losses of the data that are evaluated on, from the same forward pass as their detections."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..d2 import comm
from ..d2.structures import Boxes, Instances
from ..modeling import Criterion, Decoder, StageInteractor, StageOutput
from ..modeling.batches import same_padded_size
from ..modeling.extensions.fixed_point import FixedPointDecoder, as_trained
from ..modeling.extensions.settled_decoder import SettledDecoder
from .flight_recorder import FlightRecorder

TASK = "validation"  # beside "bbox" in an evaluation's results


def has_losses(model: StageInteractor) -> bool:
    """Whether the losses of a model are the criterion's that this package knows to add up."""
    own: Any = type(model.criterion)
    return isinstance(model.criterion, Criterion) and own.forward is Criterion.forward


def in_model_classes(objects: Instances, classes: Sequence[int] | None) -> Instances:
    """Boxes and classes of objects; ``classes``: by the model's index that of the data."""
    labels = objects.gt_classes
    return Instances(
        objects.image_size,
        gt_boxes=Boxes(objects.gt_boxes.tensor),
        gt_classes=labels if classes is None else torch.tensor(classes).argsort()[labels],
    )


def with_decoder(model: StageInteractor, decoder: Decoder) -> StageInteractor:
    """The detector with another decoder, and all else its own."""
    other = copy.copy(model)
    other._modules = {**model._modules, "decoder": decoder.train(model.training)}
    return other


def with_all_stages(model: StageInteractor) -> StageInteractor:
    """The detector, whose cascade ends nowhere early."""
    decoder: Any = model.decoder
    if decoder.exit_stage is None and not isinstance(decoder, SettledDecoder):
        return model
    stages = [*decoder.stages]
    if isinstance(decoder, FixedPointDecoder):
        return with_decoder(model, FixedPointDecoder(stages, **decoder.options))
    return with_decoder(model, Decoder(stages))


class ValidationLoss(nn.Module):
    """A detector that adds up its criterion's losses while it detects.

    They are those that all images would have as one batch, whatever the batches are: the sums over
    all images, divided by the matches and labels of all images.

    Args:
        model: detects, and has a criterion.
        detector: what detects in its place, such as a copy in half precision; the losses are the
            model's, by a forward pass of its own then. So they are where the model's cascade ends
            early: losses and labels are those of all stages, as in training. Of a fixed point they
            are those of as many steps as training takes losses of.
        classes: by the model's class index that of the data, if they differ.
        recorder: is given the same outputs.
    """

    def __init__(
        self,
        model: StageInteractor,
        detector: nn.Module | None = None,
        classes: Sequence[int] | None = None,
        recorder: FlightRecorder | None = None,
    ):
        super().__init__()
        self.model = with_all_stages(model)
        self.detector = model if detector is None else detector
        assert isinstance(model.criterion, Criterion)
        self._criterion = model.criterion
        self._classes = classes
        self._recorder = recorder
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None
        self._with_objects = True

    @property
    def size_divisibility(self) -> int:
        return self.detector.size_divisibility  # type: ignore[return-value]

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict]:
        """What the detector gives for inputs that have ``instances`` beside the image."""
        outputs: list[Sequence[StageOutput]] = []
        handle = self.model.decoder.register_forward_hook(
            lambda module, arguments, stages: outputs.append(as_trained(module, stages))
        )
        try:
            found = self.detector(batched_inputs)
            if self.detector is not self.model:
                self.model(batched_inputs)
        finally:
            handle.remove()
        # The detector has taken the images of one padded size at a time.
        groups = same_padded_size(batched_inputs, self.model.size_divisibility)
        for stages, members in zip(outputs, groups, strict=True):
            self._add(stages, [batched_inputs[index] for index in members])
        return found

    @torch.no_grad()
    def _add(self, stages: Sequence[StageOutput], images: Sequence[Mapping[str, Any]]) -> None:
        if not all("instances" in image for image in images):  # of a mapper of one's own
            self._with_objects = False
            return
        objects = [in_model_classes(image["instances"], self._classes) for image in images]
        sums, counts = self._criterion.sums(stages, objects)
        if self._recorder is not None:
            self._recorder.add(self._criterion, stages, images, objects)
        sums, counts = sums.cpu().double(), counts.cpu().double()
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts

    @property
    def knows_objects(self) -> bool:
        """Whether all images came with their objects; to be called by all processes."""
        return all(comm.all_gather(self._with_objects))

    def results(self) -> dict[str, dict[str, float]]:
        """The losses of all processes' images, and ``total_loss``, their sum.

        To be called by all processes; empty where the data came without their objects.
        """
        own = None if self._sums is None else (self._sums, self._counts)
        found = [part for part in comm.all_gather(own) if part is not None]
        if not self.knows_objects or not found:
            return {}
        sums, counts = (torch.stack(parts).sum(0) for parts in zip(*found))
        losses = self._criterion.named(sums, counts.clamp(min=1))
        named = {name: float(value) for name, value in losses.items()}
        return {TASK: {"total_loss": sum(named.values()), **named}}
