"""The frames of a video, or of a live source: what is found in them, and how it is drawn."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..d2.detections import UnusableDetectionsError
from ..pages.boxes import Traces, draw_boxes
from ..untrusted.pictures import PictureTooLargeError
from .detector import Detections, Detector
from .selection import Selection
from .sources import Frame
from .tiles import Tiling
from .tracking import Tracker, given_and_faint


class FrameDetector:
    """Finds objects in the frames of one video, in their order.

    Args:
        detector, select: find them, and say which of them are given.
        tiling: looks at the frames in tiles.
        tracker: follows them. In tiles it sees what is given alone: what is fainter would change
            which pieces are one object.
    """

    def __init__(
        self,
        detector: Detector,
        select: Selection,
        tiling: Tiling | None = None,
        tracker: Tracker | None = None,
    ):
        self._detector, self._select = detector, select
        self._tiling, self._tracker = tiling, tracker

    def __call__(
        self, frames: Sequence[Frame]
    ) -> Iterator[Detections | UnusableDetectionsError | PictureTooLargeError]:
        """Of each frame, or what is wrong with it.

        Raises:
            PictureTooLargeError: a frame is too large for the detector, without tiles.
        """
        if self._tiling is not None:
            for frame in frames:
                try:
                    found = self._detector.detect_tiled(frame.picture, self._tiling, self._select)
                except PictureTooLargeError as error:
                    yield error
                else:
                    yield self._tracked(found, np.empty((0, 4), np.float32), frame)
            return
        select = self._select.everything() if self._tracker else self._select
        prepared = [self._detector.prepare(frame.picture) for frame in frames]
        for frame, raw in zip(frames, self._detector.detect_prepared(prepared, select)):
            if self._tracker is None or isinstance(raw, UnusableDetectionsError):
                yield raw
            else:
                yield self._tracked(*given_and_faint(raw, self._select), frame)

    def _tracked(
        self, found: Detections | UnusableDetectionsError, faint: np.ndarray, frame: Frame
    ) -> Detections | UnusableDetectionsError:
        if self._tracker is None or isinstance(found, UnusableDetectionsError):
            return found
        return self._tracker.update(found, faint, float(frame.time))


class Drawing:
    """Draws what is found on the frames of one video, or on pictures."""

    def __init__(self, class_names: Sequence[str]):
        self._names = class_names
        self._traces: Traces | None = None

    def __call__(self, picture: np.ndarray, found: Detections) -> np.ndarray:
        """A copy, uint8 (H, W, 3) RGB, with boxes; of tracked objects with ids and traces."""
        size = max(12, round(min(picture.shape[:2]) / 40))
        if found.tracks is not None:
            self._traces = self._traces or Traces(len(self._names))
            picture = self._traces.draw(picture, found.to_supervision(), max(2, size // 6))
        return draw_boxes(
            picture,
            found.boxes,
            found.classes,
            found.scores,
            class_names=self._names,
            tracks=found.tracks,
            font_size=size,
        )
