"""Ends of training runs by signals, at random: who gets which, when, and what has to hold then."""

import os
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
TARGETS = ("launcher", "group", "worker")
MOMENTS = ("any time", "training", "evaluation", "saving")


class Ending(NamedTuple):
    """Of a run: the signals, with the seconds after which each comes, and who gets them."""

    processes: int
    loaders: int
    target: str
    signals: tuple[tuple[str, float], ...]
    moment: str
    delay: float  # seconds after the moment

    @classmethod
    def drawn(cls, rng: random.Random) -> "Ending":
        processes = rng.choice((1, 1, 2))
        moment = rng.choice(MOMENTS)
        return cls(
            processes,
            rng.choice((0, 2)),
            rng.choice(TARGETS if processes > 1 else TARGETS[:2]),
            tuple(
                (rng.choice((*SIGNALS, "SIGKILL") if not number else SIGNALS), gap)
                for number, gap in enumerate([0.0, *rng.choice(([], [0.005], [0.3], [0.0, 0.1]))])
            ),
            moment,
            rng.uniform(1, 12) if moment == "any time" else rng.choice((0, rng.uniform(0, 0.3))),
        )

    def has_come(self, folder: Path, log: str) -> bool:
        if self.moment == "training":
            path = folder / "metrics.json"
            return path.exists() and path.stat().st_size > 500
        if self.moment == "evaluation":
            return "Start inference" in log
        if self.moment == "saving":
            return bool(list(folder.glob("*.pth.tmp"))) or "Saving checkpoint" in log
        return True

    def strike(self, launcher: int, rng: random.Random) -> None:
        """Sends the signals, as far as there is anybody left."""
        for name, gap in self.signals:
            time.sleep(gap)
            number = getattr(signal, name)
            try:
                if self.target == "group":
                    os.killpg(launcher, number)
                elif self.target == "worker" and (workers := workers_of(launcher)):
                    os.kill(rng.choice(workers), number)
                else:
                    os.kill(launcher, number)
            except ProcessLookupError:
                pass


def processes_of(session: int) -> dict[int, tuple[int, str]]:
    """Of a session: parents and command lines by number; without those that are dead."""
    every = processes().items()
    return {pid: (parent, what) for pid, (parent, of, what) in every if of == session}


def processes() -> dict[int, tuple[int, int, str]]:
    """Of the machine: parents, sessions, command lines by number; without those that are dead."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_text()
        except OSError:
            continue
        if fields[0] not in "ZX":
            found[int(path.name)] = int(fields[1]), int(fields[3]), command
    return found


def workers_of(launcher: int) -> list[int]:
    found = processes_of(launcher).items()
    return sorted(
        pid for pid, (parent, what) in found if parent == launcher and "spawn_main" in what
    )
