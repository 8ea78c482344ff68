"""How images come to the device, and which of them go through the detector together.

At inference those of one padded size do, and no others: padding leaks. Convolutions, the norm of
the neck and the points that queries read at a border see it, so that an image padded to a larger
one beside it would have other detections than alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..d2.structures import Instances
from .matcher import Targets
from .transfer import HostBatch


class Batch(NamedTuple):
    """Images on a device, padded with zeros at the right and the bottom, and their objects."""

    tensor: Tensor  # (B, C, H, W)
    image_sizes: list[tuple[int, int]]  # height and width of each image without padding
    sizes: Tensor  # the same, (B, 2), on the device
    targets: Targets | None  # the objects, if they were given

    @classmethod
    def of_images(
        cls,
        images: Sequence[Tensor],
        size_divisibility: int,
        device: torch.device,
        objects: Sequence[Instances] | None = None,
    ) -> "Batch":
        """Of images (C, H, W); all that is on the host comes to the device by one transfer.

        Raises:
            ValueError: for no image, and for images that differ in more than height and width.
        """
        if not images or any(image.shape[:-2] != images[0].shape[:-2] for image in images):
            shapes = [tuple(image.shape) for image in images]
            raise ValueError(f"Images to batch must be equal but in height and width: {shapes}.")
        padded = [padded_size(image, size_divisibility) for image in images]
        height, width = (max(sides) for sides in zip(*padded))
        shape, dtype = (len(images), *images[0].shape[:-2], height, width), images[0].dtype
        for image in images:
            dtype = torch.promote_types(dtype, image.dtype)
        image_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        of_objects = Targets.specs(objects) if objects else []
        on_host = images[0].device.type == "cpu"
        of_images = [(shape, dtype)] if on_host else []
        host = HostBatch(device, ((len(images), 2), torch.long), *of_objects, *of_images)
        host.tensors[0].copy_(torch.tensor(image_sizes))
        if objects:
            Targets.fill(objects, *host.tensors[1:4])
        if on_host:
            _fill(host.tensors[-1], images)
        sizes, *moved = host.to_device()
        if not on_host:
            moved.append(torch.empty(shape, dtype=dtype, device=device))
            _fill(moved[-1], images)
        targets = Targets.of_tensors(objects, *moved[:3]) if objects else None
        return cls(moved[-1], image_sizes, sizes, targets)

    def normalised(self, mean: Tensor, std: Tensor) -> "Batch":
        """With ``(image - mean) / std``, and zeros where an image has ended, as its tensor."""
        tensor = (self.tensor - mean) / std
        height, width = tensor.shape[-2:]
        if any(size != (height, width) for size in self.image_sizes):
            rows = torch.arange(height, device=tensor.device)[:, None]
            columns = torch.arange(width, device=tensor.device)
            ends = self.sizes[..., None, None]  # (B, 2, 1, 1)
            outside = (rows >= ends[:, 0]) | (columns >= ends[:, 1])  # (B, H, W)
            tensor = tensor.masked_fill(outside[:, None], 0)
        return self._replace(tensor=tensor)


def _fill(batch: Tensor, images: Sequence[Tensor]) -> None:
    """Puts each image (C, H, W) into the upper left corner of its row of a batch, on zeros."""
    if all(image.shape == batch.shape[1:] for image in images):
        torch.stack(list(images), out=batch)
        return
    batch.zero_()
    for row, image in zip(batch, images):
        row[..., : image.shape[-2], : image.shape[-1]].copy_(image)


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
