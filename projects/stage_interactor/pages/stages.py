"""A page, or a sheet, about what the stages do with an image, query by query.

Where the sampling points of a query lie and which levels they read (supplement, section B), how its
box moves through the cascade, and, where the objects are known, which labels cross-stage assignment
gives it and which stage's match each comes from (section J), beside one-to-one matching.
"""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ..d2 import transforms as T
from ..modeling import PointSampler, StageInteractor
from .page import data_uri, save_picture, section, write_page
from .trace import Labels, Stage, best_queries, trace_labels, trace_stages

_LEVELS = colormaps["viridis"]
_MOST_SHOWN = 4096  # pixels of a side


def write_stages(
    path: str | os.PathLike,
    model: StageInteractor,
    picture: np.ndarray,
    *,
    augmentation: T.AugmentationList,
    image_format: str = "RGB",
    class_names: Sequence[str],
    queries: Sequence[int] | None = None,
    objects: tuple[Sequence[Sequence[float]], Sequence[int]] | None = None,
    title: str = "Stages",
    subtitle: str = "",
) -> None:
    """Writes the page, or the sheet.

    Args:
        path: ends in ``.html`` or ``.png``.
        model: the detector.
        picture: uint8 (H, W, 3), RGB.
        augmentation, image_format: what the detector is fed through, see
            :func:`stage_interactor.data.prepare_picture`.
        class_names: by class index.
        queries: which ones are shown; the four with the best scores by default.
        objects: boxes, xyxy in pixels of the picture, and class indices of what is in it: the page
            then tells also which labels training would give.
        title, subtitle: of the page.

    Raises:
        ValueError: for another suffix, labels on a sheet, or a query that the model does not have.
        UnusableDetectionsError: what the model computes is NaN or infinite.
    """
    path = os.fspath(path)
    if not path.endswith((".html", ".png")):
        raise ValueError(f"{path}: name a file that ends in .html or .png")
    if objects is not None and path.endswith(".png"):
        raise ValueError(f"{path}: the labels need a page, which ends in .html")
    stages = trace_stages(model, picture, augmentation, image_format)
    num_queries = len(stages[0].boxes)
    queries = best_queries(stages, 4) if queries is None else queries
    if not all(0 <= query < num_queries for query in queries):
        raise ValueError(
            f"queries {list(queries)}: the model has the queries 0 to {num_queries - 1}"
        )
    strides = _strides(model)
    labels = trace_labels(model, stages, picture.shape[:2], *objects) if objects else None
    overview = _pixels(draw_boxes_through_stages(picture, stages, queries))
    by_query = {query: _pixels(draw_query(picture, stages, query, strides)) for query in queries}
    if path.endswith(".png"):
        _save_sheet(path, [overview, *by_query.values()])
    else:
        sections = _sections(overview, by_query, stages, labels, class_names)
        write_page(path, title, subtitle, [], sections)


def draw_stages(
    model: StageInteractor, picture: np.ndarray, stages: Sequence[Stage], query: int
) -> list[np.ndarray]:
    """Two pictures, uint8 (H, W, 3) RGB, of a query: its boxes on the whole image, its points."""
    figures = (
        draw_boxes_through_stages(picture, stages, [query]),
        draw_query(picture, stages, query, _strides(model)),
    )
    return [_pixels(figure) for figure in figures]


def _strides(model: StageInteractor) -> Sequence[int]:
    samplers = (m for m in model.decoder.modules() if isinstance(m, PointSampler))
    return next(samplers).strides


def draw_query(
    picture: np.ndarray, stages: Sequence[Stage], query: int, strides: Sequence[int]
) -> Figure:
    """A panel a stage: the box before (dashed) and after, and the sampling points.

    A point's colour says which level it reads, by the mean of the levels under its weights. A thin
    line joins each point to the centre of its group of Q, of which there are K for each channel
    group.
    """
    figure, axes = _panels(len(stages))
    spans = [np.concatenate((s.start[query].reshape(2, 2), s.points[query].reshape(-1, 2)))
             for s in stages]  # fmt: skip
    for index, (stage, span) in enumerate(zip(stages, spans)):
        panel = axes[index]
        _show(panel, picture, alpha=0.6)
        points = stage.points[query].reshape(-1, *stage.points.shape[-2:])  # (G * K, Q, 2)
        weights = stage.level_weights[query].reshape(*points.shape[:2], -1)
        level = (weights * np.arange(weights.shape[-1])).sum(-1) / max(weights.shape[-1] - 1, 1)
        centres = points.mean(1, keepdims=True)
        lines = np.stack((np.broadcast_to(centres, points.shape), points), -2).reshape(-1, 2, 2)
        panel.add_collection(
            LineCollection(list(lines), colors="black", linewidths=0.35, alpha=0.5)
        )
        panel.scatter(*points.reshape(-1, 2).T, c=level.ravel(), cmap=_LEVELS, vmin=0, vmax=1,
                      s=14, edgecolors="white", linewidths=0.4, zorder=3)  # fmt: skip
        _box(panel, stage.start[query], "black", linestyle="--")
        _box(panel, stage.boxes[query], "#ff4d6d")
        groups, inner = stage.points.shape[2:4]
        panel.set_title(f"stage {index}: K = {groups}, Q = {inner}", fontsize=8)
        low, high = span.min(0), span.max(0)
        margin = 0.08 * (high - low).max() + 1
        size = picture.shape[1::-1]
        left, top = np.maximum(low - margin, -0.5)
        right, bottom = np.minimum(high + margin, np.array(size) - 0.5)
        if right > left and bottom > top:
            panel.set_xlim(left, right)
            panel.set_ylim(bottom, top)
    handles = [
        Rectangle(
            (0, 0), 1, 1, color=_LEVELS(level / max(len(strides) - 1, 1)), label=f"stride {stride}"
        )
        for level, stride in enumerate(strides)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(strides), fontsize=8)
    return figure


