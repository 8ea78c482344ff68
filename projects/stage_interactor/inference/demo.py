"""What the web page of ``stage-interactor demo`` shows, without the page."""

import os
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..d2.detections import UnusableDetectionsError
from ..data import read_picture
from ..modeling import StageInteractor
from ..pages.boxes import draw_boxes
from ..pages.stages import draw_stages
from ..pages.trace import trace_stages
from ..untrusted.tensors import EXPORTED
from .blueprint import load_model
from .detector import Detections, Detector
from .prepare import choose_device, prepare_for_inference

NO_STAGES = "An exported file has no stages to show: open the checkpoint that it was made of."
_LEAST_SIDE, _MOST_SIDE = 800, 1600  # of a picture as it is shown, in pixels


@dataclass(frozen=True)
class Seen:
    """A picture, all that the model has found in it, and what is shown of that."""

    picture: np.ndarray  # uint8 (H, W, 3), RGB
    raw: Detections
    given: Detections

    @property
    def scale(self) -> float:
        """Pixels of the shown picture for one of this."""
        side = max(self.picture.shape[:2])
        return min(max(side, _LEAST_SIDE), _MOST_SIDE) / side

    def at(self, left: float, top: float) -> int | None:
        """The smallest box around a point of the shown picture, by its index; None for none."""
        point = np.array([left, top]) / self.scale
        boxes = self.given.boxes
        around = ((boxes[:, :2] <= point) & (point <= boxes[:, 2:])).all(1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return int(np.where(around, areas, np.inf).argmin()) if around.any() else None


class Demo:
    """A detector whose stages can be looked at, where it has some.

    Args:
        detector: finds objects.
        model: the same, as it was trained; None for an exported file.
    """

    def __init__(self, detector: Detector, model: StageInteractor | None = None):
        self.detector, self._model = detector, model

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        config_file: str | None = None,
        averaged: bool | None = None,
        device: str | None = None,
        trusted: bool = False,
    ) -> "Demo":
        """See :meth:`stage_interactor.Detector.from_checkpoint` for arguments and errors."""
        path = os.fspath(path)
        if path.endswith(EXPORTED):
            options = dict(config_file=config_file, averaged=averaged, trusted=trusted)
            return cls(Detector.from_checkpoint(path, device=device, **options))  # type: ignore[arg-type]
        chosen = choose_device(device)
        model, blueprint = load_model(path, config_file, averaged=averaged)
        model = model.to(chosen)
        return cls(Detector.of_blueprint(prepare_for_inference(model), blueprint), model)

    @property
    def start(self) -> float:
        """The threshold that is one for all classes, to begin with: the middle one."""
        return round(float(np.median(self.detector.select().thresholds)), 2)

    def see(self, path: str | os.PathLike, threshold: float | None = None) -> Seen:
        """Finds the objects of a picture in a file.

        Args:
            threshold: least score; None for the checkpoint's, by class.

        Raises:
            ImageReadError: it cannot be read.
            ValueError: it is too large.
            UnusableDetectionsError: what is found is NaN or infinite.
        """
        picture = read_picture(path)
        select = self.detector.select().everything()
        (raw,) = self.detector.detect_prepared([self.detector.prepare(picture)], select)
        if isinstance(raw, UnusableDetectionsError):
            raise raw
        return self.choose(Seen(picture, raw, raw), threshold)

    def choose(self, seen: Seen, threshold: float | None) -> Seen:
        """The same picture with another threshold; the model is not asked again."""
        select = self.detector.select(threshold)
        raw = seen.raw
        return Seen(seen.picture, raw, raw[select(raw.boxes, raw.scores, raw.classes)])

    def draw(self, seen: Seen) -> np.ndarray:
        """Uint8 (H, W, 3), RGB: the picture with boxes, names and scores, of a legible size."""
        found = seen.given
        return draw_boxes(
            seen.picture,
            found.boxes,
            found.classes,
            found.scores,
            class_names=self.detector.class_names,
            scale=seen.scale,
            font_size=16,
        )

    def told(self, seen: Seen) -> str:
        """How many objects of which classes."""
        counts = Counter(seen.given.names).most_common()
        which = ", ".join(f"{count} {name}" for name, count in counts)
        return (
            f"{len(seen.given)} objects: {which}" if which else "Nothing found: a lower threshold?"
        )

    def stages(self, seen: Seen, index: int) -> tuple[str, list[np.ndarray]]:
        """What the stages did for one of the objects.

        Returns:
            A line about it; and two pictures, uint8 (H, W, 3) RGB: its box through the stages, and
            its sampling points. None of them for an exported file.
        """
        if self._model is None:
            return NO_STAGES, []
        detector, found = self.detector, seen.given
        stages = trace_stages(
            self._model, seen.picture, detector.augmentation, detector.image_format
        )
        last = stages[-1]
        height, width = seen.picture.shape[:2]
        boxes = last.boxes.clip(0, [width, height, width, height])
        away = np.abs(boxes - found.boxes[index]).max(1) / max(height, width)
        away += np.abs(last.scores[:, found.classes[index]] - found.scores[index])
        query = int(away.argmin())
        told = f"{found.names[index]} {found.scores[index]:.2f}, found by query {query}"
        return told, draw_stages(self._model, seen.picture, stages, query)
