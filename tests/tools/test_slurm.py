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


def start(folder, *arguments):
    pytest.importorskip("submitit", reason="needs stage-interactor[slurm]")
    command = [sys.executable, "tools/slurm.py", *SMALL, "--cluster", "local", "--time", "20"]
    command += ["--job-dir", f"{folder}/job", f"train.output_dir={folder}/run", "--no-gpus"]
    return subprocess.Popen(
        [*command, f"shapes.root={folder}/shapes", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_job_that_is_preempted_goes_on_to_the_same_weights(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.wait(300) == 0, whole.stdout.read() + output_of(tmp_path / "whole")
    stopped = start(tmp_path / "stopped")
    controller = int(stopped.stdout.readline().split(";")[0].removeprefix("job "))
    metrics = tmp_path / "stopped/run/metrics.json"
    while len(lines(metrics)) < 3:
        assert stopped.poll() is None, output_of(tmp_path / "stopped")
        time.sleep(0.02)
    (task,) = children(controller)
    os.kill(task, signal.SIGUSR2)  # as SLURM does before it takes a node away
    assert stopped.wait(300) == 0, output_of(tmp_path / "stopped")
    told = output_of(tmp_path / "stopped")
    assert "Stopped by SIGTERM after iteration" in told and "Requeued job" in told
    assert "This job was started again: it goes on with its run" in told
    weights = [
        read_checkpoint(str(tmp_path / name / "run/model_final.pth"))["model"]
        for name in ("whole", "stopped")
    ]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    iterations = [json.loads(line)["iteration"] for line in lines(metrics)]
    assert sorted(set(iterations)) == list(range(16))


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
