"""A cascade of one stage after the first, applied until its queries settle: a fixed point.

DEQDet (Wang et al., "Deep Equilibrium Object Detection", ICCV 2023, sections 3.2 to 3.4): the first
stage places the queries, and a second one, with weights of its own that all later steps share,
refines them again and again. Detection has two stages' weights, and as many steps as one likes.

The training has four tricks, named as in the paper:

* *Inexact gradient*: the path of T steps is walked without gradient, so its memory is that of one.
* *Refinement-aware gradient* (RAG): from where the path is at a supervised step, two more steps are
  unrolled with gradient, so that a step also learns what the next one makes of its result.
* *Deep supervision* on the path: at several of its steps, and of the two that follow the first
  stage, whose gradient goes into the first stage too.
* *Refinement-aware perturbation* (RAP): now and then a step of the path starts from noised content
  or boxes, so that the stage learns to find the way back.

What differs: filters of a step are part of what it hands to the next one, so the tied stage can
reuse those of the step before (``first_reusing_stage=1`` and as many points on both stages); labels
come across the supervised steps by the assigner of the config; all losses have one backward pass,
where the authors' code has one for each supervised step to save memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops import Pyramid
from ..decoder import Decoder
from ..geometry import box_size, xyzr_to_boxes
from ..mixing import Filters
from ..stage import DecoderStage, StageOutput

_LEAST_SIZE = 1e-7  # pixels, of a box whose sides the noise has put on each other


class State(NamedTuple):
    """What a step starts from: content (B, N, D), positions (B, N, 4), filters stored before."""

    content: Tensor
    xyzr: Tensor
    stored: tuple[Filters, ...]


class FixedPointDecoder(Decoder):
    """A first stage, and a second one that is applied ``steps`` times and once more.

    ``model.decoder.parts.cascade=L(FixedPointDecoder)()`` in a config whose ``num_points`` are of
    two stages.

    Args:
        stages: the two.
        exit_stage: after how many stages detection ends, the first and the steps; None for all.
        steps: T, of the path in training (20 in DEQDet).
        supervised: after which of them losses are taken, in ascending order.
        unrolled: steps with gradient behind each of these, and behind the first stage.
        noise_probability: of a step of the path to start from noised content, and likewise boxes.
        content_noise: share of the content that is replaced by noise of its norm.
        box_noise: standard deviation of the noise of a box's sides, as a share of the shorter side
            of the box that the query started with, the image (25 of 800 pixels in DEQDet).

    Raises:
        ValueError: there are not two stages, or a number is out of its range.
    """

    def __init__(
        self,
        stages: Sequence[DecoderStage],
        exit_stage: int | None = None,
        *,
        steps: int = 20,
        supervised: Sequence[int] = (1, 3, 6, 9, 12, 20),
        unrolled: int = 2,
        noise_probability: float = 0.2,
        content_noise: float = 0.1,
        box_noise: float = 1 / 32,
    ):
        super().__init__(stages)
        if len(self.stages) != 2:
            raise ValueError(
                f"FixedPointDecoder takes a first stage and one that is repeated: "
                f"model.decoder.num_points must be of 2 stages, not of {len(self.stages)}"
            )
        numbers = [steps, unrolled, *supervised]
        if not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError(f"steps, unrolled and supervised must be 1 or more, got {numbers}")
        if list(supervised) != sorted(set(supervised)) or not supervised or supervised[-1] > steps:
            raise ValueError(
                f"supervised must name some of the steps 1 to {steps}, in ascending order, got "
                f"{list(supervised)}"
            )
        if not 0 <= noise_probability <= 1 or not 0 <= content_noise <= 1 or not box_noise >= 0:
            raise ValueError(
                "noise_probability and content_noise must lie between 0 and 1, and box_noise be 0 "
                f"or more, got {noise_probability}, {content_noise}, {box_noise}"
            )
        if exit_stage is not None and not 1 <= exit_stage <= steps + 2:
            raise ValueError(
                f"exit_stage must be one of 1 to {steps + 2}, the first stage and {steps + 1} "
                f"steps, got {exit_stage}"
            )
        self.exit_stage = exit_stage
        self.steps = steps
        self.supervised = tuple(supervised)
        self.unrolled = unrolled
        self.noise_probability = noise_probability
        self.content_noise = content_noise
        self.box_noise = box_noise

    @property
    def options(self) -> dict[str, Any]:
        """What it was built with, but stages and exit_stage."""
        names = "steps supervised unrolled noise_probability content_noise box_noise"
        return {name: getattr(self, name) for name in names.split()}

    def forward(
        self, features: Pyramid | Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> list[StageOutput]:
        """As :class:`Decoder`; at inference the outputs of the first stage and of each step.

        In training those that are supervised: of the first stage, of the steps behind it, and of
        the last step behind each supervised one of the path.
        """
        pyramid = features if isinstance(features, Pyramid) else Pyramid(features)
        start = State(content, xyzr, ())
        if self.training:
            return self._supervised_outputs(pyramid, start)
        outputs: list[StageOutput] = []
        state = start
        while len(outputs) < depth(self):
            output, state = self._step(min(len(outputs), 1), pyramid, state)
            outputs.append(output)
        return outputs

    def _step(self, stage: int, pyramid: Pyramid, state: State) -> tuple[StageOutput, State]:
        stages: Any = self.stages
        output, filters = stages[stage](pyramid, *state)
        return output, State(output.content, output.xyzr.detach(), (filters,))

    def _supervised_outputs(self, pyramid: Pyramid, state: State) -> list[StageOutput]:
        image_side = box_size(state.xyzr).amin(-1, keepdim=True)  # (B, N, 1)
        output, state = self._step(0, pyramid, state)
        outputs = [output]
        ahead = state
        for _ in range(self.unrolled):
            output, ahead = self._step(1, pyramid, ahead)
            outputs.append(output)
        for number in range(1, self.steps + 1):
            with torch.no_grad():
                _, state = self._step(1, pyramid, self._noised(state, image_side))
            if number in self.supervised:
                ahead = state
                for _ in range(self.unrolled):
                    output, ahead = self._step(1, pyramid, ahead)
                outputs.append(output)
        return outputs

    def _noised(self, state: State, image_side: Tensor) -> State:
        """Content and boxes of a step, now and then with noise."""
        content, xyzr, stored = state
        if torch.rand(1) < self.noise_probability:
            noise = torch.randn_like(content) * content.norm(dim=-1, keepdim=True)
            content = torch.lerp(content, noise, self.content_noise)
        if torch.rand(1) < self.noise_probability:
            boxes = xyzr_to_boxes(xyzr)
            boxes = boxes + torch.randn_like(boxes) * (self.box_noise * image_side)
            centre = (boxes[..., :2] + boxes[..., 2:]) / 2
            # Sides that have passed each other change places.
            size = ((boxes[..., 2:] - boxes[..., :2]).abs() + _LEAST_SIZE).log2()
            z, r = size.mean(-1, keepdim=True), size[..., 1:] - size[..., :1]
            xyzr = torch.cat((centre, z, r), -1)
        return State(content, xyzr, stored)


def depth(decoder: Decoder) -> int:
    """How many stages detection goes through, at most, however many of them have own weights."""
    if decoder.exit_stage is not None:
        return decoder.exit_stage
    return decoder.steps + 2 if isinstance(decoder, FixedPointDecoder) else len(decoder.stages)


def as_trained(decoder: Decoder, outputs: Sequence[StageOutput]) -> list[StageOutput]:
    """Of the outputs at inference those whose place training takes losses of, as many as there."""
    if not isinstance(decoder, FixedPointDecoder):
        return list(outputs)
    behind = [step + decoder.unrolled for step in decoder.supervised]
    return [
        outputs[min(step, len(outputs) - 1)] for step in (*range(decoder.unrolled + 1), *behind)
    ]
