#!/usr/bin/env python
"""Rounds of everything that breaks runs, each with a new seed, and one process that must not grow.

python tools/soak.py --hours 1
python tools/soak.py --rounds 1 --seed 7 --cases 200

A round runs tests/reliability and the killed runs with SEED and CASES set; with --hours, what else
`make test` leaves out runs once before the first. Beside them one process trains, evaluates and
predicts for as long as all rounds take: its memory, open files and threads are shown after each
round. Of a round that fails the log stays in output/soak, and the command that repeats it is told
at the end.
"""

import argparse
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
TESTS = ("tests/reliability", "tests/engine/test_killed_runs.py")
ONCE = ("tests", *(f"--ignore={name}" for name in TESTS))  # nothing is drawn there
SMALL = (
    "shapes.num_train=24",
    "shapes.num_val=6",
    "shapes.image_size=64",
    "dataloader.train.total_batch_size=4",
    "dataloader.test.batch_size=2",
    "model.queries.num_queries=8",
    "train.max_iter=20",
    "train.eval_period=10",
    "train.checkpointer.period=10",
    "train.pictures.num_images=1",
)


HELD = ("MiB", "files", "threads")  # what a process must not hold more and more of


def resident(folder: str) -> None:
    """Trains and predicts once for each line that it is sent; answers with what it holds."""
    import torch

    import stage_interactor

    torch.set_num_threads(1)
    chance = np.random.default_rng(0)
    for _ in sys.stdin:
        shutil.rmtree(f"{folder}/run", ignore_errors=True)
        run = stage_interactor.train(
            "quickstart.py", [*SMALL, f"shapes.root={folder}/shapes"], output_dir=f"{folder}/run"
        )
        detector = stage_interactor.Detector.from_checkpoint(str(run.checkpoint), device="cpu")
        for _ in range(50):
            height, width = chance.integers(40, 120, 2)
            picture = chance.integers(0, 255, (height, width, 3), dtype=np.uint8)
            detector([picture, picture[:32]], threshold=0.0)
        del detector
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held = {
            "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }
        print(f"held {json.dumps(held)}", flush=True)


def held_after_a_round(process: subprocess.Popen) -> dict:
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("held "):
            return json.loads(line.removeprefix("held "))
    raise SystemExit(f"soak.py: the process that stays ended with {process.wait()}")


def run_tests(which: str, tests: Sequence[str], log: Path, **settings) -> tuple[int, str, float]:
    """Runs those of ``tests`` whose marks are ``which``, with ``settings`` in the environment.

    Exit status and last line of the tests, and the most memory that one of them took, in GiB.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in settings.items() if value is not None}
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, *tests]
    with open(log, "w") as file:
        before = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - before
    last = (log.read_text().strip() or "no output").splitlines()[-1]
    told = last.strip("= ") if " in " in last else f"{last} ({seconds:.0f} s)"
    return os.waitstatus_to_exitcode(status), told, used.ru_maxrss / 2**20


def run_round(seed: int, cases: int | None, log: Path) -> tuple[int, str, float]:
    return run_tests("soak or not soak", TESTS, log, SEED=seed, CASES=cases)


def kept(log: Path, name: str) -> Path:
    """Where a copy of the log of tests that failed stays."""
    path = ROOT / "output" / "soak" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(log, path))


def slope(values: list[float]) -> float:
    """Of a line through the values, a round, but for the first, which loads what stays."""
    later = values[1:]
    return float(np.polyfit(range(len(later)), later, 1)[0]) if len(later) > 1 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, help="no round begins after that")
    parser.add_argument("--rounds", type=int, help="how many (as many as the hours allow, or 1)")
    parser.add_argument("--seed", type=int, help="of the first round (drawn)")
    parser.add_argument("--cases", type=int, help="random inputs of a test (its own number)")
    parser.add_argument("--resident", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        resident(args.resident)
        return 0
    rounds = args.rounds or (10**9 if args.hours else 1)
    chance = random.Random(args.seed)
    end = time.monotonic() + 3600 * args.hours if args.hours else float("inf")
    history: list[dict] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "projects"), "OMP_NUM_THREADS": "1"}
        staying = subprocess.Popen(
            [sys.executable, __file__, "--resident", folder],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(
            f"{'seed':>10}  {'MiB':>6}  {'files':>5}  {'threads':>7}  {'GiB of tests':>12}  tests"
        )
        log = Path(folder, "tests.txt")
        if args.hours:
            status, told, most = run_tests("soak", ONCE, log)
            print(f"{'once':>10}  {'':>6}  {'':>5}  {'':>7}  {most:>12.1f}  {told}", flush=True)
            if status:
                failed.append(f"python -m pytest -m soak {' '.join(ONCE)}  # {kept(log, 'once')}")
        for number in range(rounds):
            if time.monotonic() > end:
                break
            seed = args.seed if number == 0 and args.seed is not None else chance.randrange(10**9)
            status, told, most = run_round(seed, args.cases, log)
            held = held_after_a_round(staying)
            history.append(held)
            print(
                f"{seed:>10}  {held['MiB']:>6.0f}  {held['files']:>5}  {held['threads']:>7}  "
                f"{most:>12.1f}  {told}",
                flush=True,
            )
            if status:
                cases = "" if args.cases is None else f" --cases {args.cases}"
                again = f"python tools/soak.py --rounds 1 --seed {seed}{cases}"
                failed.append(f"{again}  # {kept(log, str(seed))}")
        staying.kill()
        staying.wait()
    growth = {name: slope([held[name] for held in history]) for name in HELD}
    told = ", ".join(f"{value:+.2f} {name}" for name, value in growth.items())
    print(f"{len(history)} rounds; the process that stays grows by {told} a round")
    if failed:
        print("failed:", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
