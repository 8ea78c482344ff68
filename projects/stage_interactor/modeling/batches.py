"""Images of one padded size go through the detector together, and no others.

Padding leaks: convolutions, the norm of the neck and the points that queries read at a border see
it. An image that is padded to a larger one beside it would have other detections than alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


def padded_size(image: Tensor, size_divisibility: int) -> tuple[int, int]:
    """Height and width in pixels that an image (..., H, W) is padded to when it is alone."""
    multiple = max(size_divisibility, 1)
    height, width = (-(-side // multiple) * multiple for side in image.shape[-2:])
    return height, width


def same_padded_size(
    batched_inputs: Sequence[Mapping[str, Any]], size_divisibility: int
) -> list[list[int]]:
    """Which of a detector's inputs have the same padded size; sizes in the order of the inputs."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(batched_inputs):
        groups.setdefault(padded_size(image["image"], size_divisibility), []).append(index)
    return list(groups.values())


def detect_by_size(
    detect: Callable[[list[Mapping[str, Any]]], list[dict]],
    batched_inputs: Sequence[Mapping[str, Any]],
    size_divisibility: int,
) -> list[dict]:
    """What ``detect`` gives for the inputs of one padded size at a time, in the inputs' order."""
    found: dict[int, dict] = {}
    for members in same_padded_size(batched_inputs, size_divisibility):
        found.update(zip(members, detect([batched_inputs[index] for index in members])))
    return [found[index] for index in range(len(batched_inputs))]
