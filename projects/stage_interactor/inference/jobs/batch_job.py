"""Predicting in parts: by several processes or a Ray cluster, and again after whatever ends it."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ...untrusted.files import digest_of
from ...untrusted.pictures import max_pixels
from ..detector import Detector
from ..prepare import AUTO, DTYPES
from ..selection import Selection, Threshold
from ..tiles import tiling_of
from ..values import whole
from .addresses import find_pictures, is_remote
from .part_files import FORMATS, PARTS, Manifest, Store, import_parquet
from .part_processes import run_on_processes
from .part_writer import Done, Part, PartWriter, Task, read_done

logger = logging.getLogger(__name__)

PART_SIZE = 256  # pictures
_MOST_PLACES = 100  # that are kept as they are, for who reads the manifest


@dataclass
class BatchResults:
    """What a job in parts has come to.

    Attributes:
        folder: of the parts, which what reads JSON lines or Parquet takes as one table.
        num_pictures: of all parts, each once, also those that could not be read.
        num_objects: in them.
        unreadable: what is wrong with those that have a row with an ``error`` and no objects.
        num_resumed: pictures that earlier calls have done.
        passed_over: how many files of folders are no pictures, by suffix, "" for none.
    """

    folder: str
    num_pictures: int = 0
    num_objects: int = 0
    unreadable: list[str] = field(default_factory=list)
    num_resumed: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)

    def add(self, done: Done) -> None:
        self.num_pictures += done.num_pictures
        self.num_objects += done.num_objects
        self.unreadable += done.unreadable


def batch_predict(
    checkpoint: str | os.PathLike,
    places: Iterable[str | os.PathLike] | str | os.PathLike,
    *,
    output_dir: str | os.PathLike,
    output_format: str = "jsonl",
    part_size: int = PART_SIZE,
    num_gpus: int | None = None,
    ray: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    config_file: str | None = None,
    averaged: bool | None = None,
    trusted: bool = False,
    threshold: Threshold = None,
    batch_size: int = 1,
    tiles: int | None = None,
    overlap: float | None = None,
    progress: bool = True,
    **options: Any,
) -> BatchResults:
    """Finds objects in any number of pictures, part by part, each picture once.

    The list of pictures is cut into parts. A part is a file, which is there as a whole or not at
    all; a call that is ended, however that is, is gone on with by the same call, which does the
    parts that are not there. The list is that of the first call: what is gone by then is a row with
    an ``error``, and what is new is left out, and told.

    A row is a picture: ``file`` (a path from the root on, or an address), ``width``, ``height``,
    ``boxes`` (xyxy in pixels), ``scores``, ``classes`` (indices from 0), ``names``, and ``error``,
    null where the picture could be read. Numbers are rounded as in predictions.json.

    Args:
        checkpoint: see :meth:`Detector.from_checkpoint`, as for ``config_file``, ``averaged``,
            ``dtype``, ``trusted``.
        places: pictures, folders and globs, here or at addresses that fsspec reads, such as
            ``s3://bucket/folder``; or several of these.
        output_dir: a folder of its own, or an address. The parts are in ``parts/`` there.
        output_format: ``"jsonl"``, or ``"parquet"``, which needs pyarrow.
        part_size: pictures of a part.
        num_gpus: processes, each with a GPU, or where there is none with a share of the CPU. One by
            default; with ``ray`` the number of actors, as many as the cluster has room for by
            default. A script that asks for several needs ``if __name__ == "__main__":``.
        ray: None, or where Ray runs: ``"local"`` starts it on this machine, ``"auto"`` or an
            address joins a cluster, all of whose machines see the same files.
        device: of one process; ``"cpu"`` of several.
        threshold, batch_size, tiles, overlap, progress, options: see
            :func:`stage_interactor.inference.predict.predict_files`.

    Raises:
        FileNotFoundError: there is no such file, or no picture in a folder.
        ValueError: a value is out of its range, or a video is named.
        OtherJobError: ``output_dir`` holds something else than this job.
        FolderInUseError: another process is at this job.
        UserError: a place that pictures lie at does not answer, for many in a row.
        LostPartsError: parts at which processes died again and again; all others are done.
        ImportError: Ray or pyarrow is not installed.
    """
    part_size = whole(part_size, "part_size (--part-size)")
    batch_size = whole(batch_size, "batch_size (--batch-size)")
    if num_gpus is not None:
        num_gpus = whole(num_gpus, "num_gpus (--num-gpus)")
    if output_format not in FORMATS:
        raise ValueError(f"output_format must be one of {', '.join(FORMATS)}, got {output_format}")
    if dtype not in (*DTYPES, AUTO):
        raise ValueError(f"dtype must be one of {', '.join((*DTYPES, AUTO))}, got {dtype}")
    if output_format == "parquet":
        import_parquet()
    devices = _devices(num_gpus, ray, device)
    if ray is not None:
        from .part_ray import import_ray, run_on_ray

        import_ray()
    if isinstance(places, (str, os.PathLike)):
        places = [places]
    asked = [os.fspath(place) for place in places]
    loading: dict[str, Any] = {
        "path": os.path.abspath(checkpoint),
        "config_file": config_file,
        "averaged": averaged,
        "dtype": dtype,
        "trusted": trusted,
    }
    digest = digest_of(checkpoint)
    alone = ray is None and len(devices) == 1
    # Of several processes this one looks at the values alone, and leaves GPUs to the others.
    loaded = loading if alone else loading | {"dtype": "float32"}
    detector = Detector.from_checkpoint(**loaded, device=devices[0] if alone else "cpu")
    select = detector.select(threshold, **options)
    tiling = tiling_of(tiles, overlap, batch_size)
    settings = {
        "places": _absolute(asked),
        "checkpoint": digest,
        "config_file": config_file and _digest_of_config(config_file),
        "averaged": averaged,
        "dtype": dtype,
        **_selected(select),
        "tiles": tiling and tiling.side,
        "overlap": tiling and tiling.overlap,
        "max_pixels": max_pixels(0),
    }
    pictures, passed_over = find_pictures(asked)
    store = Store(output_dir)
    results = BatchResults(store.path(PARTS), passed_over=passed_over)
    with store.locked():
        manifest, listed = Manifest.begin(store, settings, pictures, part_size, output_format)
        _tell_of_changes(listed, pictures)
        store.remove_leftovers()
        parts = []
        names = store.names(PARTS)
        for number in range(manifest.num_parts):
            if os.path.basename(manifest.name(number)) in names:
                results.add(read_done(store, manifest, number))
            else:
                parts.append(Part(number, listed[manifest.slice(number)]))
        results.num_resumed = results.num_pictures
        limit = max_pixels(0) or None
        task = Task(store, manifest, loading, digest, select, tiling, batch_size, limit)
        if not parts:
            done: Iterator[Done] = iter(())
        elif ray is not None:
            done = run_on_ray(task, parts, ray, num_gpus, device)
        elif alone:
            done = map(PartWriter(task, detector), parts)
        else:
            done = run_on_processes(task, parts, devices)
        if not alone:
            del detector
        _follow(done, results, len(listed), progress)
        written = store.names(PARTS)
        for number in range(manifest.num_parts):
            if os.path.basename(manifest.name(number)) not in written:
                raise FileNotFoundError(
                    f"{store.path(manifest.name(number))} was written, and is not there: all "
                    "machines must see the same --output-dir"
                )
    return results


def _follow(done: Iterator[Done], results: BatchResults, total: int, progress: bool) -> None:
    hidden = not progress
    start = results.num_resumed
    try:
        with tqdm(total=total, initial=start, unit="image", disable=hidden) as progress_bar:
            for part in done:
                results.add(part)
                progress_bar.update(part.num_pictures)
    except BaseException:
        logger.warning(
            f"{results.num_pictures} of {total} pictures are done; the same command goes on from "
            "there"
        )
        raise
    finally:
        if hasattr(done, "close"):
            done.close()  # its processes end now, not when the last reference to it is gone


def _devices(num_gpus: int | None, ray: str | None, device: str | None) -> list[str | None]:
    """Of the processes; without Ray."""
    if device not in (None, "cpu", "cuda") and ((num_gpus or 1) > 1 or ray is not None):
        raise ValueError(
            f"device (--device) {device}: several processes have a GPU each, or the CPU "
            "(--device cpu)"
        )
    if ray is not None or (num_gpus or 1) == 1:
        return [device]
    assert num_gpus is not None
    if device == "cpu" or not torch.cuda.is_available():
        return ["cpu"] * num_gpus
    gpus = torch.cuda.device_count()
    if num_gpus > gpus:
        raise ValueError(f"{num_gpus} processes were asked for, but there are only {gpus} GPUs. "
                         "Lower --num-gpus.")  # fmt: skip
    return [f"cuda:{number}" for number in range(num_gpus)]


def _digest_of_config(file: str) -> str:
    """Of a file; the name of one of this package's says it."""
    return digest_of(file) if os.path.isfile(file) else file


def _absolute(places: Sequence[str]) -> list[str] | str:
    """What the pictures were asked for by, whatever folder that was in; of many a digest."""
    absolute = [place if is_remote(place) else os.path.abspath(place) for place in places]
    if len(absolute) <= _MOST_PLACES:
        return absolute
    return hashlib.sha256(json.dumps(absolute).encode()).hexdigest()


def _selected(select: Selection) -> dict[str, Any]:
    return {
        "threshold": [float(score) for score in select.thresholds],
        "multi_label": select.multi_label,
        "nms": select.nms,
        "agnostic": select.agnostic,
        "classes": None if select.classes is None else sorted(int(c) for c in select.classes),
        "max_detections": select.max_detections,
    }


def _tell_of_changes(listed: Sequence[str], found: Sequence[str]) -> None:
    if listed == found:
        return
    before, now = set(listed), set(found)
    if new := [name for name in found if name not in before]:
        logger.warning(
            f"{len(new)} pictures are new since the job began, such as {new[0]}: they are not in "
            "its list, and another --output-dir takes them"
        )
    if gone := [name for name in listed if name not in now]:
        logger.warning(
            f"{len(gone)} pictures are gone since the job began, such as {gone[0]}: what is not "
            "done yet of them becomes a row with an error"
        )
