"""A job in parts on a Ray cluster, or on a Ray of this machine, by Ray Data."""

import logging
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...errors import UserError, explain
from .part_processes import DEATHS, LostPartsError, error_of
from .part_writer import Done, Part, Task


def import_ray() -> Any:
    """
    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            f"--ray needs Ray Data ({error}): pip install 'stage-interactor[ray]'"
        ) from error
    return ray


def run_on_ray(
    task: Task, parts: Sequence[Part], address: str, actors: int | None, device: str | None
) -> Iterator[Done]:
    """Does the parts, in whatever order; a part is a task of an actor, which keeps its detector.

    What an actor or a machine that dies had in hand is done by another one.

    Args:
        address: ``"local"``, ``"auto"``, or that of a cluster. A Ray that this process is
            connected to already is used.
        actors: with a GPU each, or a CPU where the cluster has none or the device is ``"cpu"``;
            None takes what the cluster has.

    Raises:
        LostPartsError: after all others.
        UserError: what an actor has raised, at once.
        ConnectionError: there is no cluster.
    """
    ray = import_ray()
    with _connected(ray, address), _quiet(ray.data.DataContext.get_current()):
        on_gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        resources = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
        size = {"size": min(actors, len(parts))} if actors else {"min_size": 1}
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
        # A block a part: what is tried again is one part, and no actor holds two of them.
        items = [{"number": part.number, "pictures": part.pictures} for part in parts]
        rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _Actor,
            fn_constructor_args=(task, device if on_gpu else "cpu", attempts),
            compute=ray.data.ActorPoolStrategy(**size, max_tasks_in_flight_per_actor=1),
            **resources,
        )
        by_number = {part.number: part for part in parts}
        lost = []
        try:
            for row in rows.iter_rows():
                if row["lost"]:
                    lost.append(by_number[row["number"]])
                elif row["trace"]:
                    raise error_of(row["told"], row["trace"])
                else:
                    unreadable = [str(told) for told in row["unreadable"]]
                    yield Done(row["number"], row["num_pictures"], row["num_objects"], unreadable)
        except ray.exceptions.RayError as error:
            told = str(error).strip().splitlines()[-1]
            raise UserError(
                f"Ray could not go on ({type(error).__name__}: {told}): are its machines there, "
                "all with this version of stage-interactor?"
            ) from error
    if lost:
        raise LostPartsError(lost, "the actor of Ray that had it died")


class _Attempts:
    """How often each part was begun: Ray Data tries again without an end."""

    def __init__(self) -> None:
        self._begun = Counter[int]()

    def begin(self, part: int) -> int:
        self._begun[part] += 1
        return self._begun[part]


class _Actor:
    """Errors are rows: as exceptions Ray Data would tell them with the traces of all its parts."""

    def __init__(self, task: Task, device: str | None, attempts: Any):
        self._task, self._device, self._attempts = task, device, attempts
        self._write: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = Part(int(row["number"]), [str(name) for name in row["pictures"]])
        done, told, trace = Done(part.number, 0, 0, []), "", ""
        lost = import_ray().get(self._attempts.begin.remote(part.number)) > DEATHS
        try:
            if not lost:
                # Not before: what fails in an actor's start is tried again without an end.
                self._write = self._write or self._task.load(self._device)
                done = self._write(part)
        except Exception as error:
            told, trace = explain(error) or "", "".join(traceback.format_exception(error))
        return {**done._asdict(), "lost": lost, "told": told, "trace": trace}


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    here = {"include_dashboard": False} if address == "local" else {}
    # Nothing is sent to anybody, and what Ray says of its own affairs is in its logs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, logging_level="error", log_to_driver=False, **here)
    if in_main_thread:
        signal.signal(signal.SIGTERM, handler)  # Ray takes it, and ends with another status
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet(context: Any) -> Iterator[None]:
    """One bar is enough."""
    logger = logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])
