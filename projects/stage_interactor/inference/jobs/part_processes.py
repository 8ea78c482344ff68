"""A job in parts by several processes of this machine, each with a device of its own."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from ...errors import UserError, explain
from .part_writer import Done, Part, Task

DEATHS = 3  # of processes at one part; then the others are done without it
_DEATHS_IN_A_ROW = 10  # with no part done in between: then it is not the parts


class LostPartsError(UserError):
    """Parts at which processes have died again and again."""

    def __init__(self, parts: Sequence[Part], how: str):
        first = parts[0]
        more = f" and {len(parts) - 1} more parts" if len(parts) > 1 else ""
        super().__init__(
            f"part {first.number} ({len(first.pictures)} pictures, {first.pictures[0]} to "
            f"{first.pictures[-1]}){more} could not be done: {how}, {DEATHS} times. All other "
            "parts are done; the same command tries these again (a picture that is at fault may be "
            "moved away: it is then a row with an error)"
        )


def run_on_processes(
    task: Task, parts: Sequence[Part], devices: Sequence[str | None]
) -> Iterator[Done]:
    """Does the parts, in whatever order; the processes end with this one, also if it is killed.

    Args:
        devices: of the processes, such as ``["cuda:0", "cuda:1"]``.

    Raises:
        LostPartsError: after all others.
        Exception: what a process has raised, at once.
    """
    waiting, deaths, lost = deque(parts), Counter[int](), []
    how, in_a_row = "", 0
    threads = max(1, _cores() // len(devices)) if devices[0] == "cpu" else None
    workers = [_Worker(task, device, threads) for device in devices[: len(parts)]]
    try:
        while waiting or any(worker.part for worker in workers):
            for worker in workers:
                if waiting and worker.part is None:
                    worker.give(waiting.popleft())
            busy = [worker for worker in workers if worker.part]
            wait([item for worker in busy for item in (worker.pipe, worker.process.sentinel)])
            for index, worker in enumerate(workers):
                if worker.part is None:
                    continue
                if (done := worker.result()) is not None:
                    in_a_row = 0
                    yield done
                elif not worker.process.is_alive():
                    part, how = worker.part, worker.end()
                    deaths[part.number] += 1
                    in_a_row += 1
                    if in_a_row == _DEATHS_IN_A_ROW:
                        raise UserError(
                            f"{in_a_row} processes in a row have ended without a result ({how}): "
                            "fewer of them, --num-gpus, or a smaller --batch-size take less memory"
                        )
                    if deaths[part.number] < DEATHS:
                        waiting.append(part)
                    else:
                        lost.append(part)
                    workers[index] = _Worker(task, worker.device, threads)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
    if lost:
        raise LostPartsError(lost, how)


def error_of(text: str | None, trace: str) -> Exception:
    """Of another process: what a user is told of it, None for a bug, and where it comes from."""
    error: Any = UserError(text) if text else RuntimeError(trace)
    error.trace = trace
    return error


class _Worker:
    def __init__(self, task: Task, device: str | None, threads: int | None):
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.part: Part | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, task, device, threads))
        self.process.start()
        theirs.close()

    def give(self, part: Part) -> None:
        self.part = part
        try:
            self.pipe.send(part)
        except OSError:
            pass  # it has died, which is seen next

    def result(self) -> Done | None:
        """What it has made of its part, if it has ended with that."""
        try:
            if not self.pipe.poll():
                return None
            said = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return None
        if isinstance(said, Done):
            self.part = None
            return said
        raise error_of(*said)

    def end(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"its process ended with status {code}"
        hint = " (Linux does so when memory is short)" if code == -signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-code).name}{hint}"


def _work(pipe: Any, task: Task, device: str | None, threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the job's own process hears it

    def end_with_job() -> None:
        job = multiprocessing.parent_process()
        assert job is not None
        wait([job.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_job, daemon=True).start()
    try:
        if threads:
            torch.set_num_threads(threads)
        write = None
        while True:
            part = pipe.recv()
            write = write or task.load(device)
            pipe.send(write(part))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        pipe.send((explain(error), "".join(traceback.format_exception(error))))


def _cores() -> int:
    return len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
