"""A page on which the box of a query is dragged, and the stages behind it follow.

It is served to a browser on this machine, and computed here: the weights stay where they are.
"""

import json
import re
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from ..d2.detections import UnusableDetectionsError
from ..errors import explain
from .page import data_uri, render
from .serving import family_of, is_local, require_port, tell_address
from .trace import Edit, Stage, Tracer, best_queries

_MOST_BYTES = 10_000  # of a question
_MOST_QUERIES = 100  # that can be chosen
_MOST_CLASSES = 3  # whose scores are told
_MOST_SHOWN = 2048  # pixels of a side
_MISTAKES = (ValueError, OverflowError, RecursionError, UnusableDetectionsError)  # of a question


class LiveStages:
    """What the page asks for.

    Args:
        tracer: of a picture.
        picture: the same, uint8 (H, W, 3), RGB.
        class_names: by class index.
        objects: boxes, xyxy in pixels of the picture, and class indices of what is in it, if known.
        title: of the page.
    """

    def __init__(
        self,
        tracer: Tracer,
        picture: np.ndarray,
        class_names: Sequence[str],
        objects: tuple[Sequence[Sequence[float]], Sequence[int]] | None = None,
        title: str = "Stages",
    ):
        self._tracer, self._picture, self._names = tracer, picture, class_names
        self._objects, self._title = objects, title
        self._before = tracer()
        self._turn = threading.Lock()  # hooks are the model's, which is one

    def page(self) -> str:
        """As HTML, with the picture and what the stages do with it by themselves."""
        height, width = self._picture.shape[:2]
        boxes, classes = self._objects or ((), ())
        content = {
            "width": width,
            "height": height,
            "stages": len(self._before),
            "query": best_queries(self._before, 1)[0],
            "objects": [
                {"box": [float(side) for side in box], "name": self._names[index]}
                for box, index in zip(boxes, classes)
            ],
        }
        step = -(-max(height, width) // _MOST_SHOWN)
        values = {"title": self._title, "picture": data_uri(self._picture[::step, ::step])}
        nonce = secrets.token_urlsafe()
        return render("live_stages.html", content=content, nonce=nonce, **values)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What the stages do with a query.

        Args:
            question: ``query``; and, for a box put elsewhere, ``box``, xyxy in pixels of the
                picture, and ``stage``, 0-based, the first that starts from it.

        Returns:
            ``stages``, of each ``start``, ``box``, the best classes' ``scores`` with names, what
            the ``before`` was without the edit (a box and the score of the best class of now), and
            ``points`` (x, y, mean level from 0 to 1); and ``found``, the queries with the best
            scores, with ``box``, ``name`` and ``score``.

        Raises:
            ValueError: it is no such question.
            UnusableDetectionsError: what the model computes is NaN or infinite.
        """
        query, stage, box = (question.get(name) for name in ("query", "stage", "box"))
        if type(query) is not int or not 0 <= query < self._tracer.num_queries:
            raise ValueError(f"query {query!r}: 0 to {self._tracer.num_queries - 1}")
        stages = self._before
        if box is not None:
            numbers = isinstance(box, list) and all(type(side) in (int, float) for side in box)
            if not numbers or type(stage) is not int:
                raise ValueError("a box is four numbers, and goes to a stage, a whole number")
            with self._turn:
                stages = self._tracer(Edit(stage, query, box))
        return {
            "stages": [self._told(*pair, query) for pair in zip(stages, self._before)],
            "found": [
                {
                    "query": index,
                    "box": _rounded(stages[-1].boxes[index]),
                    "name": self._names[stages[-1].scores[index].argmax()],
                    "score": round(float(stages[-1].scores[index].max()), 4),
                }
                for index in best_queries(stages, _MOST_QUERIES)
            ],
        }

    def _told(self, stage: Stage, before: Stage, query: int) -> dict[str, Any]:
        scores = stage.scores[query]
        best = np.argsort(-scores, kind="stable")[:_MOST_CLASSES]
        weights = stage.level_weights[query].reshape(-1, stage.level_weights.shape[-1])
        level = (weights * np.arange(weights.shape[-1])).sum(-1) / max(weights.shape[-1] - 1, 1)
        points = np.column_stack((stage.points[query].reshape(-1, 2), level))
        return {
            "start": _rounded(stage.start[query]),
            "box": _rounded(stage.boxes[query]),
            "scores": [[self._names[index], round(float(scores[index]), 4)] for index in best],
            "before": {
                "box": _rounded(before.boxes[query]),
                "score": round(float(before.scores[query, best[0]]), 4),
            },
            "points": [_rounded(point) for point in points],
        }


def serve_stages(
    live: LiveStages, *, host: str = "127.0.0.1", port: int = 7861, wait: bool = True
) -> ThreadingHTTPServer:
    """Serves the page until Ctrl-C.

    Pages of other sites cannot ask this server: a question is JSON, which a browser sends to
    another site with its leave alone, and is put to the name under which this one is served.

    Args:
        host: what it listens on; others than 127.0.0.1 let other machines use it.
        port: of it.
        wait: for Ctrl-C; else it goes on until ``shutdown()`` of what is returned.

    Raises:
        ValueError: the port cannot be had.
    """
    require_port(host, port)

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds

        def do_GET(self) -> None:
            if self._is_refused():
                return
            if self.path == "/":
                self._send(200, "text/html; charset=utf-8", live.page())
            else:
                self._send(404, "text/plain", "there is nothing here")

        def do_POST(self) -> None:
            if self._is_refused():
                return
            length = self.headers.get("Content-Length", "")
            if self.path != "/stages" or self.headers.get_content_type() != "application/json":
                self._send(404, "text/plain", "there is nothing here")
            elif not re.fullmatch("[0-9]{1,9}", length) or int(length) > _MOST_BYTES:
                self._send(413, "text/plain", f"a question has at most {_MOST_BYTES} bytes")
            else:
                try:
                    question = json.loads(self.rfile.read(int(length)))
                    if not isinstance(question, dict):
                        raise ValueError("a question is a JSON object")
                    answer = json.dumps(live.answer(question), allow_nan=False)
                except _MISTAKES as error:
                    self._send(400, "text/plain; charset=utf-8", str(error))
                except Exception as error:  # of the machine, such as its memory, or a bug
                    told = explain(error) or f"{type(error).__name__}: {error}"
                    self._send(500, "text/plain; charset=utf-8", told)
                else:
                    self._send(200, "application/json", answer)

        def _is_refused(self) -> bool:
            """Another name that leads here may be another site's, which would read the answers."""
            name = re.sub(":[0-9]*$", "", self.headers.get("Host", "")).strip("[]")
            if is_local(host) and not is_local(name):
                self._send(403, "text/plain", f"ask {host}:{port}")
                return True
            return False

        def _send(self, status: int, kind: str, text: str) -> None:
            content = text.encode("utf-8", "backslashreplace")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nobody reads a line for each of a hundred questions."""

    class Server(ThreadingHTTPServer):
        address_family = family_of(host, port)
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):  # a tab that was closed
                super().handle_error(request, client_address)

    server = Server((host, port), Handler)
    tell_address(host, port)
    if not wait:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server
    try:
        with server:
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    return server


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in values]
