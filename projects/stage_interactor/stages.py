"""``stage-interactor stages``: what the stages do with an image, query by query.

Where the sampling points of a query lie and which levels they read (supplement, section B), how its
box moves through the cascade, and, where the objects are known, which labels cross-stage assignment
gives it and which stage's match each comes from (section J), beside one-to-one matching.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from .blueprint import load_model
from .d2 import transforms as T
from .d2.structures import Boxes, Instances
from .data.coco_check import summarise_coco_file
from .modeling import CrossStageAssigner, StageInteractor
from .modeling.geometry import full_precision, xyzr_to_boxes
from .modeling.matcher import HungarianMatcher, Targets
from .predictor import prepare_picture, read_picture
from .report.page import data_uri, render_page, section

_LEVELS = colormaps["viridis"]


class Stage(NamedTuple):
    """What one stage did with one image; all coordinates in pixels of the picture."""

    start: np.ndarray  # (N, 4) boxes xyxy that it started from
    boxes: np.ndarray  # (N, 4) and that it predicted
    scores: np.ndarray  # (N, C)
    points: np.ndarray  # (N, G, K, Q, 2) sampling points
    level_weights: np.ndarray  # (N, G, K, Q, levels)


class Labels(NamedTuple):
    """What training would ask of the queries on one image with M objects."""

    boxes: np.ndarray  # (M, 4) of the objects, xyxy in pixels of the picture
    classes: np.ndarray  # (M,)
    matched: np.ndarray  # (L, N) one-to-one: the object of a query at a stage, -1 for none
    kept: np.ndarray  # (L, L, N) cross-stage: stage i labels query n with its match of stage j


@torch.no_grad()
def trace_stages(
    model: StageInteractor,
    picture: np.ndarray,
    augmentation: T.AugmentationList,
    image_format: str = "RGB",
) -> list[Stage]:
    """Runs the detector on a picture, uint8 (H, W, 3) RGB, and keeps what every stage did.

    ``augmentation`` and ``image_format`` are what the detector is fed through, see
    :class:`stage_interactor.predictor.Detector`.
    """
    image = prepare_picture(picture, augmentation, image_format)["image"]
    seen: list[tuple[Tensor, ...]] = []

    def remember(sampler, inputs) -> None:
        _, content, xyzr = inputs
        points, z = sampler.points(full_precision(content), xyzr)
        seen.append((xyzr_to_boxes(xyzr), points, sampler.level_weights(z)))

    hooks = [stage.sampler.register_forward_pre_hook(remember) for stage in model.decoder.stages]
    try:
        images = model.eval().preprocess([{"image": image}])
        outputs = model.decode(images.tensor, torch.tensor(images.image_sizes, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    height, width = picture.shape[:2]
    scale = np.array([width / image.shape[2], height / image.shape[1]])
    return [
        Stage(
            start[0].cpu().numpy() * np.tile(scale, 2),
            output.boxes[0].cpu().numpy() * np.tile(scale, 2),
            output.logits[0].sigmoid().cpu().numpy(),
            points[0].cpu().numpy() * scale,
            weights[0].cpu().numpy(),
        )
        for output, (start, points, weights) in zip(outputs, seen)
    ]


def trace_labels(
    model: StageInteractor,
    stages: Sequence[Stage],
    image_size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
) -> Labels:
    """Matches and labels of traced stages.

    Args:
        model: whose matcher and assigner are used; of a model with one-to-one labels the paper's
            cross-stage assigner is shown.
        stages: of :func:`trace_stages`.
        image_size: height and width of the picture.
        boxes, classes: of its objects, xyxy in pixels of the picture, and class indices.
    """
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(torch.from_numpy(np.array(boxes, dtype=float).reshape(-1, 4)))
    instances.gt_classes = torch.tensor(classes, dtype=torch.long)
    targets = Targets.from_instances([instances], torch.float64)
    predicted = torch.from_numpy(np.stack([stage.boxes for stage in stages]))[:, None].double()
    scores = torch.from_numpy(np.stack([stage.scores for stage in stages]))[:, None].double()
    matcher = model.criterion.matcher if model.criterion else HungarianMatcher()
    assigner = model.criterion.assigner if model.criterion else None
    if not isinstance(assigner, CrossStageAssigner):
        assigner = CrossStageAssigner()
    matched = matcher(scores.logit(eps=1e-12), predicted, targets)
    kept = assigner.kept_matches(matched, predicted, targets)
    return Labels(
        np.asarray(boxes, dtype=float).reshape(-1, 4),
        np.asarray(classes, dtype=int),
        matched[:, 0].numpy(),
        kept[:, :, 0].numpy(),
    )


def best_queries(stages: Sequence[Stage], count: int) -> list[int]:
    """The queries with the highest scores at the last stage."""
    return np.argsort(-stages[-1].scores.max(1), kind="stable")[:count].tolist()


def draw_query(
    picture: np.ndarray, stages: Sequence[Stage], query: int, strides: Sequence[int]
) -> Figure:
    """A panel a stage: the box before (dashed) and after, and the sampling points.

    A point's colour says which level it reads, by the mean of the levels under its weights. A thin
    line joins each point to the centre of its group of Q, of which there are K for each channel
    group.
    """
    columns = min(len(stages), 3)
    rows = -(-len(stages) // columns)
    figure, axes = _panels(rows, columns)
    spans = [np.concatenate((s.start[query].reshape(2, 2), s.points[query].reshape(-1, 2)))
             for s in stages]  # fmt: skip
    for index, (stage, span) in enumerate(zip(stages, spans)):
        panel = axes[index]
        panel.imshow(picture, alpha=0.6)
        points = stage.points[query].reshape(-1, *stage.points.shape[-2:])  # (G * K, Q, 2)
        weights = stage.level_weights[query].reshape(*points.shape[:2], -1)
        level = (weights * np.arange(weights.shape[-1])).sum(-1) / max(weights.shape[-1] - 1, 1)
        centres = points.mean(1, keepdims=True)
        lines = np.stack((np.broadcast_to(centres, points.shape), points), -2).reshape(-1, 2, 2)
        panel.add_collection(LineCollection(lines, colors="black", linewidths=0.35, alpha=0.5))
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
    columns = min(len(stages), 3)
    figure, axes = _panels(-(-len(stages) // columns), columns)
    for index, stage in enumerate(stages):
        axes[index].imshow(picture, alpha=0.75)
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


def _panels(rows: int, columns: int):
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows + 0.3), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes:
        panel.set_axis_off()
    return figure, axes


def _box(panel, box: Sequence[float], colour, **style) -> None:
    left, top, right, bottom = box
    style = {"fill": False, "edgecolor": colour, "linewidth": 1.4} | style
    panel.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def _pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows sampling points and boxes of the queries on every stage; with "
        "--annotations also the labels that training would give them. A page, or a PNG."
    )
    parser.add_argument("--checkpoint", required=True, help=".pth or .safetensors")
    parser.add_argument("image")
    parser.add_argument("--output", default="output/stages.html", help=".html or .png")
    parser.add_argument("--queries", type=int, nargs="+", help="these (the 4 with the best scores)")
    parser.add_argument("--annotations", help="COCO JSON that lists the image")
    parser.add_argument(
        "--config-file", help="that a checkpoint without a config of its own was trained with"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command."""
    if not args.output.endswith((".html", ".png")):
        raise ValueError(f"--output {args.output}: name a file that ends in .html or .png")
    if args.annotations and args.output.endswith(".png"):
        raise ValueError(f"--output {args.output}: the labels need a page, which ends in .html")
    model, blueprint = load_model(args.checkpoint, args.config_file)
    names = [category["name"] for category in blueprint.categories]
    picture = read_picture(args.image)
    image_format = blueprint.config_of_input.get("image_format", "RGB")
    stages = trace_stages(model, picture, blueprint.build_augmentation(), image_format)
    num_queries = len(stages[0].boxes)
    queries = args.queries or best_queries(stages, 4)
    if not all(0 <= query < num_queries for query in queries):
        raise ValueError(f"--queries {queries}: the model has the queries 0 to {num_queries - 1}")
    strides = model.decoder.stages[0].sampler.strides
    labels = None
    if args.annotations:
        boxes, classes = _objects(args.annotations, args.image, blueprint.categories)
        labels = trace_labels(model, stages, picture.shape[:2], boxes, classes)
    overview = _pixels(draw_boxes_through_stages(picture, stages, queries))
    by_query = {query: _pixels(draw_query(picture, stages, query, strides)) for query in queries}
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    if args.output.endswith(".png"):
        _save_png(args.output, [overview, *by_query.values()])
    else:
        title = f"Stages: {os.path.basename(args.image)}"
        sections = _sections(overview, by_query, stages, labels, names)
        page = render_page(title, args.checkpoint, [], sections)
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(page)
    print(f"Wrote {args.output}")
    return 0


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


