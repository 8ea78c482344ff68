"""From a picture, as a file, an array or an image of PIL's, to pixels and to a model's input."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..d2 import transforms as T
from ..errors import UserError, legible
from ..untrusted.pictures import decoding, open_image
from .formats.files import IMAGE_SUFFIXES as IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

Picture = str | os.PathLike | np.ndarray | Image.Image

_BITS = (8, 10, 12, 14, 16)  # that cameras and scanners measure a grey value with
EXIF_ORIENTATION = 0x0112
_TIFF_KIND, _SMALLER, _MASK = 254, 1, 4  # tag, and its bits: of the same picture
_TIFF_BITS, _TIFF_MAXIMUM = 258, 281  # tags: bits of a value, its largest one
# Whose further pictures are others, which those of an MPO, of two lenses or of less depth, are not.
_SEQUENCES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
_told: set[str] = set()  # files, by this process


class ImageReadError(UserError, RuntimeError):
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
            f"cannot read the image {self.file_name}: {self.reason}; replace the file, or leave it "
            "out, of an annotation file too"
        )


def read_image(
    file_name: str | os.PathLike,
    image_format: str = "RGB",
    least_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    content: bytes | None = None,
) -> np.ndarray:
    """uint8 (H, W, 3), turned upright by its EXIF tag; ``image_format`` is "RGB" or "BGR".

    Of grey values that are stored in 16 bits all of their range is kept, black to white: that of
    as many bits as the file says that they have (TIFF, PGM), or else, since cameras of 10, 12 and
    14 bits write files of 16, of the fewest of 8, 10, 12, 14 and 16 bits that hold the brightest.

    Args:
        least_size: of a JPEG, gives what its (height, width) may be reduced to: it is decoded to a
            half, a quarter or an eighth, rounded up, that is no smaller.
        content: what is in the file, where it is not one of this machine; ``file_name`` is told.

    Raises:
        ImageReadError: the file cannot be read.
    """
    try:
        with open_image(file_name if content is None else content) as image, decoding(image):
            if least_size is not None and image.format == "JPEG":
                on_its_side = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
                step = 1 if on_its_side else -1
                image.draft("RGB", least_size(image.size[::step])[::step])
            pixels = _pixels(image, own=True)
            _tell_of_sequence(image, os.fspath(file_name))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ImageReadError(os.fspath(file_name), reason_of(error)) from error
    return np.ascontiguousarray(pixels[:, :, ::-1]) if image_format == "BGR" else pixels


def _tell_of_sequence(image: Image.Image, file_name: str) -> None:
    """Of a picture that is decoded, and of one of them, not of each of thousands."""
    if _told or torch.utils.data.get_worker_info() is not None:  # which would tell it of its own
        return
    if _is_sequence(image) and not _told:
        _told.add(file_name)
        logger.warning(
            f"{legible(file_name)} holds several pictures, of which the first is read; others that "
            "do are not told"
        )


def _is_sequence(image: Image.Image) -> bool:
    try:
        if image.format not in _SEQUENCES or not getattr(image, "is_animated", False):
            return False
        image.seek(1)
        return not getattr(image, "tag_v2", {}).get(_TIFF_KIND, 0) & (_SMALLER | _MASK)
    except Exception:  # of a second picture that is damaged
        return False


def reason_of(error: Exception) -> str:
    """What is told of an error of Pillow's, or of our own."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _pixels(image: Image.Image, own: bool = False) -> np.ndarray:
    """uint8 (H, W, 3), RGB, a copy, turned upright; an ``own`` image may be changed."""
    bits = _told_bits(image)
    if own:  # of a large picture each copy is a part of the memory
        ImageOps.exif_transpose(image, in_place=True)
    else:
        image = ImageOps.exif_transpose(image)
    if not image.mode.startswith(("I", "F")):
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    values = np.asarray(image)
    brightest = values.max()
    if image.mode == "F" or values.min() < 0 or brightest > 65535:
        raise ValueError(f"its pixels, of mode {image.mode}, are neither of 8 nor of 16 bits")
    if bits is None or brightest >= 2**bits:
        bits = next(bits for bits in _BITS if brightest < 2**bits)
    # Pillow would cut these off at 255.
    grey = values.astype(np.uint32)
    grey *= 255
    grey //= 2**bits - 1
    grey = grey.astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _told_bits(image: Image.Image) -> int | None:
    """How many bits the grey values of an opened picture have, where its file says so.

    16 is what files say that store 10, 12 or 14 bits in two bytes, and says nothing.
    """
    tiles = getattr(image, "tile", None)
    if image.format == "PPM" and tiles and tiles[0][0] != "raw":
        return 16  # its largest value is another one, and Pillow scales by it
    tags = getattr(image, "tag_v2", {})
    told = [int(np.max(tags.get(_TIFF_MAXIMUM, 0))).bit_length()]
    told.append(int(np.max(tags.get(_TIFF_BITS, 0))))
    return next((bits for bits in told if 8 <= bits < 16), None)


def check_readable(file_names: Sequence[str]) -> None:
    """Raises an ImageReadError that counts the files that cannot be decoded and names the first."""

    def problem(file_name: str) -> str | None:
        try:
            with open_image(file_name) as image, decoding(image):
                image.draft("L", (1, 1))  # of a JPEG an eighth: all of the file is read
                image.load()
                if image.mode.startswith(("I", "F")):  # of which not all are pictures
                    _pixels(image)
                _tell_of_sequence(image, file_name)
        except Exception as error:  # as in read_image
            return reason_of(error)
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
        ValueError: an array, or a PIL image, is of another form.
        TypeError: it is something else.
    """
    if isinstance(picture, np.ndarray):
        is_rgb = picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
        if not is_rgb or picture.size == 0:
            raise ValueError(
                f"a picture must be uint8 (H, W, 3), RGB; got {picture.dtype} {picture.shape}"
            )
        return picture
    if isinstance(picture, Image.Image):
        return _pixels(picture)
    if not isinstance(picture, (str, os.PathLike)):
        raise TypeError(f"a picture is a path, a PIL image or an array, not {type(picture)}")
    return read_image(picture)


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
