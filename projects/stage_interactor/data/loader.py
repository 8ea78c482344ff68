"""Training batches that are a pure function of the seed, so that a run can be resumed exactly.

Training draws images from an endless stream: draw 0, 1, 2, ... over all processes, epoch after
epoch, each epoch in an order of its own. `TrainStream` turns the number of a draw into an augmented
image, with random numbers seeded from that number alone. `StreamSampler` says which draws form the
batches of a process. Neither has a state: batch k can be had without the batches before it, and
is the same with any number of worker processes.
"""

import copy
import inspect
import io
import itertools
import logging
import math
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..d2 import comm
from ..d2.data import build_detection_train_loader
from ..errors import MORE_SHARED_MEMORY, UserError
from .formats.source import WEIGHT
from .images import ImageReadError
from .records import size_of

logger = logging.getLogger(__name__)

_Read = TypeVar("_Read")

_MAX_UNREADABLE_IN_A_ROW = 10
_SHARED_BY_WORKER = 256 << 10  # bytes, of locks and of a small picture or two
_ORDER, _AUGMENTATION, _REPLACEMENT = range(3)  # separate streams of random numbers of one seed


def repeat_factors(records: Sequence[dict], threshold: float | None) -> np.ndarray | None:
    """How often each record comes in an epoch, on average (R,); None if all come once.

    A class that fewer than ``threshold`` of all images have is rare: its images come
    sqrt(threshold / share) times, as in LVIS (Gupta et al., 2019, section 3) and detectron2's
    RepeatFactorTrainingSampler; of several classes in an image the rarest counts. A record's
    ``sampling_weight`` multiplies it.

    Raises:
        ValueError: the threshold is no share, or a weight is not more than 0.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"repeat_threshold must be a share of the images, 0 to 1, got {threshold}")
    factors = np.array([record.get(WEIGHT, 1.0) for record in records], dtype=float)
    if not (np.isfinite(factors) & (factors > 0)).all():
        wrong = factors[~(np.isfinite(factors) & (factors > 0))][0]
        raise ValueError(f"sampling_weight of a record must be more than 0, got {wrong:g}")
    if threshold:
        classes = [
            {item["category_id"] for item in record.get("annotations", ())} for record in records
        ]
        images = Counter(itertools.chain.from_iterable(classes))
        factor = {
            name: max(1.0, math.sqrt(threshold * len(records) / count))
            for name, count in images.items()
        }
        factors *= [max((factor[name] for name in found), default=1.0) for found in classes]
    return None if (factors == 1).all() else factors


class EpochOrder:
    """The order of records in every epoch of a stream.

    Args:
        number: of the records.
        seed, shuffle: as for the `TrainStream`.
        repeats: how often each record comes in an epoch on average, (number,); once by default.
            Every epoch has the same length, the rounded sum of them, and of a record that comes 1.3
            times every third or so has one more.

    Attributes:
        size: draws of an epoch.
    """

    def __init__(
        self, number: int, seed: int, shuffle: bool = True, repeats: np.ndarray | None = None
    ):
        if number < 1:
            raise ValueError("the training data set has no images")
        if seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {seed}")
        self.size = number if repeats is None else max(1, round(float(repeats.sum())))
        self._number = number
        self._repeats = None if repeats is None else repeats * (self.size / repeats.sum())
        self.seed = seed
        self.shuffle = shuffle
        self._recent: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """Record indices (size,) of an epoch, in the order of its draws."""
        if not self.shuffle and self._repeats is None:
            return np.arange(self.size)
        if epoch not in self._recent:
            while len(self._recent) >= 2:  # batches reach over the end of an epoch
                del self._recent[min(self._recent)]
            self._recent[epoch] = self._ordered(np.random.default_rng([self.seed, _ORDER, epoch]))
        return self._recent[epoch]

    def _ordered(self, generator: np.random.Generator) -> np.ndarray:
        order = generator.permutation(self._number) if self.shuffle else np.arange(self._number)
        if self._repeats is None:
            return order
        # Systematic sampling: marks at equal distances on a line on which each record has a stretch
        # of its own length, so that it gets its factor rounded up or down, and all get the size.
        ends = np.cumsum(self._repeats[order])
        ends[-1] = self.size
        marks = np.floor(ends + generator.random()).astype(int).clip(max=self.size)
        order = np.repeat(order, np.diff(marks, prepend=0))
        return generator.permutation(order) if self.shuffle else order

    def record_index(self, draw: int) -> int:
        epoch, position = divmod(draw, self.size)
        return int(self.epoch(epoch)[position])


class Draw:
    """What a mapper that takes an argument `draw` may know of the draw that it maps a record for.

    Attributes:
        number: 0, 1, 2, ... over all processes and epochs.
        closing: whether it belongs to the last part of the training, see `build_train_loader`.
    """

    def __init__(self, stream: "TrainStream", number: int):
        self._stream = stream
        self.number = number
        closing_draw = stream.closing_draw
        self.closing = closing_draw is not None and number >= closing_draw

    def other(self, read: Callable[[dict], _Read]) -> _Read:
        """What `read` makes of another record, drawn at random by numpy's global generator.

        One whose image cannot be read is replaced as by the stream.

        Raises:
            ImageReadError: ten in a row cannot be read, or none.
        """
        return self._stream.another(read)


class TrainStream(Dataset):
    """The endless stream of augmented images; index it with the number of a draw.

    An image that cannot be read is replaced by another one of the same orientation (wide or high),
    chosen by the seed and the draw, with one warning per file and worker process.

    Args:
        records: detectron2's dataset dicts.
        mapper: from a record to a model's input; may use the global random generators of Python,
            numpy and torch (CPU), which are seeded for it and restored afterwards. If it takes an
            argument `draw` it is given a `Draw`.
        seed: 0 or larger.
        shuffle: a new order in every epoch; otherwise the order of `records`.
        repeats: see :class:`EpochOrder`.

    Attributes:
        closing_draw: the first one of the last part of the training; None if it has none.
    """

    def __init__(
        self,
        records: list[dict],
        mapper: Callable[..., dict],
        seed: int,
        shuffle: bool = True,
        repeats: np.ndarray | None = None,
    ):
        self.closing_draw: int | None = None
        self._order = EpochOrder(len(records), seed, shuffle, repeats)
        self._records = _PackedRecords(records)
        self._wide = _is_wide(records)
        self._mapper = mapper
        self._takes_draw = _takes_draw(mapper)
        self._seed = seed
        self._unreadable: set[str] = set()

    def __getitem__(self, draw: int) -> dict:
        """Raises ImageReadError if ten images in a row cannot be read."""
        index = self._order.record_index(draw)
        tried = []
        while True:
            try:
                return share(self.mapped(index, draw))
            except _StorageError:
                raise
            except ImageReadError as error:
                self._warn(error)
                tried.append(index)
                same = np.flatnonzero(self._wide == self._wide[index])
                candidates = np.setdiff1d(same, tried)
                if len(tried) >= _MAX_UNREADABLE_IN_A_ROW or not len(candidates):
                    raise _StorageError.after(tried, error) from error
                generator = np.random.default_rng([self._seed, _REPLACEMENT, draw, len(tried)])
                index = int(generator.choice(candidates))

    def mapped(self, index: int, draw: int) -> dict:
        """What the mapper makes of record `index` with the random numbers of a draw.

        Raises:
            ImageReadError: its image cannot be read.
        """
        options = {"draw": Draw(self, draw)} if self._takes_draw else {}
        with _seeded(self._seed, _AUGMENTATION, draw):
            return self._mapper(self._records[index], **options)

    def another(self, read: Callable[[dict], _Read]) -> _Read:
        """See `Draw.other`."""
        tried: set[int] = set()
        while True:
            index = int(np.random.randint(self._order.size))
            if index in tried:
                continue
            try:
                return read(self._records[index])
            except ImageReadError as error:
                self._warn(error)
                tried.add(index)
                if len(tried) >= min(_MAX_UNREADABLE_IN_A_ROW, self._order.size):
                    raise _StorageError.after(tried, error) from error

    def _warn(self, error: ImageReadError) -> None:
        if error.file_name not in self._unreadable:
            self._unreadable.add(error.file_name)
            logger.warning(
                "%s. Another image takes its place. Unreadable files so far in this process: %d",
                error,
                len(self._unreadable),
            )


class _StorageError(ImageReadError):
    """So many images cannot be read that no other one takes their place."""

    @classmethod
    def after(cls, tried: Collection[int], last: ImageReadError) -> "_StorageError":
        return cls(
            f"{len(tried)} images in a row cannot be read, the last is {last.file_name} "
            f"({last.reason}); is the storage at fault?"
        )


def _takes_draw(mapper: Callable[..., dict]) -> bool:
    try:
        return "draw" in inspect.signature(mapper).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return False


class Part(NamedTuple):
    """Iterations of a training with batches of one kind."""

    iterations: int
    batch_size: int  # images of a process
    world_size: int  # processes
    grouped: bool  # by their aspect ratio

    def goes_on_with(self, other: "Part") -> bool:
        return self[1:] == other[1:]

    def draws(self, iterations: int) -> int:
        """Images of so many iterations over all processes."""
        return iterations * self.batch_size * self.world_size


class StreamSampler(Sampler):
    """The draws of one process, in the order in which they form its batches.

    Process r of W takes the draws r, r + W, r + 2 W, ... Every `batch_size` consecutive draws that
    it yields are one batch; with `aspect_ratio_grouping` all of a batch are wider than high, or
    none is, which saves padding. A draw waits until its batch is full.

    Where batches were of another kind before, the processes share the draws that are left of those
    in the same way: no image is lost or taken twice.

    Args:
        records: detectron2's dataset dicts; their `width` and `height` are used for grouping.
        batch_size: images of this process per iteration.
        seed, shuffle, repeats: as for the `TrainStream`.
        rank, world_size: this process and the number of processes.
        start_iteration: number of batches to leave out; may be set before the iteration starts, as
            `earlier`, the parts of the training in which batches were of another kind.

    Attributes:
        closing_iteration: the first one of the last part of the training; None if it has none.
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
        earlier: Sequence[Part] = (),
        shuffle: bool = True,
        repeats: np.ndarray | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = start_iteration
        self.earlier = earlier
        self.closing_iteration: int | None = None
        self.kind = Part(0, batch_size, world_size, aspect_ratio_grouping)
        self._order = EpochOrder(len(records), seed, shuffle, repeats)
        self._wide = _is_wide(records)

    def draws_before(self, iteration: int) -> int:
        """How many images all processes have taken before an iteration of the training."""
        draws = 0
        for part in self.earlier:
            draws += part.draws(min(part.iterations, iteration))
            iteration -= min(part.iterations, iteration)
        return draws + self.kind.draws(iteration)

    def __iter__(self) -> Iterator[int]:
        left, following = np.empty(0, dtype=np.int64), 0
        for part in self.earlier:
            left, following = self._left_after(part, left, following)
        skip = self.start_iteration
        waiting = _nothing_waits()
        for draws in self._draws(self.kind, self.rank, left, following):
            batches = self._batches(self.kind, draws, waiting)
            yield from batches[skip:].ravel().tolist()
            skip = max(0, skip - len(batches))

    def _draws(
        self, part: Part, rank: int, left: np.ndarray, following: int
    ) -> Iterator[np.ndarray]:
        """A process's draws of those that are `left` and of all from `following` on: in ascending
        order, an array for each epoch's end, without end."""
        start = rank  # among those of the array that comes next
        size = self._order.size
        for epoch in itertools.count(following // size):
            fresh = np.arange(max(following, epoch * size), (epoch + 1) * size)
            draws = np.concatenate([left, fresh])
            left = left[:0]
            yield draws[start :: part.world_size]
            start = (start - len(draws)) % part.world_size

    def _batches(self, part: Part, draws: np.ndarray, waiting: list[np.ndarray]) -> np.ndarray:
        """Draws (batches, batch_size) of the batches that fill up with `draws`, in that order.

        `waiting` holds the draws of each group that are left over from earlier ones; it is
        replaced by those that are left over from these.
        """
        groups = np.zeros(len(draws), dtype=bool)
        if part.grouped:
            epochs, positions = np.divmod(draws, self._order.size)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                groups[here] = self._wide[self._order.epoch(int(epoch))[positions[here]]]
        full = []
        for group in (0, 1):
            queue = np.concatenate([waiting[group], draws[groups == group]])
            whole = len(queue) // part.batch_size * part.batch_size
            full.append(queue[:whole].reshape(-1, part.batch_size))
            waiting[group] = queue[whole:]
        batches = np.concatenate(full)
        return batches[np.argsort(batches[:, -1])]  # a batch is full with its last draw

    def _left_after(self, part: Part, left: np.ndarray, following: int) -> tuple[np.ndarray, int]:
        """The draws that no process has taken at the end of a part, and the first one that none
        has seen."""
        ranks = range(part.world_size)
        streams = [self._draws(part, rank, left, following) for rank in ranks]
        waiting = [_nothing_waits() for _ in ranks]
        missing = [part.iterations for _ in ranks]
        untaken: list[np.ndarray] = []
        size = self._order.size
        while any(missing):
            for rank in ranks:
                batches = self._batches(part, next(streams[rank]), waiting[rank])
                untaken.append(batches[missing[rank] :].ravel())
                missing[rank] = max(0, missing[rank] - len(batches))
            following = (following // size + 1) * size
        untaken += [draws for groups in waiting for draws in groups]
        return (
            (np.sort(np.concatenate(untaken)), following) if part.iterations else (left, following)
        )


def _nothing_waits() -> list[np.ndarray]:
    return [np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)]


def build_train_loader(
    dataset: list[dict],
    *,
    mapper: Callable[..., dict],
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 4,
    seed: int = 0,
    shuffle: bool = True,
    repeat_threshold: float | None = None,
    closing: float = 0.0,
    max_iter: int | None = None,
    **kwargs,
) -> DataLoader:
    """detectron2's training loader over a `TrainStream`.

    Args:
        dataset: detectron2's dataset dicts.
        mapper: from a record to a model's input; see `TrainStream`.
        total_batch_size: images per iteration over all processes.
        aspect_ratio_grouping: a batch holds only wide or only high images.
        num_workers: processes that load images, for each process that trains.
        seed: of order and augmentation.
        shuffle: a new order in every epoch.
        repeat_threshold: images with classes that fewer than this share of the images have come
            more often, see :func:`repeat_factors`.
        closing: share of the training's `max_iter` iterations, at its end, for which the mapper is
            told so: it then leaves out what changes pictures most.
        max_iter: iterations of the training; needed for `closing` alone.
        **kwargs: for `build_detection_train_loader`.

    Returns:
        A loader that yields lists of mapped images without end. For resuming, see
        `set_start_iteration`.

    Raises:
        ValueError: the batch cannot be divided between the processes, there are no images, or
            `closing` is no share of a number of iterations.
    """
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            f"total_batch_size={total_batch_size} (images per iteration over all processes) must "
            f"be a positive multiple of the number of processes, {world_size}"
        )
    if not 0 <= closing <= 1:
        raise ValueError(f"closing must be a share from 0 to 1, got {closing}")
    if closing and max_iter is None:
        raise ValueError(f"closing={closing} is a share of max_iter, which is not given")
    if not closing and getattr(mapper, "closing_augmentation", None) is not None:
        logger.warning("closing_augmentation is never used: closing, its share of max_iter, is 0")
    check_shared_memory(num_workers)
    repeats = repeat_factors(dataset, repeat_threshold)
    if repeats is not None:
        logger.info(
            f"Images come {repeats.min():.2g} to {repeats.max():.2g} times in an epoch, of "
            f"{round(float(repeats.sum()))} draws from {len(dataset)} images"
        )
    stream = TrainStream(dataset, mapper, seed, shuffle, repeats)
    sampler = StreamSampler(
        dataset,
        total_batch_size // world_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        seed=seed,
        rank=comm.get_rank(),
        world_size=world_size,
        shuffle=shuffle,
        repeats=repeats,
    )
    if closing and max_iter is not None:
        sampler.closing_iteration = round((1 - closing) * max_iter)
        stream.closing_draw = sampler.draws_before(sampler.closing_iteration)
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


