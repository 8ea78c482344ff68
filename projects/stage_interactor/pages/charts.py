"""Charts as SVG text, small enough to be legible on a phone."""

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: in the page's font, and can be selected
    "text.parse_math": False,  # names of classes may hold dollars
    "svg.hashsalt": "stage-interactor",  # the same page from the same run
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_MOST_POINTS = 50_000  # of a line; of longer ones every second, third ... is drawn
_LONGEST_LINE, _MOST_LINES = 28, 4  # characters, and lines, of a name beside a row
_WIDTH, _HEIGHT = 4.6, 3.0  # inches; 72 pixels each
_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d",
            "#475569", "#92400e")  # fmt: skip


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    bottom: float | None = None,
    top: float | None = None,
) -> str:
    """One line for each name, of (x values, y values)."""

    def draw(axes) -> None:
        for index, (name, (xs, ys)) in enumerate(curves.items()):
            style = "-" if index < len(_COLOURS) else "--"
            marker = "o" if len(xs) < 30 else None
            colour = _COLOURS[index % len(_COLOURS)]
            step = -(-len(xs) // _MOST_POINTS) or 1
            xs, ys = xs[::step], ys[::step]
            axes.plot(xs, ys, style, color=colour, label=name, lw=1.5, marker=marker, ms=3)
        axes.set(xlabel=x, ylabel=y)
        highest, limit = axes.get_ylim()[1], top
        if top is None and bottom is not None and highest > bottom:
            # The margin is a share of what the curves span, which may lie high above the bottom.
            limit = max(highest, bottom + 1.06 * (axes.dataLim.y1 - bottom))
        axes.set_ylim(bottom=bottom, top=limit)
        if len(curves) > 1:
            axes.legend(fontsize=8, ncols=1 + (len(curves) > 5))

    return _svg(draw)


def bars(values: Mapping[str, float], *, x: str) -> str:
    """One horizontal bar for each name, with its value."""

    def draw(axes) -> None:
        heights = list(values.values())[::-1]
        axes.barh(range(len(heights)), np.nan_to_num(heights), color=_COLOURS[0], height=0.65)
        for index, value in enumerate(heights):
            text = "none" if np.isnan(value) else f"{value:.1f}" if value % 1 else f"{value:.0f}"
            place = max(np.nan_to_num(value), 0)
            axes.text(place, index, f" {text}", va="center", fontsize=8)
        axes.set(xlabel=x)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)

    return _rows(draw, values)


def intervals(values: Mapping[str, tuple[float, float]], *, x: str, zero: bool = False) -> str:
    """A point for each name, of (value, half the width of its interval); ``zero`` marks a zero."""

    def draw(axes) -> None:
        points, widths = zip(*list(values.values())[::-1])
        if zero:
            axes.axvline(0, color=_COLOURS[8], lw=1)
        places = range(len(points))
        axes.errorbar(points, places, xerr=widths, fmt="o", color=_COLOURS[0], capsize=3, lw=1.5)
        axes.set(xlabel=x)
        axes.margins(x=0.08, y=0.5 / len(points))

    return _rows(draw, values)


def _rows(draw, names: Iterable[str]) -> str:
    """Of a row for each name, of which the first is the uppermost; long names take several lines,
    so that there is room for what is drawn."""
    limits: dict[str, Any] = dict(max_lines=_MOST_LINES, placeholder="…")
    labels = [wrap(name, _LONGEST_LINE, **limits) or [""] for name in names][::-1]

    def draw_rows(axes) -> None:
        draw(axes)
        axes.set_yticks(range(len(labels)), ["\n".join(lines) for lines in labels])

    most = max(map(len, labels), default=1)
    return _svg(draw_rows, height=max(1.2, 0.7 + (0.1 + 0.14 * most) * len(labels)))


def shares(values: Mapping[str, np.ndarray], edges: np.ndarray, *, x: str) -> str:
    """A histogram for each name, in per cent of its values."""

    def draw(axes) -> None:
        for index, (name, found) in enumerate(values.items()):
            counts, _ = np.histogram(found, edges)
            share = 100 * counts / max(len(found), 1)
            axes.stairs(share, edges, label=name, color=_COLOURS[index % len(_COLOURS)], lw=1.5)
        axes.set(xlabel=x, ylabel="per cent")
        axes.legend(fontsize=8)

    return _svg(draw)


def matrix(counts: np.ndarray, names: Sequence[str], *, rows: str, columns: str) -> str:
    """A confusion matrix; shades by the share of a row, numbers as they are."""

    def draw(axes) -> None:
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel=columns, ylabel=rows)
        axes.grid(visible=False)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.6 else "black"
                axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=7)

    side = max(_HEIGHT, 1.6 + 0.3 * len(names))
    return _svg(draw, width=max(_WIDTH, side), height=side)


def _svg(draw, width: float = _WIDTH, height: float = _HEIGHT) -> str:
    with rc_context(_STYLE), warnings.catch_warnings():
        # Letters that matplotlib's font lacks: the browser has others.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
