"""One object, one id, from frame to frame: ByteTrack, by the package trackers."""

import statistics
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UserError
from ..pages.boxes import sv
from .detector import Detections
from .selection import Selection

FAINT = 0.1  # least score of what an object may be followed by; ByteTrack's own
_PATIENCE = 1.0  # seconds for which an object that is not found is looked for
_LEAST_FRAMES = 3  # and of slower videos so many frames
_MEMORY = 15  # intervals between frames, of which the median is taken
_BUFFERED_RATE = 30  # frames a second, that the library counts its patience in


class Tracker:
    """Follows the objects of one video, whatever their classes.

    An object has an id from the second frame on in which it is found. What is found below the
    thresholds, down to :data:`FAINT`, begins no track and is not given, but keeps one alive, as in
    ByteTrack (Zhang et al., ECCV 2022). An object that is not found for a second, or for three
    frames of a slower video, is another one when it comes back.

    Args:
        rate: frames a second, in the mean.
        first_id: of the first object; the others follow.

    Attributes:
        next_id: that no object has had yet.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, rate: float = 25.0, first_id: int = 1):
        try:
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise UserError(
                "tracking (--track) needs the package trackers: pip install "
                "'stage-interactor[track]'"
            ) from error
        # Its scores are those of `update`: 1 for what is given, 0 for what is faint.
        self._tracker: Any = ByteTrackTracker(
            lost_track_buffer=round(_PATIENCE * _BUFFERED_RATE),
            frame_rate=rate,
            track_activation_threshold=0.5,
            high_conf_det_threshold=0.5,
        )
        self._interval = 1 / rate
        self._intervals: deque[float] = deque(maxlen=_MEMORY)
        self._last: float | None = None
        self._first_id = self.next_id = first_id

    def update(self, found: Detections, faint: np.ndarray, time: float) -> Detections:
        """The detections of the next frame, with their tracks.

        Args:
            found: those that are given.
            faint: (M, 4) boxes below the thresholds, xyxy in pixels.
            time: of the frame, in seconds. A frame that is left out need not be told of.
        """
        self._wait_for(time)
        boxes = np.concatenate((found.boxes, faint)).reshape(-1, 4)
        result = self._tracker.update(
            sv.Detections(
                xyxy=boxes,
                confidence=np.repeat([1.0, 0.0], (len(found), len(faint))),
                data={"index": np.arange(len(boxes))},
            ),
            timestamp=self._last,
        )
        tracks = np.full(len(boxes), -1)
        if len(result):
            tracks[result.data["index"]] = result.tracker_id
        tracks[tracks >= 0] += self._first_id
        self.next_id = max(self.next_id, tracks.max(initial=0) + 1)
        return replace(found, tracks=tracks[: len(found)])

    def _wait_for(self, time: float) -> None:
        """Time goes on, also in files in which it does not."""
        if self._last is not None:
            if time <= self._last:
                time = self._last + self._interval
            self._intervals.append(time - self._last)
            # Of the median: an interruption must not make it look for objects for minutes.
            usual = statistics.median(self._intervals)
            self._tracker.maximum_time_without_update = max(_PATIENCE, _LEAST_FRAMES * usual)
        self._last = time


def given_and_faint(raw: Detections, select: Selection) -> tuple[Detections, np.ndarray]:
    """What is selected of all that a model has found, and the boxes (M, 4) that are too faint."""
    of = raw.boxes, raw.scores, raw.classes
    given = select(*of)
    boxes = {box.tobytes() for box in raw.boxes[given]}
    lower = select.lowered(FAINT)(*of)
    faint = [index for index in lower if raw.boxes[index].tobytes() not in boxes]
    return raw[given], raw.boxes[faint]
