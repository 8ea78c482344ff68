"""Large pictures in tiles that overlap, and one box for what several of them find.

A tile sees an object whole, or a piece of it that ends at a border inside the picture. Where they
lie tells which: no detection is asked whether it is the better one of two as long as that does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .values import number, whole

OVERLAP = 0.2  # of a tile's side
NMS = 0.5  # IoU, of boxes that tiles and the whole picture find of one object
_LEAST_SIDE = 32  # pixels
_MOST_OVERLAP = 0.9
# Of one object are boxes with this IoU where both tiles look; of two classes, as what is cut may
# look like something else, they must be all but the same.
_AGREED, _AGREED_OF_TWO_CLASSES = 0.5, 0.75
_CONTAINED = 0.5  # or a piece of which a box of its class has this share


Place = tuple[int, int, int, int]  # left, top, right, bottom in the picture


class Part(NamedTuple):
    """Detections of a tile, or of the whole picture."""

    place: Place
    boxes: np.ndarray  # (N, 4), xyxy in pixels of the part
    scores: np.ndarray  # (N,)
    classes: np.ndarray  # (N,)


Merged = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut.

    Args:
        side: of a tile, in pixels.
        overlap: of neighbours at least, in pixels.
        batch_size: tiles that the model gets at once.
    """

    side: int
    overlap: int
    batch_size: int = 1

    @property
    def margin(self) -> int:
        """So near, in pixels, to the border of a tile boxes of what is cut by it end."""
        return max(2, self.side // 100)

    def fits(self, height: int, width: int) -> bool:
        """Whether a picture is no larger than a tile."""
        return max(height, width) <= self.side

    def starts(self, length: int) -> np.ndarray:
        """Where tiles begin along a side of a picture: evenly, the first and the last at its ends.

        A picture with a shorter side than a tile has tiles as short as it.
        """
        step = self.side - self.overlap
        count = max(math.ceil((length - self.overlap) / step), 1)
        return np.linspace(0, max(length - self.side, 0), count).round().astype(int)

    def places(self, height: int, width: int) -> list[Place]:
        """Of all tiles."""
        return [
            (left, top, min(left + self.side, width), min(top + self.side, height))
            for top in self.starts(height).tolist()
            for left in self.starts(width).tolist()
        ]

    def batches(self, height: int, width: int) -> Iterator[list[Place]]:
        """What the model gets at once: the whole picture, then its tiles."""
        yield [(0, 0, width, height)]
        places = self.places(height, width)
        for start in range(0, len(places), self.batch_size):
            yield places[start : start + self.batch_size]

    def merged(self, parts: list[Part], height: int, width: int) -> Merged:
        """Boxes (N, 4) in the picture, scores and classes of what the parts have found.

        1. An object that is no larger than the overlap is seen whole by a tile. So what is found of
           it elsewhere is left to that: by tiles that cut it, and in the whole picture.
        2. Larger ones may be cut by all tiles. A piece goes where a box that is not cut, of a tile
           or of the whole picture, is what that tile would see of it; or has half of the piece,
           and its class.
        3. Other pieces, which agree where both tiles look, become one box.

        What two of them have found whole is still there twice: that is for NMS.
        """
        found = _Found(
            np.concatenate([p.boxes + np.array(p.place[:2] * 2, p.boxes.dtype) for p in parts]),
            np.concatenate([p.scores for p in parts]),
            np.concatenate([p.classes for p in parts]),
            np.concatenate([np.tile(p.place, (len(p.scores), 1)) for p in parts]),
        )
        boxes, _, _, places = found
        picture = np.array([0, 0, width, height])
        near_start = (places[:, :2] > 0) & (boxes[:, :2] <= places[:, :2] + self.margin)
        near_end = (places[:, 2:] < picture[2:]) & (boxes[:, 2:] >= places[:, 2:] - self.margin)
        cut = (near_start | near_end).any(1)
        whole_elsewhere = self._inside(boxes[:, ::2], width) & self._inside(boxes[:, 1::2], height)
        of_picture = (places == picture).all(1)
        small = (boxes[:, 2:] - boxes[:, :2]).max(1) <= self.overlap - 2 * self.margin
        kept = ~(cut & whole_elsewhere | of_picture & small)
        whole, pieces = found.some(kept & ~cut), found.some(kept & cut)
        seen_whole = whole._replace(places=np.broadcast_to(picture, whole.places.shape))
        gone = np.zeros(len(pieces.scores), dtype=bool)
        for members, near in pieces.beside(seen_whole):
            ones, others = pieces.some(members), seen_whole.some(near)
            gone[members] = (ones.agree_with(others) | ones.lie_in(others)).any(1)
        pieces = pieces.some(~gone)
        joined = [pieces.some(members).as_one() for members in pieces.of_one_object()]
        boxes, scores, classes, _ = (np.concatenate(values) for values in zip(whole, *joined))
        return boxes, scores, classes

    def _inside(self, ends: np.ndarray, length: int) -> np.ndarray:
        """(N,) whether intervals (N, 2) lie in a tile along a side, and end before its borders."""
        starts = self.starts(length)
        stops = np.minimum(starts + self.side, length)
        after = (starts == 0) | (ends[:, :1] > starts + self.margin)
        before = (stops == length) | (ends[:, 1:] < stops - self.margin)
        return (after & before).any(1)


def tiling_of(tiles: int | None, overlap: float | None, batch_size: int) -> Tiling | None:
    """That of a side in pixels and an overlap as a share of it, 0.2 by default; None without.

    Raises:
        ValueError: a value is out of its range.
    """
    batch_size = whole(batch_size, "batch_size (--batch-size)")
    if tiles is None:
        if overlap is not None:
            raise ValueError("overlap (--overlap) is that of tiles: give tiles (--tiles) too")
        return None
    side = whole(tiles, "tiles (--tiles), a side in pixels,", _LEAST_SIDE)
    share = OVERLAP if overlap is None else number(overlap)
    if share is None or not 0 <= share <= _MOST_OVERLAP:
        raise ValueError(
            f"overlap (--overlap) must be a share of the side, 0 to {_MOST_OVERLAP}, got "
            f"{overlap!r}"
        )
    return Tiling(side, round(side * share), batch_size)


class _Found(NamedTuple):
    """Detections in pixels of the picture, with the places of the parts that they are of."""

    boxes: np.ndarray  # (N, 4)
    scores: np.ndarray  # (N,)
    classes: np.ndarray  # (N,)
    places: np.ndarray  # (N, 4)

    def some(self, which: np.ndarray) -> "_Found":
        return _Found(*(values[which] for values in self))

    def beside(self, others: "_Found") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Part by part the indices of those of it, and of others that reach into it."""
        places, part = np.unique(self.places, axis=0, return_inverse=True)
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part, minlength=len(places)))[:-1]
        starts, stops = others.boxes[:, :2], others.boxes[:, 2:]
        for place, members in zip(places, np.split(order, ends)):
            reach = ((starts < place[2:]) & (stops > place[:2])).all(1)
            yield members, np.flatnonzero(reach)

    def agree_with(self, others: "_Found") -> np.ndarray:
        """(N, M) whether they are what others, of another part, are, where both parts look."""
        low = np.maximum(self.places[:, None, :2], others.places[:, :2])
        high = np.minimum(self.places[:, None, 2:], others.places[:, 2:])
        ours, theirs = (
            np.concatenate((np.maximum(boxes[..., :2], low), np.minimum(boxes[..., 2:], high)), -1)
            for boxes in (self.boxes[:, None], others.boxes[None])
        )
        shared = _shared(ours, theirs)
        same_class = self.classes[:, None] == others.classes
        least = np.where(same_class, _AGREED, _AGREED_OF_TWO_CLASSES)
        agreed = shared >= least * (_area(ours) + _area(theirs) - shared)
        return agreed & (shared > 0) & (self.places[:, None] != others.places).any(-1)

    def lie_in(self, others: "_Found") -> np.ndarray:
        """(N, M) whether most of them lies in others of their class."""
        shared = _shared(self.boxes[:, None], others.boxes)
        is_most = shared >= _CONTAINED * _area(self.boxes)[:, None]
        return is_most & (self.classes[:, None] == others.classes)

    def of_one_object(self) -> list[np.ndarray]:
        """Indices of those that agree, directly or through others, object by object."""
        rows, columns = [np.zeros(0, dtype=int)], [np.zeros(0, dtype=int)]
        for members, near in self.beside(self):
            ours, theirs = np.nonzero(self.some(members).agree_with(self.some(near)))
            rows.append(members[ours])
            columns.append(near[theirs])
        at = np.concatenate(rows), np.concatenate(columns)
        count = len(self.scores)
        graph = coo_array((np.ones(len(at[0])), at), shape=(count, count))
        _, labels = connected_components(graph, directed=False)
        order = np.argsort(labels, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if count else []

    def as_one(self) -> "_Found":
        """Of the class of the largest: the one that has seen most of it."""
        ends = self.boxes[:, :2].min(0), self.boxes[:, 2:].max(0)
        label = self.classes[_area(self.boxes).argmax()]
        score = self.scores[self.classes == label].max()
        return _Found(
            np.concatenate(ends)[None], np.array([score]), np.array([label]), self.places[:1]
        )


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas that boxes (..., 4) have in common with others."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    return (np.minimum(boxes[..., 2:], others[..., 2:]) - low).clip(0).prod(-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).clip(0).prod(-1)
