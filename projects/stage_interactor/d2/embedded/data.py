"""Stands in for ``detectron2.data`` (``build``).

Left out: loaders from yacs configs, streams of records, ``collate_fn`` and ``drop_last``, samplers
for tests, proposals, keypoint filters, ``single_gpu_batch_size``.
"""

import itertools
import logging
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import data as torchdata

from . import comm, detection_utils
from .catalog import DatasetCatalog, MetadataCatalog
from .coco import register_coco_instances
from .env import seed_all_rng
from .logger import create_wide_table
from .samplers import (
    AspectRatioGroupedDataset,
    DatasetFromList,
    InferenceSampler,
    MapDataset,
    ToIterableDataset,
    TrainingSampler,
)

__all__ = [
    "DatasetCatalog",
    "MetadataCatalog",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "detection_utils",
    "get_detection_dataset_dicts",
    "register_coco_instances",
]

logger = logging.getLogger(__name__)


def get_detection_dataset_dicts(
    names: str | Sequence[str], filter_empty: bool = True
) -> list[dict]:
    """Load and join registered data sets, and log how often each class occurs.

    Args:
        filter_empty: leave out images that have no object or only crowds.

    Returns:
        The records.

    Raises:
        ValueError: if there is no name, a data set or the result is empty, or classes differ.
        KeyError: if a name is not registered.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("No data set was named.")
    loaded = [DatasetCatalog.get(name) for name in names]
    for name, records in zip(names, loaded):
        if not records:
            raise ValueError(f"Dataset {name!r} is empty.")

    records = list(itertools.chain.from_iterable(loaded))
    has_annotations = "annotations" in records[0]
    if filter_empty and has_annotations:
        usable = [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]
        logger.info(
            "Removed %d images without usable annotations, %d are left.",
            len(records) - len(usable),
            len(usable),
        )
        records = usable
    if not records:
        raise ValueError(f"The data sets {names} have no image with a usable annotation.")

    classes = [MetadataCatalog.get(name).get("thing_classes") for name in names]
    if has_annotations and classes[0] is not None:
        if any(other != classes[0] for other in classes):
            raise ValueError(f"The data sets {names} have different thing_classes: {classes}")
        _log_class_histogram(records, classes[0])
    return records


def _log_class_histogram(records: list[dict], class_names: list[str]) -> None:
    annotations = itertools.chain.from_iterable(record["annotations"] for record in records)
    counts = Counter(int(a["category_id"]) for a in annotations if not a.get("iscrowd", 0))
    unknown = [index for index in counts if not 0 <= index < len(class_names)]
    if unknown:
        raise ValueError(
            f"Annotations have the class indices {unknown}, but there are {len(class_names)} "
            "classes."
        )
    rows = [(name, counts[index]) for index, name in enumerate(class_names)]
    rows.append(("total", counts.total()))
    table = create_wide_table(rows, ["category", "instances"])
    logger.info("Instances of each category:\n%s", table)


def build_detection_train_loader(
    dataset: list[dict] | torchdata.Dataset,
    *,
    mapper: Callable[[dict], Any] | None,
    sampler: torchdata.Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    seed: int | None = None,
    **kwargs: Any,
) -> torchdata.DataLoader | Any:
    """Build the endless loader of a training.

    Args:
        dataset: a list of records, or a torch Dataset.
        mapper: makes a model's input from a record, or returns None to skip it; None uses the
            records as they are.
        sampler: of indices; None is a shuffle that all processes share.
        total_batch_size: images per iteration over all processes.
        aspect_ratio_grouping: batch only wide or only high images; the mapper's results then need
            ``width`` and ``height``.
        num_workers: processes that load, per training process.
        seed: of the workers; None takes it from torch's global generator.
        **kwargs: for torch's DataLoader.

    Returns:
        An iterable of batches, lists of ``total_batch_size / processes`` images: a DataLoader, or
        with ``aspect_ratio_grouping`` what groups the images of one. With a finite sampler an
        incomplete last batch is left out.

    Raises:
        ValueError: if the batch cannot be divided.
    """
    mapped = _mapped(dataset, mapper)
    world_size = comm.get_world_size()
    if total_batch_size <= 0 or total_batch_size % world_size:
        raise ValueError(
            f"total_batch_size={total_batch_size} must be a positive multiple of the number of "
            f"processes, {world_size}."
        )
    batch_size = total_batch_size // world_size
    logger.info("Each process loads batches of %d images", batch_size)
    sampler = TrainingSampler(len(mapped)) if sampler is None else sampler
    stream = ToIterableDataset(mapped, sampler, shard_chunk_size=batch_size)
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "worker_init_fn": _seed_worker,
        "generator": None if seed is None else torch.Generator().manual_seed(seed),
    } | kwargs
    if aspect_ratio_grouping:
        images = torchdata.DataLoader(stream, collate_fn=operator.itemgetter(0), **options)
        return AspectRatioGroupedDataset(images, batch_size)
    return torchdata.DataLoader(
        stream, batch_size=batch_size, drop_last=True, collate_fn=_keep_list, **options
    )


def build_detection_test_loader(
    dataset: list[dict] | torchdata.Dataset,
    *,
    mapper: Callable[[dict], Any] | None,
    batch_size: int = 1,
    num_workers: int = 0,
) -> torchdata.DataLoader:
    """Build a loader that goes through a data set once, shared between the processes.

    Args:
        batch_size: images per batch of each process; the last batch may be smaller.
        Others: as for :func:`build_detection_train_loader`.
    """
    mapped = _mapped(dataset, mapper)
    return torchdata.DataLoader(
        mapped,
        batch_size=batch_size,
        sampler=InferenceSampler(len(mapped)),
        num_workers=num_workers,
        collate_fn=_keep_list,
    )


def _mapped(dataset: Any, mapper: Callable[[dict], Any] | None) -> Any:
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset)
    return dataset if mapper is None else MapDataset(dataset, mapper)


def _keep_list(batch: list) -> list:
    return batch


def _seed_worker(worker_id: int) -> None:
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
