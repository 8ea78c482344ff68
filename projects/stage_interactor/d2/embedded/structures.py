"""Stands in for ``detectron2.structures``: boxes, instances, image batches.

Left out: masks, keypoints, rotated boxes, relative box modes, ``pairwise_iou`` (torchvision has
it), ``Boxes.clip``, ``scale``, ``inside_box`` and ``get_centers``, square padding, padding by other
values than zero, single images and devices of image batches, TorchScript.
"""

import itertools
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["BoxMode", "Boxes", "ImageList", "Instances"]


class BoxMode(IntEnum):
    """How four numbers describe a box; the values are detectron2's."""

    XYXY_ABS = 0  # left, top, right, bottom in pixels
    XYWH_ABS = 1  # left, top, width, height in pixels
    XYXY_REL = 2  # relative to the image size; not convertible
    XYWH_REL = 3  # relative to the image size; not convertible

    @staticmethod
    def convert(box: Any, from_mode: "BoxMode", to_mode: "BoxMode") -> Any:
        """Convert between ``XYXY_ABS`` and ``XYWH_ABS``.

        Args:
            box: four numbers in a list or tuple, or an array or tensor of shape (N, 4), in pixels.

        Returns:
            The same type and shape; the input is not changed.

        Raises:
            ValueError: for a list or tuple that has not four numbers.
            NotImplementedError: for other modes.
        """
        if from_mode == to_mode:
            return box
        single = isinstance(box, (list, tuple))
        if single and len(box) != 4:
            raise ValueError(f"BoxMode.convert got {box!r}; a single box has four numbers.")
        # A list goes through a float32 tensor, as in detectron2: the rounding is part of the result
        boxes = torch.tensor(box)[None] if single else torch.as_tensor(box).clone()
        if (from_mode, to_mode) == (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
            boxes[:, 2:] += boxes[:, :2]
        elif (from_mode, to_mode) == (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            boxes[:, 2:] -= boxes[:, :2]
        else:
            raise NotImplementedError(
                f"Conversion of boxes from {from_mode!r} to {to_mode!r} is not supported."
            )
        if single:
            return type(box)(boxes[0].tolist())
        return boxes.numpy() if isinstance(box, np.ndarray) else boxes


class Boxes:
    """Boxes as one matrix.

    Attributes:
        tensor: (N, 4) float32, each row (x1, y1, x2, y2) in pixels.
    """

    def __init__(self, tensor: Any):
        tensor = torch.as_tensor(tensor, dtype=torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        if tensor.dim() != 2 or tensor.size(-1) != 4:
            raise ValueError(f"Boxes need a tensor of shape (N, 4), got {tuple(tensor.shape)}.")
        self.tensor = tensor

    def to(self, device: torch.device | str) -> "Boxes":
        return Boxes(self.tensor.to(device=device))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def area(self) -> torch.Tensor:
        """Areas in square pixels, (N,)."""
        width, height = (self.tensor[:, 2:] - self.tensor[:, :2]).unbind(1)
        return width * height

    def clone(self) -> "Boxes":
        return Boxes(self.tensor.clone())

    def clip(self, box_size: tuple[int, int]) -> None:
        """Move all corners into an image of (height, width), in place.

        Raises:
            ValueError: if a coordinate is infinite or NaN.
        """
        if not torch.isfinite(self.tensor).all():
            raise ValueError(f"Boxes to clip contain infinite or NaN coordinates: {self.tensor}")
        height, width = box_size
        limits = self.tensor.new_tensor([width, height, width, height])
        self.tensor = torch.minimum(self.tensor.clamp(min=0), limits)

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply the coordinates, in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        """Which boxes are wider and higher than ``threshold`` pixels, (N,) bool."""
        return ((self.tensor[:, 2:] - self.tensor[:, :2]) > threshold).all(dim=1)

    @classmethod
    def cat(cls, boxes_list: list["Boxes"]) -> "Boxes":
        if not boxes_list:
            return cls(torch.empty(0))
        return cls(torch.cat([boxes.tensor for boxes in boxes_list], dim=0))

    def __getitem__(self, item: Any) -> "Boxes":
        """Index by int, slice, or a vector of bools or indices; the result is always (M, 4)."""
        return Boxes(self.tensor[item].view(1, -1) if isinstance(item, int) else self.tensor[item])

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"


class Instances:
    """The objects of one image: named fields (boxes, classes, scores, ...) of equal length.

    Args:
        image_size: (height, width) in pixels.
        **kwargs: the fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._image_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "_fields" or name not in self._fields:
            known = list(self.__dict__.get("_fields", ()))
            raise AttributeError(f"Instances have no field {name!r}; their fields are {known}.")
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Set a field.

        Raises:
            ValueError: if its length is not that of the other fields.
        """
        if self._fields and len(value) != len(self):
            raise ValueError(
                f"Field {name!r} of length {len(value)} does not fit Instances of length "
                f"{len(self)}."
            )
        self._fields[name] = value

    def has(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str) -> Any:
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """The fields themselves: changing the dict changes the instances."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> "Instances":
        """Move or convert all fields that have a method ``to``."""
        moved = Instances(self._image_size)
        for name, value in self._fields.items():
            moved.set(name, value.to(*args, **kwargs) if hasattr(value, "to") else value)
        return moved

    def __getitem__(self, item: Any) -> "Instances":
        """Index all fields by int, slice, or a vector of bools or indices."""
        if type(item) is int:
            if not -len(self) <= item < len(self):
                raise IndexError(f"Index {item} is out of range for {len(self)} instances.")
            item = slice(item, None, len(self))
        picked = Instances(self._image_size)
        for name, value in self._fields.items():
            picked.set(name, value[item])
        return picked

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without a field have no length.")

    def __iter__(self) -> NoReturn:
        raise NotImplementedError("Instances cannot be iterated; index them instead.")

    @staticmethod
    def cat(instance_lists: list["Instances"]) -> "Instances":
        """Join instances of one image that have the same fields.

        Raises:
            ValueError: if the image sizes differ or a field cannot be joined.
        """
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        if any(other.image_size != first.image_size for other in instance_lists):
            sizes = [instances.image_size for instances in instance_lists]
            raise ValueError(f"Instances of different image sizes cannot be joined: {sizes}.")
        joined = Instances(first.image_size)
        for name, value in first.get_fields().items():
            values = [instances.get(name) for instances in instance_lists]
            if isinstance(value, torch.Tensor):
                joined.set(name, torch.cat(values, dim=0))
            elif isinstance(value, list):
                joined.set(name, list(itertools.chain.from_iterable(values)))
            elif hasattr(type(value), "cat"):
                joined.set(name, type(value).cat(values))
            else:
                raise ValueError(f"Field {name!r} of type {type(value)} cannot be joined.")
        return joined

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        count = len(self) if self._fields else 0
        height, width = self._image_size
        return f"Instances({count} of an image of {height} x {width}, fields=[{fields}])"


class ImageList:
    """Images of different sizes in one padded tensor.

    Attributes:
        tensor: (N, ..., H, W); each image lies in the upper left corner.
        image_sizes: (height, width) of each image before padding, in pixels.
    """

    def __init__(self, tensor: torch.Tensor, image_sizes: list[tuple[int, int]]):
        self.tensor = tensor
        self.image_sizes = image_sizes

    @staticmethod
    def from_tensors(
        tensors: list[torch.Tensor],
        size_divisibility: int = 0,
    ) -> "ImageList":
        """Pad images with zeros, at the right and at the bottom, to a common size.

        Args:
            tensors: each (..., height, width), equal in all other dimensions.
            size_divisibility: above 1, the common height and width are multiples of it.

        Raises:
            ValueError: if there is no image, or their channels differ.
        """
        if not tensors or any(image.shape[:-2] != tensors[0].shape[:-2] for image in tensors):
            shapes = [tuple(image.shape) for image in tensors]
            raise ValueError(f"Images to batch must be equal but in height and width: {shapes}.")
        image_sizes = [(image.shape[-2], image.shape[-1]) for image in tensors]
        height, width = (max(sizes) for sizes in zip(*image_sizes))
        if size_divisibility > 1:
            stride = size_divisibility
            height, width = -(-height // stride) * stride, -(-width // stride) * stride
        padded = [
            F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
            for image in tensors
        ]
        return ImageList(torch.stack(padded), image_sizes)
