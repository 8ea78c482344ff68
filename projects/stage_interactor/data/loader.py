"""Training batches that are a pure function of the seed, so that a run can be resumed exactly.

Training draws images from an endless stream: draw 0, 1, 2, ... over all processes, epoch after
epoch, each epoch in an order of its own. `TrainStream` turns the number of a draw into an augmented
image, with random numbers seeded from that number alone. `StreamSampler` says which draws form the
batches of a process. Neither has a state: batch k can be had without the batches before it, and
is the same with any number of worker processes.
"""

import itertools
import logging
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..d2 import comm
from ..d2.data import build_detection_train_loader
from .images import ImageReadError

logger = logging.getLogger(__name__)

_MAX_UNREADABLE_IN_A_ROW = 10
_ORDER, _AUGMENTATION, _REPLACEMENT = range(3)  # separate streams of random numbers of one seed


class EpochOrder:
    """The order of `size` records in every epoch of a stream."""

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        if size < 1:
            raise ValueError("the training data set has no images")
        if seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {seed}")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self._recent: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """Record indices (size,) of an epoch, in the order of its draws."""
        if not self.shuffle:
            return np.arange(self.size)
        if epoch not in self._recent:
            while len(self._recent) >= 2:  # batches reach over the end of an epoch
                del self._recent[min(self._recent)]
            generator = np.random.default_rng([self.seed, _ORDER, epoch])
            self._recent[epoch] = generator.permutation(self.size)
        return self._recent[epoch]

    def record_index(self, draw: int) -> int:
        epoch, position = divmod(draw, self.size)
        return int(self.epoch(epoch)[position])


class TrainStream(Dataset):
    """The endless stream of augmented images; index it with the number of a draw.

    An image that cannot be read is replaced by another one of the same orientation (wide or high),
    chosen by the seed and the draw, with one warning per file and worker process.

    Args:
        records: detectron2's dataset dicts.
        mapper: from a record to a model's input; may use the global random generators of Python,
            numpy and torch (CPU), which are seeded for it and restored afterwards.
        seed: 0 or larger.
        shuffle: a new order in every epoch; otherwise the order of `records`.
    """

    def __init__(
        self, records: list[dict], mapper: Callable[[dict], dict], seed: int, shuffle: bool = True
    ):
        self._order = EpochOrder(len(records), seed, shuffle)
        self._records = _PackedRecords(records)
        self._wide = _is_wide(records)
        self._mapper = mapper
        self._seed = seed
        self._unreadable: set[str] = set()

    def __getitem__(self, draw: int) -> dict:
        """Raises RuntimeError if ten images in a row cannot be read."""
        index = self._order.record_index(draw)
        tried = []
        while True:
            try:
                with _seeded(self._seed, _AUGMENTATION, draw):
                    return self._mapper(self._records[index])
            except ImageReadError as error:
                self._warn(error)
                tried.append(index)
                same = np.flatnonzero(self._wide == self._wide[index])
                candidates = np.setdiff1d(same, tried)
                if len(tried) >= _MAX_UNREADABLE_IN_A_ROW or not len(candidates):
                    raise RuntimeError(
                        f"{len(tried)} images in a row cannot be read, the last is "
                        f"{error.file_name} ({error.reason}); is the storage at fault?"
                    ) from error
                generator = np.random.default_rng([self._seed, _REPLACEMENT, draw, len(tried)])
                index = int(generator.choice(candidates))

    def _warn(self, error: ImageReadError) -> None:
        if error.file_name not in self._unreadable:
            self._unreadable.add(error.file_name)
            logger.warning(
                "%s. Another image takes its place. Unreadable files so far in this process: %d",
                error,
                len(self._unreadable),
            )


class StreamSampler(Sampler):
    """The draws of one process, in the order in which they form its batches.

    Process r of W takes the draws r, r + W, r + 2 W, ... Every `batch_size` consecutive draws that
    it yields are one batch; with `aspect_ratio_grouping` all of a batch are wider than high, or
    none is, which saves padding. A draw waits until its batch is full.

    Args:
        records: detectron2's dataset dicts; their `width` and `height` are used for grouping.
        batch_size: images of this process per iteration.
        seed, shuffle: as for the `TrainStream`.
        rank, world_size: this process and the number of processes.
        start_iteration: number of batches to leave out; may be set before the iteration starts.
    """

    def __init__(
        self,
        records: Sequence[dict],
        batch_size: int,
        *,
        aspect_ratio_grouping: bool,
        seed: int,
        rank: int,
        world_size: int,
        start_iteration: int = 0,
        shuffle: bool = True,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = start_iteration
        self._order = EpochOrder(len(records), seed, shuffle)
        grouped = _is_wide(records) if aspect_ratio_grouping else np.zeros(len(records), dtype=bool)
        self._group = grouped

    def __iter__(self) -> Iterator[int]:
        skip = self.start_iteration
        waiting = [np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)]
        for epoch in itertools.count():
            batches = self._batches_of_epoch(epoch, waiting)
            yield from batches[skip:].ravel().tolist()
            skip = max(0, skip - len(batches))

    def _batches_of_epoch(self, epoch: int, waiting: list[np.ndarray]) -> np.ndarray:
        """Draws (batches, batch_size) of the batches that fill up in an epoch, in that order.

        `waiting` holds the draws of each group that are left over from earlier epochs; it is
        replaced by those that are left over from this one.
        """
        size = self._order.size
        first = -(-(epoch * size - self.rank) // self.world_size) * self.world_size + self.rank
        draws = np.arange(first, (epoch + 1) * size, self.world_size)
        groups = self._group[self._order.epoch(epoch)[draws - epoch * size]]
        full = []
        for group in (0, 1):
            queue = np.concatenate([waiting[group], draws[groups == group]])
            whole = len(queue) // self.batch_size * self.batch_size
            full.append(queue[:whole].reshape(-1, self.batch_size))
            waiting[group] = queue[whole:]
        batches = np.concatenate(full)
        return batches[np.argsort(batches[:, -1])]  # a batch is full with its last draw


def build_train_loader(
    dataset: list[dict],
    *,
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 4,
    seed: int = 0,
    shuffle: bool = True,
    **kwargs,
) -> DataLoader:
    """detectron2's training loader over a `TrainStream`.

    Args:
        dataset: detectron2's dataset dicts.
        mapper: from a record to a model's input.
        total_batch_size: images per iteration over all processes.
        aspect_ratio_grouping: a batch holds only wide or only high images.
        num_workers: processes that load images, for each process that trains.
        seed: of order and augmentation.
        shuffle: a new order in every epoch.
        **kwargs: for `build_detection_train_loader`.

    Returns:
        A loader that yields lists of mapped images without end. For resuming, see
        `set_start_iteration`.

    Raises:
        ValueError: the batch cannot be divided between the processes, or there are no images.
    """
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            f"total_batch_size={total_batch_size} (images per iteration over all processes) must "
            f"be a positive multiple of the number of processes, {world_size}"
        )
    stream = TrainStream(dataset, mapper, seed, shuffle)
    sampler = StreamSampler(
        dataset,
        total_batch_size // world_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        seed=seed,
        rank=comm.get_rank(),
        world_size=world_size,
        shuffle=shuffle,
    )
    kwargs.setdefault("pin_memory", torch.cuda.is_available())  # copies to the GPU then overlap
    return build_detection_train_loader(
        dataset=stream,
        mapper=None,
        sampler=sampler,
        total_batch_size=total_batch_size,
        aspect_ratio_grouping=False,  # the sampler's order has it already
        num_workers=num_workers,
        seed=seed,
        **kwargs,
    )


def set_start_iteration(loader: DataLoader, iteration: int) -> None:
    """Makes the next pass over a loader of `build_train_loader` start with batch `iteration`."""
    sampler = getattr(getattr(loader, "dataset", None), "sampler", None)
    if not isinstance(sampler, StreamSampler):
        raise TypeError(
            f"only a loader of build_train_loader can start at iteration {iteration}, got "
            f"{type(loader).__name__}; start it from the beginning, or build it so"
        )
    if iteration < 0:
        raise ValueError(f"iteration must be 0 or larger, got {iteration}")
    sampler.start_iteration = iteration


class _PackedRecords:
    """Pickled records in one array, which forked workers share instead of slowly copying it."""

    def __init__(self, records: list[dict]):
        packed = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([len(item) for item in packed])
        self._bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __getitem__(self, index: int) -> dict:
        start = 0 if index == 0 else self._ends[index - 1]
        return pickle.loads(self._bytes[start : self._ends[index]].tobytes())


def _is_wide(records: Sequence[dict]) -> np.ndarray:
    return np.array([record["width"] > record["height"] for record in records], dtype=bool)


@contextmanager
def _seeded(*numbers: int):
    """Seeds the global generators of Python, numpy and torch (CPU), and restores them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    # Not torch.manual_seed: it would also seed the GPUs' generators, which nobody restores.
    torch.default_generator.manual_seed(int(words[3]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
