"""Letters for class names in any script: each from the first font that has it.

Pillow's own font has ASCII. DejaVu Sans, which matplotlib brings, has Latin, Greek, Cyrillic and
Arabic; others come with the extra ``fonts`` or from the system.
"""

import functools
import glob
import importlib.util
import logging
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

logger = logging.getLogger(__name__)

_PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")  # of the extra: Noto Sans, and for CJK
_HOW = (
    "pip install 'stage-interactor[fonts]', or on Debian apt install fonts-noto-core fonts-noto-cjk"
)
_REGULAR = 400  # weight of a variable font, some of which are hairlines by default
# Of the system's fonts, which a name should be written in last; or never, as it has boxes only.
_LATER = ("bold", "black", "thin", "light", "italic", "oblique", "mono", "serif", "emoji")
_NEVER = ("lastresort", "adobeblank", "notocoloremoji")


class Run(NamedTuple):
    """A part of a text, and the font file that has all of its letters; None is Pillow's own."""

    text: str
    path: str | None


def readable(name: str, instead: str) -> str:
    """A name in one line, or ``instead`` where no font here has some of its letters.

    That is told once, with what to install.
    """
    if split_by_font(name) is not None:
        return _plain(name)
    _tell_how()
    return instead


@functools.cache
def _tell_how() -> None:
    logger.warning(
        "Some class names have letters that no font here has: the numbers of these classes are "
        f"written in pictures. For fonts that have them: {_HOW}"
    )


def font_of(texts: Sequence[str], size: int) -> Any:
    """What Pillow's ImageDraw writes texts with; they must be :func:`readable`."""
    if all(_plain(text).isascii() for text in texts):
        return ImageFont.load_default(size)
    return _Fonts(texts, size)


class _Fonts:
    """Several fonts in the place of one, as ImageDraw uses any that is none of FreeType's."""

    def __init__(self, texts: Sequence[str], size: int):
        self._size = size
        boxes = [
            _load(run.path, size).getbbox(run.text, anchor="ls")
            for text in texts
            for run in split_by_font(text) or ()
        ]
        # One line height for all texts; scripts reach up and down by different amounts.
        self._above = math.ceil(max((-box[1] for box in boxes), default=size))
        self._below = math.ceil(max((box[3] for box in boxes), default=0))

    def getlength(self, text: str, *_: Any, **__: Any) -> float:
        runs = split_by_font(text) or ()
        return sum(_load(run.path, self._size).getlength(run.text) for run in runs)

    def getbbox(self, text: str, *_: Any, **__: Any) -> tuple[int, int, int, int]:
        return 0, 0, max(1, math.ceil(self.getlength(text))), max(1, self._above + self._below)

    def getmask(self, text: str, mode: str = "L", *_: Any, **__: Any) -> Any:
        image = Image.new(mode or "L", self.getbbox(text)[2:])
        pen = ImageDraw.Draw(image)
        left = 0.0
        for run in split_by_font(text) or ():
            font = _load(run.path, self._size)
            pen.text((left, self._above), run.text, fill=255, font=font, anchor="ls")
            left += float(font.getlength(run.text))
        return image.im


@functools.lru_cache(maxsize=4096)
def split_by_font(text: str) -> tuple[Run, ...] | None:
    """A text in parts that one font each has all letters of; None where a letter is in no font."""
    text = _plain(text)
    if whole := _first_with(text):
        return (Run(text, *whole),)
    runs: list[Run] = []
    for letter in text:
        # Letters of a word stay together; digits and the like are taken from a font of letters.
        if runs and not letter.isascii() and _has(runs[-1].path, letter):
            runs[-1] = runs[-1]._replace(text=runs[-1].text + letter)
            continue
        found = _first_with(letter)
        if found is None:
            return None
        if runs and found == (runs[-1].path,):
            runs[-1] = runs[-1]._replace(text=runs[-1].text + letter)
        else:
            runs.append(Run(letter, *found))
    return tuple(runs)


def _plain(text: str) -> str:
    """In one line, and composed: ``o`` and a diaeresis are the letter that fonts have."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(letter if letter.isprintable() or not _drawn(letter) else " " for letter in text)
    if features.check("raqm"):  # which hides what only directs the others
        return text
    return "".join(letter for letter in text if _drawn(letter))


def _drawn(letter: str) -> bool:
    """Whether it has a form of its own, unlike joiners, directions and variation selectors."""
    return unicodedata.category(letter) != "Cf" and not "\ufe00" <= letter <= "\ufe0f"


def _first_with(text: str) -> tuple[str | None] | None:
    """The first font that has all letters, in a tuple: its path, None for Pillow's own."""
    if text.isascii():
        return (None,)
    return next(((path,) for path in font_files() if _has(path, text)), None)


def _has(path: str | None, text: str) -> bool:
    if path is None:
        return text.isascii()
    return {ord(letter) for letter in text if _drawn(letter)} <= _letters(path)


def font_files() -> Iterator[str]:
    """Paths of fonts, in the order in which they are asked."""
    import matplotlib  # which takes its time, and is not needed for ASCII

    yield os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    for package in _PACKAGES:
        if (spec := importlib.util.find_spec(package)) and spec.origin:
            folder = glob.escape(os.path.dirname(spec.origin))
            files = glob.glob(os.path.join(folder, "**", "*.[to]t[fc]"), recursive=True)
            yield from sorted(files, key=_rank)
    yield from _system_fonts()


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    paths = font_manager.findSystemFonts(fontext="ttf")
    usable = [path for path in paths if not any(word in _key(path) for word in _NEVER)]
    return tuple(sorted(usable, key=_rank))


def _key(path: str) -> str:
    return os.path.basename(path).lower().replace("-", "").replace(" ", "")


def _rank(path: str) -> tuple[int, bool, str]:
    """Upright ones of a usual weight first; of these Noto, which is asked for all scripts."""
    name = _key(path).replace("sansserif", "")
    return sum(word in name for word in _LATER), "noto" not in name, name


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """Code points of a font file; none where it cannot be read or drawn with."""
    from fontTools.ttLib import TTFont

    with suppress(Exception):  # of which broken font files bring many kinds
        _load(path, 12)  # fonts of bitmaps have no such size
        with TTFont(path, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    return frozenset()


@functools.lru_cache(maxsize=64)
def _load(path: str | None, size: int) -> Any:
    if path is None:
        return ImageFont.load_default(size)
    font = ImageFont.truetype(path, size)
    with suppress(OSError, NotImplementedError):  # most fonts do not vary
        axes = font.get_variation_axes()
        weights = [_REGULAR if axis["name"] == b"Weight" else axis["default"] for axis in axes]
        font.set_variation_by_axes([float(weight or 0) for weight in weights])
    return font