def check_shared_memory(num_workers: int) -> None:
    """Raises a UserError if there is no room for what data loaders' processes hand over in it."""
    folder = "/dev/shm"
    if not num_workers or not os.path.isdir(folder):
        return
    state = os.statvfs(folder)
    free, needed = state.f_bavail * state.f_frsize, num_workers * _SHARED_BY_WORKER
    if free < needed:
        raise UserError(
            f"{folder} has {free >> 10} KiB free, and {num_workers} processes that load pictures "
            f"need {needed >> 10} KiB or more: {MORE_SHARED_MEMORY}"
        )


def share(value: Any) -> Any:
    """In a loader's process, moves the tensors within a value to shared memory, here and now.

    Left to the thread that hands it over, a lack of memory would lose the value, for which the
    training then waited for ever.
    """
    if get_worker_info() is not None:
        _Sharing(io.BytesIO()).dump(value)
    return value


class _Sharing(pickle.Pickler):
    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, torch.Tensor):
            return None
        value.share_memory_()
        return "shared"


def set_start_iteration(
    loader: DataLoader, iteration: int, parts: Sequence[Part] = ()
) -> list[Part]:
    """Makes the next pass over a loader of `build_train_loader` start with batch `iteration`.

    Args:
        parts: of the training up to it; by default all batches were of the loader's kind.

    Returns:
        The parts up to it, of which the last is of the loader's kind, and goes on.
    """
    sampler = _sampler_of(loader, iteration)
    if iteration < 0:
        raise ValueError(f"iteration must be 0 or larger, got {iteration}")
    if not parts:
        parts = [sampler.kind._replace(iterations=iteration)]
    if sum(part.iterations for part in parts) != iteration:
        raise ValueError(f"the parts {parts} are not of {iteration} iterations together")
    if not parts[-1].goes_on_with(sampler.kind):
        parts = [*parts, sampler.kind]
    *sampler.earlier, last = parts
    sampler.start_iteration = last.iterations
    stream: Any = loader.dataset
    if sampler.closing_iteration is not None:
        stream.dataset.closing_draw = sampler.draws_before(sampler.closing_iteration)
    return [*sampler.earlier, last]


