"""An output folder is one run's at a time, and nothing that a dead one leaves is in the way."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from stage_interactor import locking
from stage_interactor.locking import FolderInUseError, folder_lock


def hold(folder, pipe):
    with folder_lock(folder, 0):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until it is told to let go."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(str(tmp_path), theirs))
    process.start()
    assert ours.poll(60)
    process.let_go = lambda: ours.send("let go")
    yield process
    process.kill()
    process.join()


def test_a_second_run_waits_and_then_says_who_has_the_folder(holder, tmp_path):
    start = time.monotonic()
    with pytest.raises(FolderInUseError, match=rf"process {holder.pid} on .* since 20\d\d-.*0.5 s"):
        with folder_lock(str(tmp_path), 0.5):
            pass
    assert 0.5 <= time.monotonic() - start < 5
    assert json.loads((tmp_path / locking.NAME).read_text())["pid"] == holder.pid  # it still has it


def test_a_second_run_goes_on_when_the_first_has_ended(holder, tmp_path):
    threading.Timer(0.5, holder.let_go).start()
    with folder_lock(str(tmp_path), 30):
        assert json.loads((tmp_path / locking.NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / locking.NAME).exists()


def test_what_a_killed_run_leaves_is_no_obstacle(holder, tmp_path):
    holder.kill()
    holder.join()
    assert (tmp_path / locking.NAME).exists()
    with folder_lock(str(tmp_path), 0):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": -1}', b"\xff" * 50, b"[" * 5000])
@pytest.mark.parametrize("locks", [True, False])
def test_whatever_a_lock_file_holds_is_no_obstacle(content, locks, tmp_path, monkeypatch):
    if not locks:
        monkeypatch.setattr(locking, "_lock", lambda file: False)
    (tmp_path / locking.NAME).write_bytes(content)
    with folder_lock(str(tmp_path), 0):
        pass


def test_two_threads_of_a_process_exclude_each_other(tmp_path):
    with folder_lock(str(tmp_path), 0):
        with pytest.raises(FolderInUseError), folder_lock(f"{tmp_path}/../{tmp_path.name}", 0):
            pass
        probe = f"""import fcntl
try: fcntl.lockf(open({str(tmp_path / locking.NAME)!r}, "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError: print("locked")"""
        told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout
        assert told == "locked\n"  # the other thread has not given it away


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({}, False),
        ({"pid": 2**30}, True),
        ({"started": "of another boot 1"}, True),
        ({"host": "another.machine"}, True),  # of which nothing can be known
    ],
)
def test_without_locks_of_the_system_the_named_process_counts(
    change, free, holder, tmp_path, monkeypatch
):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locking.fcntl, "lockf", no_locks)
    path = tmp_path / locking.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if free:
        with folder_lock(str(tmp_path), 0):
            pass
    else:
        with pytest.raises(FolderInUseError), folder_lock(str(tmp_path), 0):
            pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / locking.NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError), folder_lock(str(tmp_path), 0):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_pipe_in_place_of_the_lock_is_told(tmp_path):
    os.mkfifo(tmp_path / "train.lock")
    with pytest.raises(OSError, match="it is a pipe") as caught, folder_lock(str(tmp_path), 0):
        pass
    assert caught.value.filename == str(tmp_path / "train.lock")
