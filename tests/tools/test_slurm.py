"""A job of submitit trains, and one that is preempted goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm

from stage_interactor.engine import read_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = ["--config-file", "tests/tiny_config.py", "dataloader.train.num_workers=0"]
SMALL += ["dataloader.test.num_workers=0", "train.max_iter=16", "train.checkpointer.period=16"]


def start(folder, *arguments, path=os.environ["PATH"]):
    pytest.importorskip("submitit", reason="needs stage-interactor[slurm]")
    command = [sys.executable, "tools/slurm.py", *SMALL, "--cluster", "local", "--time", "20"]
    command += ["--job-dir", f"{folder}/job", f"train.output_dir={folder}/run", "--no-gpus"]
    return subprocess.Popen(
        [*command, f"shapes.root={folder}/shapes", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def output_of(folder):
    return "".join(path.read_text() for path in (folder / "job").glob("*.out"))


def signalled(folder, number, **kwargs):
    """A job that hears of a signal after three iterations, as SLURM sends it to its task."""
    job = start(folder, **kwargs)
    # Before it may come warnings of what is imported.
    line = next(line for line in job.stdout if line.startswith("job "))
    controller = int(line.split(";")[0].removeprefix("job "))
    while len(lines(folder / "run/metrics.json")) < 3:
        assert job.poll() is None, output_of(folder)
        time.sleep(0.02)
    (task,) = children(controller)
    os.kill(task, number)
    return job


def scontrol(folder, job_state, preempt_time):
    """SLURM's own, of a job in such a state; what to find it by, before the rest."""
    folder.mkdir()
    line = f"JobId=7 JobName=a PreemptEligibleTime=2026-11-28T16:22:14 PreemptTime={preempt_time}"
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\necho '{line} JobState={job_state} Reason=None'\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    whole = start(folder)
    assert whole.wait(300) == 0, whole.stdout.read() + output_of(folder)
    return folder


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM], ids=["USR2", "TERM"])
def test_a_job_that_is_preempted_goes_on_to_the_same_weights(number, whole_run, tmp_path):
    # By SIGTERM and a grace time where the cluster does not send the job's own signal.
    path = scontrol(tmp_path / "bin", "RUNNING", "2026-11-28T16:22:41")
    stopped = signalled(tmp_path, number, path=path)
    assert stopped.wait(300) == 0, output_of(tmp_path)
    told = output_of(tmp_path)
    assert "Stopped by SIGTERM after iteration" in told and "Requeued job" in told
    assert "This job was started again: it goes on with its run" in told
    weights = [
        read_checkpoint(str(folder / "run/model_final.pth"))["model"]
        for folder in (whole_run, tmp_path)
    ]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    iterations = [json.loads(line)["iteration"] for line in lines(tmp_path / "run/metrics.json")]
    assert sorted(set(iterations)) == list(range(16))


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(tmp_path):
    path = scontrol(tmp_path / "bin", "CANCELLED", "None")
    stopped = signalled(tmp_path, signal.SIGTERM, path=path)
    assert stopped.wait(300) == 1
    told = output_of(tmp_path)
    assert "Stopped by SIGTERM after iteration" in told and "ended with status 143" in told
    assert "Requeued" not in told


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (("RUNNING", "2026-11-28T16:22:41"), True),
        (("RUNNING", "None"), False),  # somebody's `scancel --signal=TERM`
        (("RUNNING", "Unknown"), False),
        (("CANCELLED", "2026-11-28T16:22:41"), False),
        (("PENDING", "2026-11-28T16:22:41"), False),  # SLURM has queued it itself
    ],
)
def test_only_what_makes_place_for_others_is_queued_again(state, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", scontrol(tmp_path / "bin", *state))
    assert slurm.makes_place("7") is expected


def test_without_scontrol_nothing_is_queued_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.makes_place("7")


def test_a_run_that_fails_fails_the_job(tmp_path):
    failed = start(tmp_path, "train.init_checkpoint=nowhere.pth")
    assert failed.wait(120) == 1
    told = failed.stdout.read() + output_of(tmp_path)
    assert "the job has failed; see" in told and "nowhere.pth" in told
    assert "train_net.py ended with status 1" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config-file", "nothing.py"], "there is no such file"),
        ([*SMALL, "train.max_iterations=3"], "max_iterations"),
        ([*SMALL, "--num-gpus", "0"], "at least 1"),
        ([*SMALL, "--num-machines", "2", "--cluster", "local"], "this machine alone"),
        ([*SMALL, "--signal-delay", "20", "--cluster", "local"], "leaves no time to save"),
        (SMALL, "sbatch and srun are not found"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_queued(
    arguments, told, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("submitit", reason="needs stage-interactor[slurm]")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    if "nothing.py" in arguments or "train.max_iterations=3" in arguments:
        arguments = [*arguments, "--cluster", "local"]
    arguments = [*arguments, "--job-dir", str(tmp_path / "job")]
    monkeypatch.setattr("sys.argv", ["slurm.py", *arguments])
    assert slurm.call("slurm.py", slurm.submit, slurm.arguments_of(), mistake=1) == 1
    assert told in capsys.readouterr().err and not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("2:00:00", 120), ("1-12", 2160), ("1-00:30", 1470)],
)
def test_times_are_those_of_sbatch(text, expected):
    assert slurm.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "0", "-5"])
def test_other_times_are_refused(text):
    with pytest.raises(slurm.argparse.ArgumentTypeError):
        slurm.minutes(text)
