#!/usr/bin/env python
"""Submits a training to SLURM, which goes on by itself when its time is up or it is preempted.

python tools/slurm.py --config-file configs/stage_interactor_r50_100q_12ep.py --num-gpus 8 \\
    --partition gpu --time 24:00:00 --cpus-per-task 64 --mem-gb 200 [key=value ...]
python tools/slurm.py --config-file ... --num-gpus 8 --num-machines 4 --partition gpu --time 1440
python tools/slurm.py --config-file configs/quickstart.py --cluster local   # without SLURM

A task a node starts train_net.py there. Two minutes before the end (--signal-delay) SLURM sends
SIGUSR2: the run saves after its iteration, and the job is queued again under its number, at most
--max-requeues times. A job that is preempted earlier, with SIGTERM, does the same. What it left is
gone on with by train.resume's own rule for such jobs. Needs submitit (pip install -e '.[slurm]');
outputs of the tasks are in --job-dir, which all nodes see.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_interactor.config import find_config, load_config, require_sections
from stage_interactor.errors import UserError, call

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"
_FIRST_PORT, _PORTS = 20_000, 10_000  # by the number of the job: two of one node must not meet
_PATIENCE = 600.0  # seconds, for the first node to have the job queued again
STOPPED = 128 + signal.SIGTERM


class Launch:
    """What submitit calls on every node: train_net.py in a process of its own, which saves and
    leaves on SIGTERM, while this one hears SLURM.

    Args:
        arguments: of train_net.py, but those that say which machine this is.
        restarts: how often the job was queued again.
    """

    def __init__(self, arguments: Sequence[str], restarts: int = 0):
        self.arguments = list(arguments)
        self.restarts = restarts
        self._pid: int | None = None

    def __call__(self) -> int:
        import submitit

        job = submitit.JobEnvironment()
        command = [sys.executable, str(TRAIN_NET), *self.arguments]
        if job.num_nodes > 1:
            command += ["--num-machines", str(job.num_nodes), "--machine-rank", str(job.node)]
        host = job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1"
        port = _FIRST_PORT + int(re.sub(r"\D", "", job.job_id)) % _PORTS
        command += ["--dist-url", f"tcp://{host}:{port}"]
        # By these a run knows its own work, and goes on with no other's.
        count = max(self.restarts, int(os.environ.get("SLURM_RESTART_COUNT") or 0))
        names = {"SLURM_JOB_ID": job.job_id, "SLURM_RESTART_COUNT": str(count)}
        time_is_up = getattr(signal, f"SIG{job.USR_SIG}")
        process = subprocess.Popen(
            command,
            env=os.environ | names,
            start_new_session=True,  # signals of this group are not for it
            preexec_fn=lambda: signal.signal(time_is_up, signal.SIG_IGN),
        )
        self._pid = process.pid
        # submitit ignores it; of a node that is taken away, or scancel, it is all that is heard.
        signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        try:
            while process.poll() is None:
                time.sleep(0.2)
        finally:
            if process.returncode is None:
                process.terminate()
        self._pid = None  # may soon be another process's
        if process.returncode == STOPPED and job.node > 0:
            time.sleep(_PATIENCE)  # the first node ends this one, or there is something wrong
        if process.returncode == STOPPED and makes_place(job.job_id):
            # With a grace time SLURM sends SIGTERM, and queues only what is still there at its end.
            signal.raise_signal(time_is_up)  # submitit queues it now, and does not return
        if process.returncode:
            raise UserError(f"train_net.py ended with status {process.returncode}")
        return 0

    def checkpoint(self) -> Any:
        """What submitit queues again, after the run has saved; called by its handler of SIGUSR2."""
        from submitit.helpers import DelayedSubmission

        if self._pid is not None:
            try:
                os.kill(self._pid, signal.SIGTERM)
                # Not by the process's object, of which what this interrupts may hold the lock. It
                # ends within train.grace_seconds.
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            except (ProcessLookupError, ChildProcessError):
                pass
        return DelayedSubmission(Launch(self.arguments, self.restarts + 1))


def makes_place(job_id: str) -> bool:
    """Whether SLURM has chosen the running job to be preempted: not one that somebody cancels."""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):  # there is none in a container, or it is too busy
        return False
    state = dict(re.findall(r"\b(JobState|PreemptTime)=(\S*)", told))
    return state.get("JobState") == "RUNNING" and state.get("PreemptTime", "None")[:1].isdigit()


def minutes(text: str) -> int:
    """Of a time as sbatch takes it: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, or with DAYS-
    before HOURS[:MINUTES[:SECONDS]]."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, such as 1440 or 1-00:00:00")
    days, *rest = (int(part) if part else 0 for part in found.groups())
    if found[1] is None and found[4] is None:
        rest = [0, *rest[:2]]  # there are no hours
    hours, mins, seconds = rest
    total = 60 * (24 * days + hours) + mins + -(-seconds // 60)
    if total < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a minute is the least")
    return total


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="CONFIG")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs, and processes, of a node")
    parser.add_argument("--num-machines", type=int, default=1, help="nodes")
    parser.add_argument("--resume", action="store_true", help="go on with what the folder holds")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--partition")
    parser.add_argument("--time", type=minutes, default=minutes("24:00:00"), help="as for sbatch")
    parser.add_argument("--cpus-per-task", type=int, help="of a node, its loaders included")
    parser.add_argument("--mem-gb", type=float, help="of a node")
    parser.add_argument("--no-gpus", action="store_true", help="ask for none: nodes with CPUs")
    for name in ("account", "qos", "constraint", "exclude", "comment"):
        parser.add_argument(f"--{name}", help="as for sbatch")
    parser.add_argument("--job-name", default="stage-interactor")
    parser.add_argument("--job-dir", default="output/slurm/%j", help="of outputs (%(default)s)")
    parser.add_argument("--max-requeues", type=int, default=30, help="after time is up (30)")
    parser.add_argument("--signal-delay", type=int, default=120, metavar="SECONDS")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser.parse_intermixed_args()