def _sampler_of(loader: DataLoader, iteration: int) -> StreamSampler:
    sampler = getattr(getattr(loader, "dataset", None), "sampler", None)
    if not isinstance(sampler, StreamSampler):
        raise TypeError(
            f"only a loader of build_train_loader can start at iteration {iteration}, got "
            f"{type(loader).__name__}; start it from the beginning, or build it so"
        )
    return sampler


def batches_of(loader: DataLoader, iteration: int, parts: Sequence[Part]) -> list[list[dict]]:
    """The mapped images of an iteration, a batch for each process that the training had in it.

    Args:
        loader: of `build_train_loader`.
        parts: of the training, until after the iteration; of an iteration after all of them, its
            batches will be of the last kind.

    Raises:
        TypeError: it is another loader.
        ImageReadError: ten images in a row cannot be read.
    """
    sampler = copy.copy(_sampler_of(loader, iteration))
    stream: TrainStream = cast(Any, loader.dataset).dataset
    first = 0  # iteration of the part
    earlier: list[Part] = []
    for kind in parts:
        if iteration < first + kind.iterations or kind is parts[-1]:
            break
        earlier.append(kind)
        first += kind.iterations
    sampler.earlier, sampler.kind = earlier, kind
    sampler.start_iteration = iteration - first
    if sampler.closing_iteration is not None:
        stream.closing_draw = sampler.draws_before(sampler.closing_iteration)
    batches = []
    for rank in range(kind.world_size):
        sampler.rank = rank
        batches.append([stream[draw] for draw in itertools.islice(sampler, kind.batch_size)])
    return batches


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
    return np.array([height < width for height, width in map(size_of, records)], dtype=bool)


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
