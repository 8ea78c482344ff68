"""Live sources on this machine: an HTTP server and an RTSP server, in threads."""

import io
import re
import socket
import socketserver
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48


def picture(value, size=(WIDTH, HEIGHT)):
    """All of one grey value."""
    return np.full((size[1], size[0], 3), value, np.uint8)


def jpeg(array):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "JPEG")
    return content.getvalue()


class Answer:
    """What a request is answered with; the methods block as a camera does."""

    def __init__(self, handler):
        self.handler = handler
        self.path = handler.path

    def head(self, kind="", length=None):
        self.handler.send_response(200)
        if kind:
            self.handler.send_header("Content-Type", kind)
        if length is not None:
            self.handler.send_header("Content-Length", str(length))
        self.handler.end_headers()

    def write(self, content):
        self.handler.wfile.write(content)
        self.handler.wfile.flush()

    def whole(self, content, kind=""):
        self.head(kind, len(content))
        self.write(content)

    def multipart(self):
        self.head("multipart/x-mixed-replace; boundary=frame")

    def part(self, array, pause=0.02):
        content = jpeg(array)
        lines = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
        self.write(lines.encode() + content + b"\r\n")
        time.sleep(pause)


class Server:
    """Attributes: ``address``, with a password; ``requests``, the paths that were asked for."""

    def __init__(self, port):
        self.address = f"http://user:s3cret@127.0.0.1:{port}"
        self.requests = []


@contextmanager
def http_server(answer):
    """Answers every request by ``answer(an Answer, how many there were before)``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            try:
                answer(Answer(self), len(server.requests) - 1)
            except OSError:  # who asked has gone
                pass

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    server = Server(served.server_port)
    thread = threading.Thread(target=served.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        served.shutdown()
        served.server_close()


def encoded(pictures, path, format, **options):
    """A video in memory, as a file of the format holds it."""
    with av.open(str(path), "w", format=format, options=options) as file:
        stream = file.add_stream("libx264", rate=10, options={"g": "5", "tune": "zerolatency"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for array in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
        file.mux(stream.encode())
    return path.read_bytes()


def packets_of_rtp(pictures, path):
    """RTP packets of H.264, each one unit of it, in groups of a picture (RFC 6184)."""
    groups, sequence = [], 0
    content = encoded(pictures, path, "h264", **{})
    units = [unit for unit in re.split(rb"\x00\x00\x00?\x01", content) if unit]
    group = []
    for unit in units:
        is_picture = unit[0] & 31 in (1, 5)
        head = struct.pack(
            "!BBHII", 128, 96 | (128 if is_picture else 0), sequence, len(groups) * 9000, 7
        )
        group.append(head + unit.rstrip(b"\0") if not is_picture else head + unit)
        sequence += 1
        if is_picture:
            groups.append(group)
            group = []
    return groups


@contextmanager
def rtsp_server(groups, pause=0.03):
    """Plays them once to each who asks, over the connection itself; its address."""
    description = (
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
        "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\n"
        "a=control:track\r\n"
    )

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while line := self.rfile.readline().decode():
                method, fields = line.split()[0], {}
                while field := self.rfile.readline().decode().strip():
                    name, _, value = field.partition(":")
                    fields[name.lower()] = value.strip()
                heads, body = {"CSeq": fields["cseq"], "Session": "1"}, ""
                if method == "OPTIONS":
                    heads["Public"] = "OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"
                elif method == "DESCRIBE":
                    heads["Content-Type"], body = "application/sdp", description
                elif method == "SETUP":
                    heads["Transport"] = fields["transport"]
                heads["Content-Length"] = str(len(body))
                lines = "".join(f"{name}: {value}\r\n" for name, value in heads.items())
                self.wfile.write(f"RTSP/1.0 200 OK\r\n{lines}\r\n{body}".encode())
                if method == "PLAY":
                    for group in groups:
                        for packet in group:
                            self.wfile.write(struct.pack("!cBH", b"$", 0, len(packet)) + packet)
                        time.sleep(pause)
                    return

        def finish(self):
            with_errors = (BrokenPipeError, ConnectionResetError)
            try:
                super().finish()
            except with_errors:
                pass

    class Threads(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True

        def handle_error(self, *_):  # who asked has gone
            pass

    with Threads(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"rtsp://user:s3cret@127.0.0.1:{served.server_address[1]}/live/s3cret"
        finally:
            served.shutdown()


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
