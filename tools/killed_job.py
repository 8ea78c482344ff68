#!/usr/bin/env python
"""Kills a `predict` job in parts again and again, goes on with it, and counts its rows.

python tools/killed_job.py --checkpoint output/quickstart/model_final.pth PICTURES --ray local
python tools/killed_job.py --checkpoint ... PICTURES --num-gpus 2 --kills 5 --part-size 64

The kills (SIGKILL, to the process that was started alone) come at even shares of the parts. It ends
with status 1 unless every picture is there once.
"""

import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
import time

from stage_interactor.errors import call
from stage_interactor.inference.jobs.addresses import find_pictures


def run(command: list[str], parts: str, until: int) -> float:
    """Seconds of a run, which is killed as soon as there are so many parts."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            if len(glob.glob(parts)) >= until:
                process.kill()
            time.sleep(0.05)
    finally:
        process.kill()
    if process.returncode not in (0, 1, -9):
        raise ValueError(f"the job ended with status {process.returncode}")
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", help="folder")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--part-size", type=int, default=100)
    parser.add_argument("--ray", metavar="ADDRESS")
    parser.add_argument("--num-gpus", type=int, default=2, help="processes, or actors of Ray")
    parser.add_argument("--device")
    args = parser.parse_args()
    pictures, _ = find_pictures([args.pictures])
    num_parts = -(-len(pictures) // args.part_size)
    if not 0 <= args.kills < num_parts:
        raise ValueError(f"{num_parts} parts can be killed at {num_parts - 1} times at most")
    with tempfile.TemporaryDirectory() as output_dir:
        command = [sys.executable, "-m", "stage_interactor.commands", "predict", args.pictures]
        command += ["--checkpoint", args.checkpoint, "--output-dir", f"{output_dir}/job"]
        command += ["--num-gpus", str(args.num_gpus), "--part-size", str(args.part_size)]
        command += ["--device", args.device] if args.device else []
        command += ["--ray", args.ray] if args.ray else []
        parts = f"{output_dir}/job/parts/*.jsonl"
        for kill in range(args.kills + 1):
            until = num_parts * (kill + 1) // (args.kills + 1)
            seconds = run(command, parts, until if kill < args.kills else num_parts + 1)
            found = len(glob.glob(parts))
            print(f"run {kill + 1}: {seconds:.1f} s, then {found} of {num_parts} parts", flush=True)
        files = []
        for part in sorted(glob.glob(parts)):
            with open(part) as lines:
                files += [json.loads(line)["file"] for line in lines]
        once = sorted(files) == sorted(pictures)
        print(f"{len(files)} rows of {len(set(files))} pictures; each of {len(pictures)} once: "
              f"{'yes' if once else 'NO'}")  # fmt: skip
    return 0 if once else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(call("killed_job", main, mistake=1))
