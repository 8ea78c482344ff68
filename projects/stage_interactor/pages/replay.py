"""The page of an iteration that was built again: images, losses, and what became of the objects."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import input_with_boxes
from .object_trace import DROPPED, ObjectTrace
from .page import section, write_page

_KINDS = ("loss_class", "loss_bbox", "loss_giou")
_MOST_PICTURES, _MOST_OBJECTS = 64, 500


@dataclass(frozen=True)
class ReplayedImage:
    """An image of the iteration.

    Attributes:
        file_name: of the picture, the first one where several are combined.
        process: that had it in its batch.
        image: (3, H, W) as the mapper gives it, in the order of ``image_format``.
        boxes: (M, 4) of its objects, xyxy in pixels of ``image``.
        classes: (M,).
        losses: its share of the losses by their names; None where the criterion is one's own.
        trace: what the stages made of the objects; None likewise.
    """

    file_name: str
    process: int
    image: Tensor
    boxes: Tensor
    classes: Tensor
    losses: dict[str, float] | None = None
    trace: ObjectTrace | None = None

    @property
    def loss(self) -> float | None:
        """The sum of its losses."""
        return None if self.losses is None else sum(self.losses.values())


@dataclass(frozen=True)
class Replay:
    """What an iteration was.

    Attributes:
        iteration: which, from 0.
        checkpoint: whose weights the losses are of.
        trained: how many iterations these have seen: as many as ``iteration`` where the losses are
            those of the run.
        losses: of the whole batch, by their names.
        changes: what the config has in another way than when the checkpoint was written, of what
            images and losses depend on.
        of_run: whether the weights are a checkpoint of the run.
        images: by process, in the order of its batch.
        class_names: by class index.
        image_format: ``"RGB"`` or ``"BGR"``.
    """

    iteration: int
    checkpoint: str
    trained: int
    losses: dict[str, float]
    changes: list[str]
    of_run: bool
    images: list[ReplayedImage]
    class_names: list[str]
    image_format: str

    @property
    def total_loss(self) -> float:
        return sum(self.losses.values())

    @property
    def has_losses_of_run(self) -> bool:
        """Whether the losses are those that the run had, but for rounding."""
        return self.of_run and self.trained == self.iteration and not self.changes


def write_replay(path: str | os.PathLike, found: Replay, title: str) -> None:
    """Writes the page; images with the largest losses come first.

    Raises:
        OSError, ValueError: it cannot be written, or something else is there.
    """
    tiles = [
        (found.iteration, "iteration"),
        (len(found.images), "images"),
        (sum(len(image.classes) for image in found.images), "objects"),
        (f"{found.total_loss:.4g}", "total loss"),
    ]
    subtitle = f"Weights of {found.checkpoint}. {told_of_losses(found)}"
    images = sorted(found.images, key=lambda image: -(image.loss or 0.0))
    text = "An image's share of the losses of all stages, largest first; the shares add up."
    sections = [section("Images", text=text, table=image_rows(found))]
    pictures = [
        (
            input_with_boxes(
                image.image, found.image_format, image.boxes, image.classes, found.class_names
            ),
            _caption(image),
        )
        for image in images[:_MOST_PICTURES]
    ]
    sections.append(section("As the model saw them", pictures=pictures))
    if images and images[0].trace is not None:
        rows = stage_rows(found)
        text = (
            "Of each stage: objects that matching gave to queries, the mean IoU of these, labels "
            "that they give, and matches in the scope of the assigner whose box overlaps too "
            "little there to be one."
        )
        sections.append(section("Labels by stage", text=text, table=rows))
        text = (
            "On each stage the query that matching gave the object to, its IoU, and how many "
            "queries carry the object as a label."
        )
        sections.append(section("Objects", text=text, table=_object_rows(found, images)))
    write_page(path, title, subtitle, tiles, sections)


def told_of_losses(found: Replay) -> str:
    """Whose losses these are."""
    if found.has_losses_of_run:
        return "The losses are those of the run, but for rounding."
    if not found.of_run:
        return "These weights are no checkpoint of the run: its losses were others."
    told = []
    if found.trained != found.iteration:
        told.append(f"The weights have seen {found.trained} iterations: the losses are near.")
    if found.changes:
        shown = "; ".join(found.changes[:5]) + ("; ..." if len(found.changes) > 5 else "")
        told.append(
            "The config is another one than when the checkpoint was written, and maybe than in "
            f"this iteration (key, then, now): {shown}"
        )
    return " ".join(told)


def image_rows(found: Replay) -> list[tuple]:
    """A table of the images, largest loss first; the first row is the head."""
    rows: list[tuple] = [("image", "objects", "loss", "class", "box", "GIoU", "process")]
    for image in sorted(found.images, key=lambda image: -(image.loss or 0.0)):
        losses = _by_kind(image.losses) if image.losses else {}
        figures = [f"{losses[name]:.3f}" if losses else "" for name in _KINDS]
        total = "" if image.loss is None else f"{image.loss:.3f}"
        name = os.path.basename(image.file_name)
        rows.append((name, len(image.classes), total, *figures, image.process))
    return rows


def stage_rows(found: Replay) -> list[tuple]:
    """What the stages made of all objects; the first row is the head."""
    traces = [image.trace for image in found.images if image.trace is not None]
    rows: list[tuple] = [("stage", "objects matched", "mean IoU", "labels", "too far off")]
    for stage in range(len(traces[0].query) if traces else 0):
        matched = torch.cat([trace.query[stage] >= 0 for trace in traces])
        iou = torch.cat([trace.iou[stage] for trace in traces])[matched]
        labels = sum(int(trace.queries_labelled[stage].sum()) for trace in traces)
        dropped = sum(int((trace.labels[stage] == DROPPED).sum()) for trace in traces)
        mean = f"{float(iou.mean()):.3f}" if len(iou) else ""
        rows.append((stage + 1, int(matched.sum()), mean, labels, dropped))
    return rows


def _object_rows(found: Replay, images: list[ReplayedImage]) -> list[tuple]:
    stages = max(len(image.trace.query) for image in images if image.trace is not None)
    rows: list[tuple] = [("image", "object", "size", *(f"stage {i + 1}" for i in range(stages)))]
    for image in images:
        if image.trace is None:
            continue
        labelled = image.trace.queries_labelled
        for index, label in enumerate(image.classes.tolist()):
            left, top, right, bottom = image.boxes[index].tolist()
            told = [
                _told(image.trace, stage, index, int(labelled[stage, index]))
                for stage in range(stages)
            ]
            name = os.path.basename(image.file_name)
            size = f"{right - left:.0f} x {bottom - top:.0f}"
            rows.append((name, found.class_names[label], size, *told))
            if len(rows) > _MOST_OBJECTS:
                return rows
    return rows


def _told(trace: ObjectTrace, stage: int, index: int, labels: int) -> str:
    query = int(trace.query[stage, index])
    if query < 0:
        return "no query"
    return f"query {query}, IoU {float(trace.iou[stage, index]):.2f}, {labels} labelled"


def _by_kind(losses: Mapping[str, float]) -> dict[str, float]:
    return {
        kind: sum(value for name, value in losses.items() if name.startswith(kind))
        for kind in _KINDS
    }


def _caption(image: ReplayedImage) -> str:
    height, width = image.image.shape[1:]
    loss = "" if image.loss is None else f", loss {image.loss:.3f}"
    name = os.path.basename(image.file_name)
    return f"{name}: {len(image.classes)} objects, {width} x {height}{loss}"
