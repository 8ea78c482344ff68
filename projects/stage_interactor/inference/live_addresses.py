"""Which live source is meant: a camera, or an address of the network, shown without its secrets."""

import glob
import os
import re
import sys
from typing import NamedTuple
from urllib.parse import urlsplit

import av
from av.device import enumerate_input_devices

# FFmpeg's names of the protocols that each may use.
_PROTOCOLS = {
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsp,rtp,udp,tcp,tls",
    "http": "http,https,tcp,tls",  # which may lead from one of the two to the other
    "https": "http,https,tcp,tls",
}
# And of the formats, as for files: playlists, such as HLS, lead to further addresses.
_HTTP_FORMATS = "asf,flv,h264,hevc,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mpjpeg,ogg,webm"
_RTSP_FORMATS = "rtsp,sdp,rtp,mpegts"
_DEVICES = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}


class Address(NamedTuple):
    """A live source."""

    place: str  # that is opened; it may hold a password
    shown: str  # in messages: without user, password, path and query, any of which may be secret
    name: str  # of what is written
    format: str | None  # FFmpeg's, None for what the stream is
    options: dict[str, str]

    @property
    def is_http(self) -> bool:
        return self.shown.startswith("http")

    @property
    def is_camera(self) -> bool:
        return self.format in _DEVICES.values()


def live_address(text: str) -> Address | None:
    """What a word stands for; None for anything but a live source, such as a file.

    A file or folder of that name comes first.

    Args:
        text: the index of a camera, such as ``0``, or ``/dev/video0``, or an address that begins
            with ``rtsp://``, ``rtsps://``, ``http://`` or ``https://``.

    Raises:
        ValueError: an address that cannot be read as one, or of another kind.
    """
    if match := re.fullmatch(r"/dev/video(\d+)", text):
        return _camera(int(match[1]))
    if os.path.lexists(text):
        return None
    if re.fullmatch(r"[0-9]{1,4}", text):
        return _camera(int(text))
    scheme, separator, _ = text.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return None
    scheme = scheme.lower()
    if scheme not in _PROTOCOLS:
        raise ValueError(
            f"{scheme}:// is no live source that is read: those are "
            f"{', '.join(f'{known}://' for known in _PROTOCOLS)} and the indices of cameras; "
            "pictures at other addresses take --output-format jsonl or parquet"
        )
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or not text.isprintable() or " " in text:
        raise ValueError(
            f"an address {scheme}:// has no host, or another port than a number; what is special "
            "in a user's name or password, such as / or @, is written as %2F or %40"
        ) from None
    where = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    options = {"protocol_whitelist": _PROTOCOLS[scheme], "format_whitelist": _HTTP_FORMATS}
    if scheme.startswith("rtsp"):
        options |= {"format_whitelist": _RTSP_FORMATS, "rtsp_flags": "prefer_tcp"}
    name = re.sub(r"[^\w.-]+", "_", f"{scheme}_{host}" + (f"_{port}" if port else ""))
    format = None if scheme.startswith("http") else "rtsp"
    place = scheme + text[len(scheme) :]
    return Address(place, f"{scheme}://{where}", name[:100], format, options)


def _camera(index: int) -> Address:
    format = _DEVICES.get(sys.platform, "v4l2")
    place, options = f"/dev/video{index}", {}
    if format == "avfoundation":
        place, options = f"{index}:none", {"framerate": "30"}  # without sound
    elif format == "dshow":
        cameras = [item.name for item in _devices(format) if "video" in item.media_types]
        if index >= len(cameras):
            raise ValueError(f"camera {index}: there is none; {cameras_told(cameras)}")
        place = f"video={cameras[index]}"
    return Address(place, f"camera {index}", f"camera_{index}", format, options)


def _devices(format: str) -> list:
    try:
        return enumerate_input_devices(format)
    except (av.FFmpegError, ValueError):
        return []


def cameras_told(names: list[str] | None = None) -> str:
    """Which cameras there are, for a message; by default those of Linux."""
    names = sorted(glob.glob("/dev/video*")) if names is None else names
    return f"cameras here: {', '.join(names) or 'none'}"