def submit(args: argparse.Namespace) -> int:
    for name in ("num_gpus", "num_machines"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    try:
        import submitit
    except ImportError as error:
        raise ImportError("submitit is missing: pip install -e '.[slurm]'") from error
    if args.cluster == "local" and args.num_machines > 1:
        raise ValueError("--cluster local is this machine alone: --num-machines 1")
    if args.cluster == "slurm" and not (shutil.which("srun") and shutil.which("sbatch")):
        raise ValueError("sbatch and srun are not found: submit from a node of the cluster, or try "
                         "the job here with --cluster local")  # fmt: skip
    # What is wrong with it is told now, and not after hours in the queue.
    cfg = load_config(args.config_file, args.opts)
    require_sections(cfg, args.config_file)
    grace = cfg.train.get("grace_seconds", 30)
    if args.signal_delay < grace + 15:
        raise ValueError(
            f"--signal-delay {args.signal_delay} leaves no time to save: train.grace_seconds "
            f"({grace:g}) and 15 more are the least"
        )
    executor = submitit.AutoExecutor(
        folder=args.job_dir, cluster=args.cluster, slurm_max_num_timeout=args.max_requeues
    )
    asked = {
        "name": args.job_name,
        "nodes": args.num_machines,
        "tasks_per_node": 1,
        "gpus_per_node": 0 if args.no_gpus else args.num_gpus,
        "cpus_per_task": args.cpus_per_task,
        "mem_gb": args.mem_gb,
        "timeout_min": args.time,
        "stderr_to_stdout": True,
        "slurm_signal_delay_s": args.signal_delay,
        "slurm_partition": args.partition,
    }
    for name in ("account", "qos", "constraint", "exclude", "comment"):
        asked[f"slurm_{name}"] = getattr(args, name)
    executor.update_parameters(**{key: value for key, value in asked.items() if value is not None})
    flags = ["--resume"] * args.resume + ["--eval-only"] * args.eval_only
    config = os.path.abspath(find_config(args.config_file))
    command = ["--config-file", config, "--num-gpus", str(args.num_gpus), *flags, *args.opts]
    job = executor.submit(Launch(command))
    print(f"job {job.job_id}; its output: {job.paths.stdout}", flush=True)
    if args.cluster == "local":
        job.wait()
        if job.exception() is not None:
            print(f"the job has failed; see {job.paths.stdout}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(call("slurm.py", submit, arguments_of(), mistake=1))
