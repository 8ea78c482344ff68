"""Several processes of a run: what one does is told once, and nobody stays behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from stage_interactor.config import ConfigError
from stage_interactor.engine.launch import LostProcess, launch
from stage_interactor.engine.resume import goes_on, leave_job_id, remove_leftovers
from stage_interactor.engine.signals import Stopped
from stage_interactor.errors import call

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes need a GPU each")


class OddError(Exception):
    """That cannot be sent to another process."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def act(what, folder):
    """A process of a run."""
    (folder / f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
    first = dist.get_rank() == 0
    if what == "mistake of all":
        raise ConfigError("train.x is wrong")
    if what == "bug" and not first:
        raise OddError("this", "that")
    if what == "killed" and not first:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash" and not first:
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "status" and not first:
        os._exit(7)
    if what == "deaf" and not first:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(600)
    if what == "asked" and not first:
        os.kill(os.getpid(), signal.SIGHUP)
    dist.barrier()  # for which the other is missed
    time.sleep(600)


def gone(folder):
    pids = [int(path.read_text()) for path in folder.glob("*.pid")]
    assert pids
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize(
    ("what", "error", "told"),
    [
        ("mistake of all", ConfigError, r"^train.x is wrong$"),
        ("bug", RuntimeError, "OddError: this and that"),
        ("killed", LostProcess, r"process 1 of 2 \(pid \d+\) was killed by SIGKILL .*--resume"),
        pytest.param(
            "crash", LostProcess, r"process 1 of 2 .* killed by SIGSEGV", marks=pytest.mark.soak
        ),
        pytest.param(
            "status", LostProcess, r"process 1 of 2 .* ended with status 7", marks=pytest.mark.soak
        ),
    ],
)
def test_the_end_of_one_process_is_the_end_of_all_and_is_told_once(
    what, error, told, tmp_path, capfd
):
    with pytest.raises(error, match=told) as found:
        launch(act, (what, tmp_path), processes=2, grace=10)
    assert gone(tmp_path)
    assert capfd.readouterr().err.count("Traceback") == 0

    def fail():
        raise found.value

    assert call("program", fail, mistake=1) == 1
    lines = capfd.readouterr().err
    assert lines.count("Traceback") == (what == "bug")
    assert len(lines.splitlines()) == 1 or what == "bug"


def test_a_signal_to_one_process_ends_all(tmp_path):
    with pytest.raises(Stopped) as stopped:
        launch(act, ("asked", tmp_path), processes=2, grace=10)
    assert stopped.value.code == 128 + signal.SIGHUP and gone(tmp_path)


def test_what_does_not_hear_is_killed_after_the_grace_time(tmp_path, caplog):
    before = signal.getsignal(signal.SIGTERM)

    def end():
        while len(list(tmp_path.glob("*.pid"))) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        times.append(time.monotonic())

    times = []
    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        launch(act, ("deaf", tmp_path), processes=2, grace=2)
    assert stopped.value.code == 128 + signal.SIGTERM and gone(tmp_path)
    assert time.monotonic() - times[0] < 30
    assert "(train.grace_seconds)" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_nobody_stays_behind_a_killed_launcher(tmp_path):
    program = f"""import pathlib, test_processes
from stage_interactor.engine.launch import launch
if __name__ == "__main__":
    folder = pathlib.Path({str(tmp_path)!r})
    launch(test_processes.act, ("wait", folder), processes=2, grace=3)
"""
    (tmp_path / "program.py").write_text(program)
    paths = [os.path.dirname(__file__), os.environ["PYTHONPATH"]]
    launcher = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 15
    while not gone(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_address_that_is_taken_is_told_and_nobody_is_waited_for(free_port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="process 0 of 2 .*: --dist-url names another"):
            launch(print, processes=2, dist_url=f"tcp://127.0.0.1:{free_port}", grace=100)
        assert time.monotonic() - start < 60


def test_while_it_waits_for_another_machine_a_signal_ends_it(free_port, capfd):
    def end():
        while "Machine 0 of 2 waits" not in capfd.readouterr().out:
            time.sleep(0.05)
        time.sleep(5)
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    times = []
    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    with pytest.raises(Stopped):
        address = f"tcp://127.0.0.1:{free_port}"
        launch(print, processes=1, num_machines=2, dist_url=address, grace=100)
    thread.join()
    assert time.monotonic() - times[0] < 30


def test_auto_is_no_address_between_machines():
    with pytest.raises(ValueError, match="auto"):
        launch(print, processes=1, num_machines=2, dist_url="auto")
    for address in ("tcp://127.0.0.1:0", "tcp://host:99999", "tcp://host", "host:80"):
        with pytest.raises(ValueError, match=f"--dist-url must be tcp://HOST:PORT.*{address}"):
            launch(print, processes=2, dist_url=address)


def test_a_job_that_is_started_again_goes_on_with_its_own_run_alone(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    folder = str(tmp_path)
    leave_job_id(folder)
    assert not list(tmp_path.iterdir()) and goes_on(None, folder) == (False, "")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    leave_job_id(folder)
    assert goes_on(None, folder) == (False, "")  # its first start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert goes_on(None, folder)[0] and not goes_on(False, folder)[0]
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    goes, told = goes_on(None, folder)
    assert not goes and "begins anew" in told
    monkeypatch.delenv("SLURM_JOB_ID")
    for number in ("none", "a_name"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", number)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        assert not goes_on(None, folder)[0]
        leave_job_id(folder)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
        assert goes_on(None, folder)[0]
    assert goes_on("auto", folder)[0] and goes_on(True, folder) == (True, "")


def test_half_written_files_of_a_run_are_removed_and_nothing_else(tmp_path):
    ours = {"model_0000003.pth.tmp", "metrics.json.tmp", "last_checkpoint.0a1b2c3d4e5f.tmp"}
    others = {"notes.json.tmp", "model.tmp", "model_0000003.pth", "metrics.json", "x.pth.tmp"}
    for name in ours | others:
        (tmp_path / name).touch()
    remove_leftovers(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == others
