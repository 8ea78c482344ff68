"""A page of tiles and sections, with all that it shows inside."""

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from PIL import Image


def section(title: str, **content: Any) -> dict:
    """A part of a page: any of ``text``, ``legend`` (colour, name), ``charts`` (title, SVG),
    ``table`` (rows, the first is the head), ``pictures`` (source, caption), ``wide`` pictures."""
    return {"title": title, "id": title.lower().replace(" ", "-"), **content}


def render_page(
    title: str, subtitle: str, tiles: Sequence[tuple[str, str]], sections: Sequence[dict]
) -> str:
    """The page as HTML; ``tiles`` are (figure, what it is)."""
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(template).render(
        title=title, subtitle=subtitle, tiles=tiles, sections=sections
    )


def data_uri(picture: np.ndarray) -> str:
    """A picture, uint8 (H, W, 3), as what an ``img`` can show without a file."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
