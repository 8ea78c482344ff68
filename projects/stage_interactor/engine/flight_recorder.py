"""What matching and labels made of each object, kept at every evaluation of a training."""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from ..d2 import comm
from ..modeling import Criterion, StageOutput
from ..pages.flight import ROWS, file_name
from ..pages.object_trace import trace_objects
from ..writing import inside, new_file

logger = logging.getLogger(__name__)


class FlightRecorder:
    """Gathers what :func:`trace_objects` tells of the objects of the images that are evaluated.

    Args:
        class_names: by the model's class index.
        images: names of the files, without their folders, whose objects are kept; None keeps all.
    """

    def __init__(self, class_names: Sequence[str], images: Collection[str] | None = None):
        self._class_names = list(class_names)
        self._images = None if images is None else set(images)
        self._found: set[str] = set()
        self._image_ids: list[str] = []
        self._rows: list[dict[str, np.ndarray]] = []

    def add(
        self,
        criterion: Criterion,
        stages: Sequence[StageOutput],
        images: Sequence[Mapping[str, Any]],
        objects: Sequence[Any],
    ) -> None:
        """Of images of one batch, with their outputs, and their objects in the model's classes."""
        names = [os.path.basename(str(image.get("file_name", ""))) for image in images]
        if self._images is not None and self._images.isdisjoint(names):
            return
        traces = trace_objects(criterion, stages, objects)
        for name, image, instances, trace in zip(names, images, objects, traces):
            if self._images is not None and name not in self._images:
                continue
            self._found.add(name)
            height, width = instances.image_size
            scale = torch.tensor(
                [image.get("width", width) / width, image.get("height", height) / height] * 2
            )
            # Objects are on the last axis of a trace, and on the first one of a file.
            self._rows.append(
                {
                    "boxes": (instances.gt_boxes.tensor.cpu().float() * scale).numpy(),
                    "classes": instances.gt_classes.cpu().numpy().astype(np.int32),
                    "query": trace.query.T.numpy().astype(np.int32),
                    "iou": trace.iou.T.numpy().astype(np.float32),
                    "nearest": trace.nearest.T.numpy().astype(np.float32),
                    "score": trace.score.T.numpy().astype(np.float32),
                    "labels": trace.labels.permute(2, 0, 1).numpy().astype(np.int8),
                }
            )
            self._image_ids.append(str(image.get("image_id", name)))

    def write(self, output_dir: str | os.PathLike, iteration: int | None) -> None:
        """Writes the images of all processes; to be called by all of them.

        Raises:
            OSError: it cannot be written.
        """
        parts = comm.all_gather((self._image_ids, self._rows, self._found))
        if not comm.is_main_process():
            return
        found = set().union(*(names for _, _, names in parts))
        if missing := sorted((self._images or set()) - found):
            logger.warning(f"train.flight_recorder.images: not among those evaluated: {missing}")
        # In one order, however many processes there are.
        pairs = (pair for ids, rows, _ in parts for pair in zip(ids, rows))
        images = sorted(pairs, key=itemgetter(0))
        if not images:
            return
        image_ids = [name for name, _ in images]
        for index, (_, row) in enumerate(images):
            row["image"] = np.full(len(row["query"]), index, dtype=np.int32)
        arrays: dict[str, Any] = {
            name: np.concatenate([row[name] for _, row in images]) for name in ROWS
        }
        with new_file(inside(output_dir, file_name(iteration)), sync=False) as file:
            np.savez_compressed(
                file,
                image_ids=np.array(image_ids),
                class_names=np.array(self._class_names),
                **arrays,
            )
