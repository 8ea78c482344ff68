"""Stands in for ``detectron2.data.samplers`` and ``detectron2.data.common``.

Left out: samplers that weight or repeat images or keep their order, streams, datasets that are not
copied, mappers that can only be pickled by cloudpickle.
"""

import itertools
import logging
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils import data
from torch.utils.data import Sampler

from . import comm

logger = logging.getLogger(__name__)


class TrainingSampler(Sampler):
    """An infinite stream of shuffled epochs, of which each process takes every N-th index.

    Args:
        size: number of images.
        seed: the same in all processes; None draws one and shares it.

    Raises:
        ValueError: if ``size`` is not a positive integer.
    """

    def __init__(self, size: int, seed: int | None = None):
        if not isinstance(size, int) or size <= 0:
            raise ValueError(f"TrainingSampler got size={size!r}; the data set must have images.")
        self._size = size
        self._seed = comm.all_gather(np.random.randint(2**31))[0] if seed is None else seed
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._infinite_indices(), self._rank, None, self._world_size)

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        while True:
            yield from torch.randperm(self._size, generator=generator).tolist()


class InferenceSampler(Sampler):
    """Every index once, in contiguous shares that differ by at most one between processes."""

    def __init__(self, size: int):
        if size <= 0:
            raise ValueError(f"InferenceSampler got size={size}; the data set must have images.")
        world_size, rank = comm.get_world_size(), comm.get_rank()
        share, left = divmod(size, world_size)
        begin = rank * share + min(rank, left)
        self._local_indices = range(begin, begin + share + (rank < left))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)


class DatasetFromList(data.Dataset):
    """Records of a list, pickled into one buffer that worker processes share without copying.

    Each access makes a new object, so a mapper may change it.
    """

    def __init__(self, records: list):
        pickled = [np.frombuffer(pickle.dumps(r, protocol=-1), dtype=np.uint8) for r in records]
        self._ends = torch.from_numpy(np.cumsum([len(p) for p in pickled], dtype=np.int64))
        self._buffer = torch.from_numpy(np.concatenate(pickled) if pickled else np.empty(0, "u1"))
        logger.info(
            "Serialized %d records into %.2f MiB", len(records), len(self._buffer) / 1024**2
        )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = 0 if index == 0 else self._ends[index - 1].item()
        return pickle.loads(self._buffer[start : self._ends[index].item()].numpy().data)


class SizedDataset(Protocol):
    """Records by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class MapDataset(data.Dataset):
    """Apply a mapper to each record; where it returns None, try another record at random."""

    def __init__(self, dataset: SizedDataset, mapper: Callable[[Any], Any]):
        self._dataset = dataset
        self._mapper = mapper
        self._random = random.Random(42)
        self._candidates = set(range(len(dataset)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        current, retries = int(index), 0
        while True:
            mapped = self._mapper(self._dataset[current])
            if mapped is not None:
                self._candidates.add(current)
                return mapped
            retries += 1
            self._candidates.discard(current)
            if not self._candidates:
                raise RuntimeError("The mapper returned None for every record of the data set.")
            current = self._random.sample(list(self._candidates), k=1)[0]
            if retries >= 3:
                logger.warning("The mapper returned None %d times for record %d.", retries, index)


class ToIterableDataset(data.IterableDataset):
    """The stream that a sampler takes from a data set, inside the worker processes.

    Worker ``w`` of ``n`` takes the chunks ``w``, ``w + n``, ... With chunks of one batch, the
    loader, which asks its workers in turn, returns the batches that one process would make.
    """

    def __init__(self, dataset: data.Dataset, sampler: Sampler, shard_chunk_size: int):
        self.dataset = dataset
        self.sampler = sampler
        self.shard_chunk_size = shard_chunk_size

    def __iter__(self) -> Iterator[Any]:
        worker = data.get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for position, index in enumerate(self.sampler):
            if position // self.shard_chunk_size % workers == own:
                yield self.dataset[index]


class AspectRatioGroupedDataset(data.IterableDataset):
    """Batches of only wide or only high images, which need less padding.

    Args:
        dataset: a stream of dicts with ``width`` and ``height``.
    """

    def __init__(self, dataset: Iterable[dict], batch_size: int):
        self.dataset = dataset
        self.batch_size = batch_size
        self._waiting: dict[bool, list[dict]] = {True: [], False: []}  # by: is it wider than high

    def __iter__(self) -> Iterator[list[dict]]:
        for record in self.dataset:
            bucket = self._waiting[record["width"] > record["height"]]
            bucket.append(record)
            if len(bucket) == self.batch_size:
                batch = bucket.copy()
                bucket.clear()  # before the yield: nothing after it is certain to run
                yield batch
