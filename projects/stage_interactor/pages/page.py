"""A page of tiles and sections, with all that it shows inside."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from ..untrusted.files import read_head
from ..writing import new_file, write_text


def section(title: str, **content: Any) -> dict:
    """A part of a page: any of ``text``, ``legend`` (colour, name), ``charts`` (title, SVG),
    ``table`` (rows, the first is the head), ``pictures`` (source, caption), ``wide`` pictures."""
    return {"title": title, "id": title.lower().replace(" ", "-"), **content}


def write_page(
    path: str | os.PathLike,
    title: str,
    subtitle: str,
    tiles: Sequence[tuple[Any, str]],
    sections: Sequence[dict],
) -> None:
    """Writes the page as HTML; ``tiles`` are (figure, what it is).

    Raises:
        OSError: it cannot be written; see :func:`stage_interactor.writing.new_file`.
        ValueError: what is there is no page, and stays as it is.
    """
    there = os.path.isfile(path) and not os.path.islink(path)
    if there and b"<html" not in read_head(path).lower():
        raise ValueError(f"{path} is there already, and is no page: name another file")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    values = {"title": title, "subtitle": subtitle, "tiles": tiles, "sections": sections}
    write_text(path, render("page.html", **values))


def render(template: str, **values: Any) -> str:
    """A template of this folder filled in; what is written into HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def data_uri(picture: np.ndarray) -> str:
    """A picture, uint8 (H, W, 3), as what an ``img`` can show without a file."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def save_picture(picture: Image.Image, path: str | os.PathLike, **options: Any) -> None:
    """Writes a picture in the format that the end of ``path`` says, as ``Image.save`` does.

    Raises:
        OSError: it cannot be written; see :func:`stage_interactor.writing.new_file`.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Image.init()
    format = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    with new_file(path, sync=False) as file:
        picture.save(file, format, **options)
