"""From a picture, as a file, an array or an image of PIL's, to pixels and to a model's input."""

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..d2 import transforms as T
from ..errors import UserError
from .formats.files import IMAGE_SUFFIXES as IMAGE_SUFFIXES

Picture = str | os.PathLike | np.ndarray | Image.Image

# Pillow's names of the formats that are read: those of pictures that it decodes in this process.
# It hands others, such as PostScript, to programs that it finds, which a picture from anywhere
# should not reach.
IMAGE_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI",
    "TGA", "TIFF", "WEBP",
)  # fmt: skip
_BITS = (8, 10, 12, 14, 16)  # that cameras and scanners measure a grey value with
_TIFF_BITS, _TIFF_MAXIMUM = 258, 281  # tags: bits of a value, its largest one


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
            f"cannot read the image {self.file_name}: {self.reason}; replace the file, or take it "
            "out of the annotation file"
        )


def require_regular_file(path: str | os.PathLike) -> None:
    """Raises an OSError for a pipe or a device, which reading could wait for without an end.

    Raises:
        FileNotFoundError: there is no such file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise OSError(f"it is a {kinds.get(stat.S_IFMT(mode), 'device')} and no file")


def open_image(path: str | os.PathLike) -> Image.Image:
    """The picture of a regular file in one of :data:`IMAGE_FORMATS`, not decoded yet.

    Of an animation or of several pictures in a file it is the first.

    Raises:
        OSError: it is no file, or no such picture (PIL.UnidentifiedImageError).
    """
    require_regular_file(path)
    Image.init()
    # Not every build of Pillow has all of them, and MPO, a kind of JPEG, is registered as that.
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    try:
        image = Image.open(path, formats=formats)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f"{error} as any of {', '.join(formats)}") from error
    if image.format == "TIFF":
        # A file with a name is mapped into memory, which Pillow does with exchanged sides where the
        # picture lies on its side.
        image.filename = ""
    return image


def read_image(file_name: str | os.PathLike, image_format: str = "RGB") -> np.ndarray:
    """uint8 (H, W, 3), turned upright by its EXIF tag; ``image_format`` is "RGB" or "BGR".

    Of grey values that are stored in 16 bits all of their range is kept, black to white: that of
    as many bits as the file says that they have (TIFF, PGM), or else, since cameras of 10, 12 and
    14 bits write files of 16, of the fewest of 8, 10, 12, 14 and 16 bits that hold the brightest.

    Raises:
        ImageReadError: the file cannot be read.
    """
    try:
        with open_image(file_name) as image:
            pixels = _pixels(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ImageReadError(os.fspath(file_name), f"{type(error).__name__}: {error}") from error
    return np.ascontiguousarray(pixels[:, :, ::-1]) if image_format == "BGR" else pixels


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), RGB, a copy, turned upright."""
    if not image.mode.startswith(("I", "F")):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    bits = _told_bits(image)
    values = np.asarray(ImageOps.exif_transpose(image))
    brightest = values.max()
    if image.mode == "F" or values.min() < 0 or brightest > 65535:
        raise ValueError(f"its pixels, of mode {image.mode}, are neither of 8 nor of 16 bits")
    if bits is None or brightest >= 2**bits:
        bits = next(bits for bits in _BITS if brightest < 2**bits)
    # Pillow would cut these off at 255.
    grey = (values.astype(np.uint32) * 255 // (2**bits - 1)).astype(np.uint8)
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
            with open_image(file_name) as image:
                image.draft("L", (1, 1))  # of a JPEG an eighth: all of the file is read
                image.load()
                if image.mode.startswith(("I", "F")):  # of which not all are pictures
                    _pixels(image)
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
        ValueError: an array, or a PIL image, is of another form.
        TypeError: it is something else.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
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