def draw_boxes_through_stages(
    picture: np.ndarray, stages: Sequence[Stage], queries: Sequence[int]
) -> Figure:
    """The boxes of the queries at every stage, on the whole image."""
    figure, axes = _panels(len(stages))
    for index, stage in enumerate(stages):
        _show(axes[index], picture, alpha=0.75)
        axes[index].set_title(f"stage {index}", fontsize=8)
        for number, query in enumerate(queries):
            colour = colormaps["tab10"](number % 10)
            _box(axes[index], stage.boxes[query], colour)
            left, top = np.clip(stage.boxes[query][:2], 0, np.array(picture.shape[1::-1]) - 1)
            axes[index].text(left, top, str(query), fontsize=7, color="white", clip_on=True,
                             bbox=dict(facecolor=colour, pad=1, lw=0))  # fmt: skip
    return figure


def label_table(labels: Labels, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows for the queries that get a label at some stage: what, and from which stages' matches."""
    num_stages = len(labels.matched)
    rows = [("query", *(f"stage {index}" for index in range(num_stages)))]
    for query in np.flatnonzero((labels.matched >= 0).any(0)):
        cells = []
        for stage in range(num_stages):
            sources: dict[int, list[int]] = {}
            for other in np.flatnonzero(labels.kept[stage, :, query]):
                sources.setdefault(int(labels.matched[other, query]), []).append(int(other))
            own = int(labels.matched[stage, query])
            texts = []
            for index in sorted(set(sources) | ({own} - {-1})):
                text = f"{names[labels.classes[index]]} #{index}"
                if index in sources:
                    text += f" ← {', '.join(map(str, sources[index]))}"
                if index == own:
                    text += " ●" if index in sources else " ○"
                texts.append(text)
            cells.append("; ".join(texts) or "·")
        rows.append((str(query), *cells))
    return rows


def _panels(count: int):
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows + 0.3), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes:
        panel.set_axis_off()
    return figure, axes


def _show(panel, picture: np.ndarray, alpha: float) -> None:
    """The picture, of a very large one fewer pixels: each takes 40 bytes here."""
    height, width = picture.shape[:2]
    step = -(-max(height, width) // _MOST_SHOWN)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    panel.imshow(picture[::step, ::step], alpha=alpha, extent=extent)


def _box(panel, box: Sequence[float], colour, **style) -> None:
    left, top, right, bottom = box
    style = {"fill": False, "edgecolor": colour, "linewidth": 1.4} | style
    panel.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _sections(overview, by_query, stages, labels, names) -> list[dict]:
    def caption(query: int) -> str:
        scores = stages[-1].scores[query]
        return f"query {query}: {names[scores.argmax()]} {scores.max():.2f} at the last stage"

    sections = [
        section(
            "Boxes through the stages",
            text="The boxes of the queries, by their numbers, as each stage leaves them.",
            pictures=[(data_uri(overview), "all of them")],
            wide=True,
        ),
        section(
            "Sampling points",
            text="Dashed: the box a stage starts from; red: the box it predicts. The colour of a "
            "point is the level it reads, the mean under its weights; thin lines join the Q points "
            "of each of the K groups of a channel group to their centre.",
            pictures=[(data_uri(pixels), caption(query)) for query, pixels in by_query.items()],
            wide=True,
        ),
    ]
    if labels is not None:
        one_to_one = int((labels.matched >= 0).sum())
        gained = labels.kept & ~np.eye(len(labels.kept), dtype=bool)[..., None]
        own = labels.kept[np.arange(len(labels.kept)), np.arange(len(labels.kept))]
        sections.append(
            section(
                "Labels in training",
                text=f"{len(labels.boxes)} objects; one-to-one matching gives {one_to_one} labels "
                f"over all stages. Cross-stage assignment keeps {int(own.sum())} of them, those "
                "whose own box overlaps the object enough, and gathers labels from other stages "
                f"for {int((gained.any(1) & ~own).sum())} more (query, stage) pairs. A cell names "
                "class and number of the object; after the arrow are the stages whose match it "
                "comes from; ● is the stage's own match, ○ one whose label was dropped.",
                table=label_table(labels, names),
            )
        )
    return sections


def _save_sheet(path: str, pictures: Sequence[np.ndarray]) -> None:
    width = max(picture.shape[1] for picture in pictures)
    room = ((width - picture.shape[1], picture) for picture in pictures)
    rows = [np.pad(p, ((0, 0), (0, right), (0, 0)), constant_values=255) for right, p in room]
    save_picture(Image.fromarray(np.concatenate(rows)), path)