def _objects(path: str, image: str, categories: Sequence[Mapping]) -> tuple[list, list]:
    """Boxes xyxy and class indices of an image in a COCO file."""
    summarise_coco_file(path)  # says what is wrong with it
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    parts = Path(image).absolute().parts

    def common(record: Mapping) -> int:
        """How many of the last parts of its path an image shares with ours."""
        pairs = zip(reversed(parts), reversed(Path(record["file_name"]).parts))
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(parts))

    best = max(map(common, content["images"]), default=0)
    ids = {record["id"] for record in content["images"] if common(record) == best}
    if not best:
        raise ValueError(f"{path} lists no image {Path(image).name}")
    if len(ids) > 1:
        raise ValueError(f"{path} lists {len(ids)} images {Path(image).name}: which is meant?")
    index = {category["name"]: position for position, category in enumerate(categories)}
    known = {category["id"]: category["name"] for category in content["categories"]}
    items = [a for a in content["annotations"] if a["image_id"] in ids and not a.get("iscrowd", 0)]
    unknown = sorted({known[a["category_id"]] for a in items} - set(index))
    if unknown:
        raise ValueError(f"{path} has the classes {unknown}, the detector knows {list(index)}")
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in items)]
    return boxes, [index[known[item["category_id"]]] for item in items]


def _save_png(path: str, pictures: Sequence[np.ndarray]) -> None:
    width = max(picture.shape[1] for picture in pictures)
    sheet = Image.new("RGB", (width, sum(p.shape[0] for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(Image.fromarray(picture), (0, top))
        top += picture.shape[0]
    sheet.save(path)
