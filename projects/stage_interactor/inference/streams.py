"""Reading live sources: the newest frame at any time, and a new connection when one is lost."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np

from ..errors import UserError
from .live_addresses import Address, cameras_told
from .sources import ANY_METADATA, Frame, require_frame, upright, video_stream
from .values import whole

logger = logging.getLogger(__name__)

RECONNECT, TIMEOUT = 5, 10.0  # tries in a row; seconds
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds, before connecting again
_STEADY = 10.0  # seconds of frames, after which a connection that is lost was a good one
_TICK = 0.5  # seconds between looks at the clock, while nothing comes
_NO_STREAM = (
    "there is no live video in a format that is read, such as MJPEG, MPEG-TS or fragmented MP4; a "
    "picture, video or page is downloaded and then named as a file, and of a playlist (.m3u8, "
    ".mpd) name a stream itself"
)


class LiveSourceError(UserError):
    """A live source that cannot be opened, or was lost and did not come back."""


class LiveFrames:
    """The frames of a live source, as they come.

    A thread reads it and has one place for a frame: who takes frames gets the newest, and those
    that have come in the meantime are dropped.

        with LiveFrames(live_address("rtsp://camera/stream")) as frames:
            for frame in frames:
                print(frame.time, frame.picture.shape)

    Args:
        address: of the source.
        reconnect: how often, in a row, it is tried to connect again when the connection is lost, or
            nothing comes. The pauses before grow, from a second to 30.
        timeout: seconds in which it must answer, and in which a frame must come.
        seconds: ends so long after the first frame; None, when it is lost for good.

    Attributes:
        received, dropped: frames that have come, and those of them that nobody has taken.

    Raises:
        LiveSourceError: while frames are taken: it cannot be opened, is no live video, or is lost
            for good. It is shown without its user, password and path.
        ValueError: a value is out of its range, or a frame too large.
    """

    def __init__(
        self,
        address: Address,
        *,
        reconnect: int = RECONNECT,
        timeout: float = TIMEOUT,
        seconds: float | None = None,
    ):
        reconnect = whole(reconnect, "reconnect (--reconnect)", 0)
        for name, value in (("timeout", timeout), ("seconds", seconds)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} (--{name}) must be more than 0 seconds, got {value!r}")
        self.received = self.dropped = 0
        self._address, self._reconnect = address, reconnect
        self._timeout, self._seconds = timeout, seconds
        self._changed = threading.Condition()
        self._newest: tuple[av.VideoFrame | np.ndarray, float] | None = None
        self._start: float | None = None  # of the first frame that was taken, by a monotonic clock
        self._came: list[float] = []  # of this connection, when the first and the last frame came
        self._error: BaseException | None = None
        self._ended = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=address.name, daemon=True)

    def __enter__(self) -> "LiveFrames":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join(_TICK)  # it may wait for the network, and ends when that answers

    def __iter__(self) -> Iterator[Frame]:
        while (taken := self._take()) is not None:
            frame, seconds = taken
            time_of_it = Fraction(round(seconds * 1_000_000), 1_000_000)
            picture = frame if isinstance(frame, np.ndarray) else upright(frame)
            yield Frame(picture, time_of_it, Fraction(0))

    def _take(self) -> tuple[av.VideoFrame | np.ndarray, float] | None:
        """The newest frame and its time; waits for it. None at the end."""
        with self._changed:
            while self._newest is None and not self._ended and not self._is_over():
                # Not for ever: on Windows nothing else would notice Ctrl-C.
                self._changed.wait(_TICK)
            if self._is_over():
                return None
            taken, self._newest = self._newest, None
            if taken is None:
                if self._error is not None:
                    raise self._error
                return None
            frame, when = taken
            if self._start is None:
                self._start = when
            return frame, when - self._start

    def _is_over(self) -> bool:
        if self._seconds is None or self._start is None:
            return False
        return time.monotonic() - self._start >= self._seconds

    def _run(self) -> None:
        """What the thread does."""
        try:
            self._read_and_connect_again()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read_and_connect_again(self) -> None:
        shown, tries = self._address.shown, 0
        while not self._stopped.is_set():
            self._came.clear()
            try:
                self._read()
                reason = "it has ended"
            except (av.FFmpegError, TimeoutError) as error:
                reason = self._told(error)
            if self._stopped.is_set():
                return
            if not self.received:
                raise LiveSourceError(f"{shown}: {reason}")
            if self._came and self._came[-1] - self._came[0] >= _STEADY:
                tries = 0
            lost = f"{shown}: lost after {self.received} frames ({reason})"
            if tries >= self._reconnect:
                failed = f"; {tries} tries to connect again did not last" if tries else ""
                raise LiveSourceError(lost + failed)
            pause = min(_FIRST_PAUSE * 2**tries, _LONGEST_PAUSE)
            tries += 1
            logger.warning(
                f"{lost}; connecting again in {pause:g} s, try {tries} of {self._reconnect}"
            )
            self._stopped.wait(pause)

    def _read(self) -> None:
        """Until the connection is lost, or ended from here."""
        with self._opened() as file:
            stream = video_stream(file)
            last = time.monotonic()
            for packet in file.demux(stream):
                if self._stopped.is_set():
                    return
                frames = self._decoded(packet)
                del packet  # see there
                now = time.monotonic()
                for frame in frames:
                    self._put(frame, now)
                    last = now
                if now - last > self._timeout:
                    raise TimeoutError(f"no whole frame has come for {self._timeout:g} s")

    def _decoded(self, packet: av.Packet) -> list[av.VideoFrame | np.ndarray]:
        """The frames of a packet; of a camera their pixels.

        FFmpeg gives the memory of a camera's driver itself, which is gone when the camera is
        closed: nothing that leads to it may be there then, or the process crashes.
        """
        try:
            frames = packet.decode()
        except av.InvalidDataError:  # of which the next one knows nothing
            return []
        for frame in frames:
            require_frame(frame)
        if not self._address.is_camera:
            return list(frames)
        return [np.array(upright(frame)) for frame in frames]

    @contextmanager
    def _opened(self) -> Iterator[av.container.InputContainer]:
        address = self._address
        try:
            file = av.open(
                address.place,
                format=address.format,
                options=dict(address.options),
                timeout=(self._timeout, self._timeout),
                **ANY_METADATA,
            )
        except (av.ArgumentError, av.InvalidDataError):
            if address.format is not None:
                raise
            # Not from that: its text has the address, with all that is secret in it.
            raise LiveSourceError(f"{address.shown}: {_NO_STREAM}") from None
        with file:
            if address.is_http and file.size > 0:
                raise LiveSourceError(
                    f"{address.shown}: it is a file of {file.size:,} bytes and no live stream: "
                    "download it, and name the file"
                )
            yield file

    def _put(self, frame: av.VideoFrame | np.ndarray, now: float) -> None:
        with self._changed:
            self.received += 1
            self._came[1:] = [now]
            if self._newest is not None:
                self.dropped += 1
            self._newest = frame, now
            self._changed.notify_all()

    def _told(self, error: BaseException) -> str:
        """What is wrong; FFmpeg's own text names the address with all that is secret in it."""
        if isinstance(error, av.ExitError):
            return f"nothing has come for {self._timeout:g} s"
        reason = getattr(error, "strerror", None) or str(error)
        if self._address.format == "v4l2":
            return f"{reason}; {cameras_told()}"
        return reason
