"""Pictures of one size put together in batches, on the way to a detector that takes them so."""

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from ..d2.evaluation import DatasetEvaluator
from ..modeling.batches import padded_size

Item = TypeVar("Item")

_AHEAD = 16  # batches that are read at most before the oldest item is given away
_MAX_BYTES = 2**28  # and of all that was read since then


def batches_by_size(
    items: Iterable[Item],
    batch_size: int,
    size: Callable[[Item], Hashable],
    num_bytes: Callable[[Item], int],
) -> Iterator[list[Item]]:
    """Batches of items of one size, as far as the next items allow; all full but the last.

    The oldest item is in every batch, with others of its size; where there are too few of them,
    with the next oldest of another size, and so on. Items of one size stay in their order.

    Args:
        items: a stream; a bounded number of them is read ahead.
        batch_size: items of a batch.
        size, num_bytes: of an item.
    """
    ahead = 1 if batch_size == 1 else _AHEAD * batch_size
    waiting: list[tuple[int, int, Hashable, Item]] = []  # number, bytes up to it, size, item
    total = 0

    def take() -> list[Item]:
        first: dict[Hashable, int] = {}
        for number, _, key, _ in waiting:
            first.setdefault(key, number)
        waiting.sort(key=lambda entry: first[entry[2]])
        taken = [item for *_, item in waiting[:batch_size]]
        waiting[:] = sorted(waiting[batch_size:], key=lambda entry: entry[0])
        return taken

    for number, item in enumerate(items):
        waiting.append((number, total, size(item), item))
        total += num_bytes(item)
        while len(waiting) >= batch_size and (
            number - waiting[0][0] + 1 >= ahead or total - waiting[0][1] >= _MAX_BYTES
        ):
            yield take()
    while waiting:
        yield take()


class BySize:
    """A loader's images in batches of one padded size, and :meth:`in_order` what comes of them.

    There are as many batches as of the loader, of as many images; where all images have one size
    they are the same.

    Args:
        loader: of lists of a detector's inputs.
        size_divisibility: what the detector pads images to a multiple of.
    """

    def __init__(self, loader: DataLoader | Sequence[list], size_divisibility: int):
        self._loader = loader
        self._size_divisibility = size_divisibility
        self._numbers: deque[int] = deque()  # of the images that were given away, in that order

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        self._numbers.clear()
        batches = iter(self._loader)
        first = next(batches, [])
        for batch in batches_by_size(
            enumerate(itertools.chain(first, itertools.chain.from_iterable(batches))),
            max(len(first), 1),
            size=lambda item: padded_size(item[1]["image"], self._size_divisibility),
            num_bytes=lambda item: item[1]["image"].nbytes,
        ):
            self._numbers.extend(number for number, _ in batch)
            yield [image for _, image in batch]

    def in_order(self, evaluator: DatasetEvaluator) -> DatasetEvaluator:
        """An evaluator that is given images and outputs in the order of the loader."""
        return _InOrder(evaluator, self._numbers)


class _InOrder(DatasetEvaluator):
    def __init__(self, evaluator: DatasetEvaluator, numbers: deque[int]):
        self._evaluator = evaluator
        self._numbers = numbers

    def reset(self) -> None:
        self._next = 0
        self._waiting: dict[int, tuple[Any, Any]] = {}
        self._evaluator.reset()

    def process(self, inputs: list, outputs: list) -> None:
        for pair in zip(inputs, outputs):
            self._waiting[self._numbers.popleft()] = pair
        ready = []
        while self._next in self._waiting:
            ready.append(self._waiting.pop(self._next))
            self._next += 1
        if ready:
            self._evaluator.process(*map(list, zip(*ready)))

    def evaluate(self) -> dict | None:
        return self._evaluator.evaluate()
