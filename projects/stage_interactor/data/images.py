"""From a picture, as a file, an array or an image of PIL's, to pixels and to a model's input."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..d2 import transforms as T
from ..d2.data import detection_utils

Picture = str | os.PathLike | np.ndarray | Image.Image


class ImageReadError(RuntimeError):
    """An image file that cannot be read: missing, cut off, or no image.

    Attributes:
        file_name: of the image.
        reason: what the reader said.
    """

    def __init__(self, file_name: str, reason: str | None = None):
        # A data loader's worker hands an exception on as its message alone, hence the default.
        super().__init__(file_name, reason)
        self.file_name = file_name
        self.reason = reason

    def __str__(self) -> str:
        if self.reason is None:
            return self.file_name
        return (
            f"cannot read the image {self.file_name}: {self.reason}; replace the file, or take it "
            "out of the annotation file"
        )


def read_image(file_name: str, image_format: str = "RGB") -> np.ndarray:
    """uint8 (H, W, 3), turned upright by its EXIF tag; ``image_format`` is "RGB" or "BGR".

    Raises:
        ImageReadError: the file cannot be read.
    """
    try:
        with Image.open(file_name) as file:
            if file.mode.startswith(("I", "F")):
                return _eight_bits(file)
        image = detection_utils.read_image(file_name, format=image_format)
        return np.array(image)  # a copy: PIL's own memory cannot be written
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ImageReadError(file_name, f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """RGB of grey values of 16 bits, which Pillow would cut off at 255."""
    values = np.asarray(ImageOps.exif_transpose(image))
    if values.min() < 0 or values.max() > 65535 or image.mode == "F":
        raise ValueError(f"its pixels, of mode {image.mode}, are neither of 8 nor of 16 bits")
    grey = (values // 257 if values.max() > 255 else values).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def check_readable(file_names: Sequence[str]) -> None:
    """Raises an ImageReadError that counts the files that cannot be decoded and names the first."""

    def problem(file_name: str) -> str | None:
        try:
            with Image.open(file_name) as image:
                image.draft("L", (1, 1))  # of a JPEG an eighth: all of the file is read
                image.load()
        except Exception as error:  # as in read_image
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        found = [*zip(file_names, pool.map(problem, file_names))]
    broken = [(file_name, reason) for file_name, reason in found if reason]
    if broken:
        told = f", one of {len(broken)} that cannot be read of {len(found)}" * (len(broken) > 1)
        raise ImageReadError(broken[0][0], f"{broken[0][1]}{told}")


def read_picture(picture: Picture) -> np.ndarray:
    """uint8 (H, W, 3), RGB, turned upright; of a file, a PIL image, or such an array.

    Raises:
        ImageReadError: a file cannot be read as a picture.
        ValueError: an array is of another form.
        TypeError: it is something else.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(
                f"a picture must be uint8 (H, W, 3), RGB; got {picture.dtype} {picture.shape}"
            )
        return picture
    if isinstance(picture, Image.Image):
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    if not isinstance(picture, (str, os.PathLike)):
        raise TypeError(f"a picture is a path, a PIL image or an array, not {type(picture)}")
    return read_image(os.fspath(picture))


def prepare_picture(
    picture: np.ndarray, augmentation: T.AugmentationList, image_format: str
) -> dict[str, Any]:
    """A picture, uint8 (H, W, 3) RGB, as the model takes it: resized, in its order of channels."""
    height, width = picture.shape[:2]
    resized = T.AugInput(
        np.ascontiguousarray(picture if image_format == "RGB" else picture[..., ::-1])
    )
    augmentation(resized)
    return {"image": to_tensor(resized.image), "height": height, "width": width}


def to_tensor(image: np.ndarray) -> Tensor:
    """A copy of an array (H, W, 3) as a tensor (3, H, W)."""
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
