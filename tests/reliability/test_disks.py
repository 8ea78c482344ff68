"""What a machine does to a run is told in a line, and costs nothing that was saved before."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from stage_interactor.data import check_shared_memory
from stage_interactor.data.loader import share
from stage_interactor.engine import Trainer
from stage_interactor.engine.training import train
from stage_interactor.errors import UserError, explain
from stage_interactor.inference.weights import read_checkpoint

TINY = "tests/tiny_config.py"
OFTEN = ("train.max_iter=10", "train.checkpointer.period=2", "train.eval_period=6")
ALL = "train.checkpointer.max_to_keep=null"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of the generated images, which the first run makes."""
    return tmp_path_factory.mktemp("data") / "shapes"


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The end of a run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole")
    train(TINY, [f"shapes.root={images}", *OFTEN], output_dir=output)
    return read_checkpoint(str(output / "model_final.pth"))


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; gives its folder, and what remounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False)

    if os.getuid() or not shutil.which("mount") or mount("size=1m").returncode:
        pytest.skip("mounting takes root")
    try:
        yield folder, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def told_of(capfd, overrides, **options):
    """What a run that cannot end well says; nothing of it is a trace."""
    with pytest.raises(Exception) as caught:
        train(TINY, list(overrides), **options)
    text = explain(caught.value)
    shown = capfd.readouterr()
    assert text and "\n" not in text, repr(caught.value)
    assert "Traceback" not in shown.out + shown.err
    return text


def assert_nothing_is_torn(folder):
    assert not list(folder.glob("*.tmp"))
    for path in folder.glob("model_*.pth"):
        read_checkpoint(str(path))
    tag = folder / "last_checkpoint"
    assert not tag.exists() or (folder / tag.read_text()).exists()


def assert_same_end(folder, whole):
    found = read_checkpoint(str(folder / "model_final.pth"))
    for part in ("model", "ema"):
        assert found[part].keys() == whole[part].keys()
        assert all(torch.equal(found[part][key], whole[part][key]) for key in whole[part]), part


@pytest.mark.cases(1)
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    disk, images, whole, rng, cases, capfd
):
    folder, remount = disk
    for case in range(cases):
        size = rng.choice((4, 40, 300, 600, 900, 1500, rng.randrange(8, 2500)))
        remount(f"size={size}k")
        output = folder / str(case)
        settings = [f"shapes.root={images}", *OFTEN, ALL]
        told = told_of(capfd, settings, output_dir=output)
        assert str(output) in told and "No space left on device; make room" in told, size
        assert_nothing_is_torn(output)
        remount("size=200m")
        train(TINY, settings, output_dir=output, resume=True)
        assert_same_end(output, whole)
        shutil.rmtree(output)


@pytest.mark.parametrize("name", ["metrics.json", "log.txt", "events.out.tfevents", "model_0"])
def test_any_file_that_cannot_be_written_ends_the_run(name, images, whole, tmp_path, monkeypatch):
    """A disk that is full for one file alone: /dev/full in its place, from the third step on."""
    run_step = Trainer.run_step

    def fill(self):
        run_step(self)
        for link in os.listdir("/proc/self/fd") if self.iter == 3 else ():
            path = os.path.realpath(f"/proc/self/fd/{link}")
            if path.startswith(f"{tmp_path}/run/{name}"):
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, int(link))
                os.close(full)
        if self.iter == 3 and name == "model_0":
            os.mkdir(tmp_path / "run" / "model_0000003.pth")

    monkeypatch.setattr(Trainer, "run_step", fill)
    settings = [f"shapes.root={images}", *OFTEN]
    with pytest.raises(UserError, match=f"{tmp_path}/run/{name}.*--resume goes on from .*0001.pth"):
        train(TINY, settings, output_dir=tmp_path / "run")
    monkeypatch.undo()
    if name == "model_0":
        (tmp_path / "run" / "model_0000003.pth").rmdir()
    assert_nothing_is_torn(tmp_path / "run")
    train(TINY, settings, output_dir=tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", whole)


def test_a_folder_that_cannot_be_written_to_is_told(disk, images, tmp_path, capfd):
    folder, remount = disk
    (folder / "old").mkdir()
    remount("ro")
    (tmp_path / "file").write_text("")
    for output, reason in (
        (folder / "old", "Read-only file system"),
        (folder / "new", "Read-only file system"),
        (tmp_path / "file", "Not a directory"),
        (tmp_path / "file" / "below", "Not a directory"),
    ):
        told = told_of(capfd, [f"shapes.root={images}", *OFTEN], output_dir=output)
        assert str(output) in told and f"{reason}; " in told and "another folder" in told


def test_generated_images_that_do_not_fit_are_told_with_their_folder(disk, tmp_path, capfd):
    folder, _ = disk
    images = [f"shapes.root={folder}/shapes", "shapes.num_train=4000"]
    told = told_of(capfd, images, output_dir=tmp_path / "run")
    assert f"{folder}/shapes: No space left on device; make room" in told
    assert os.listdir(folder) == []


def when(condition, act):
    """Does something from a thread as soon as it can."""

    def wait():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if found := condition():
                return act(found)
            time.sleep(0.005)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_folder_that_is_removed_is_told(images, tmp_path, capfd):
    output = tmp_path / "run"
    # At once: file by file, the run might write others meanwhile.
    thread = when((output / "model_0000001.pth").exists, lambda _: output.rename(tmp_path / "away"))
    told = told_of(
        capfd, [f"shapes.root={images}", *OFTEN, "train.max_iter=4000"], output_dir=output
    )
    thread.join()
    assert str(output) in told  # or a file in it that was being written
    assert "the folder was removed while" in told or "No such file or directory" in told


def at_iteration_4(monkeypatch, act):
    run_step = Trainer.run_step

    def step(self):
        if self.iter == 4:
            act()
        run_step(self)

    monkeypatch.setattr(Trainer, "run_step", step)


def test_in_a_folder_that_is_emptied_a_run_goes_on_and_says_so(
    images, whole, tmp_path, monkeypatch, capfd
):
    folder = tmp_path / "run"
    at_iteration_4(monkeypatch, lambda: [path.unlink() for path in folder.iterdir()])
    train(TINY, [f"shapes.root={images}", *OFTEN], output_dir=folder)
    assert_same_end(folder, whole)
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [4, 5, 6, 7, 8, 9]
    told = capfd.readouterr().out
    for name in ("metrics.json", "train.lock"):
        assert told.count(f"{name} was removed while") == 1
    assert len(list(folder.glob("events.*"))) == 1 and not (folder / "train.lock").exists()


HOLD = """import sys
from stage_interactor.locking import folder_lock
with folder_lock(sys.argv[1], 0):
    print("held", flush=True)
    input()
"""


@pytest.mark.parametrize("period", [1, 1000])
def test_a_run_whose_folder_another_one_has_taken_ends(
    period, images, tmp_path, monkeypatch, capfd
):
    folder = tmp_path / "run"
    others = []

    def take():
        shutil.rmtree(folder)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        others.append(subprocess.Popen([sys.executable, "-c", HOLD, folder], **pipes))
        assert others[0].stdout.readline() == b"held\n"
        (folder / "metrics.json").write_text("theirs")

    at_iteration_4(monkeypatch, take)
    settings = [
        "train.checkpointer.period=1000",
        "train.eval_period=7",
        f"train.log_period={period}",
    ]
    try:
        told = told_of(capfd, [f"shapes.root={images}", *OFTEN, *settings], output_dir=folder)
        assert f"is in use by another run now, process {others[0].pid}" in told
        names = {path.name for path in folder.iterdir()}
        assert names == {"metrics.json", "train.lock"}
        assert (folder / "metrics.json").read_text() == "theirs"
    finally:
        for process in others:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_removed_are_told(workers, images, whole, tmp_path, capfd):
    shutil.copytree(images, tmp_path / "shapes")
    last = tmp_path / "run" / "last_checkpoint"
    thread = when(last.exists, lambda _: shutil.rmtree(tmp_path / "shapes" / "train"))
    settings = (f"dataloader.train.num_workers={workers}", "train.max_iter=4000")
    told = told_of(
        capfd, [f"shapes.root={tmp_path}/shapes", *OFTEN, *settings], output_dir=tmp_path / "run"
    )
    thread.join()
    assert "images in a row cannot be read, the last is" in told and ".jpg" in told
    assert last.exists()
    assert_nothing_is_torn(tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "context"), [(signal.SIGKILL, "fork"), (signal.SIGSEGV, "spawn")]
)
def test_a_data_worker_that_dies_is_told(number, context, images, whole, tmp_path, capfd):
    last = tmp_path / "run" / "last_checkpoint"
    others = set(multiprocessing.active_children())  # of loaders that nobody has let go of yet
    thread = when(
        lambda: last.exists() and set(multiprocessing.active_children()) - others,
        lambda workers: os.kill(workers.pop().pid, number),
    )
    settings = ("dataloader.train.num_workers=2", "train.max_iter=4000")
    settings += (f"+dataloader.train.multiprocessing_context={context}",)
    told = told_of(capfd, [f"shapes.root={images}", *OFTEN, *settings], output_dir=tmp_path / "run")
    thread.join()
    assert "a process that loads pictures has ended" in told and "num_workers" in told
    assert_nothing_is_torn(tmp_path / "run")


def test_a_lack_of_shared_memory_is_told_before_the_start(monkeypatch):
    check_shared_memory(0)
    small = SimpleNamespace(f_bavail=16, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    check_shared_memory(0)
    with pytest.raises(
        UserError, match="/dev/shm has 64 KiB free, and 4 .* need 1024 .*--shm-size"
    ):
        check_shared_memory(4)


class Sharing(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        item = share({"image": torch.zeros(3), "boxes": [torch.ones(2)]})
        return item["image"].is_shared() and item["boxes"][0].is_shared()


def test_a_worker_shares_before_it_hands_over():
    assert list(torch.utils.data.DataLoader(Sharing(), num_workers=1)) == [torch.tensor([True])]
    assert not Sharing()[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "fewer of them take less"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "fewer of them take less"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "--shm-size"),
        ("unable to write to file </torch_1_2_3>: No space left on device (28)", "--shm-size"),
        ("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't", "not enough memory"),
    ],
)
def test_what_pytorch_says_of_a_machine_is_told(text, told):
    assert told in explain(RuntimeError(text))
    assert explain(RuntimeError("something else")) is None
    general = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    general.__cause__ = RuntimeError(text)  # what PyTorch makes of it where data are waited for
    assert not text.startswith("DataLoader") or told in explain(general)


def test_an_error_in_a_worker_is_told_in_its_own_words():
    error = UserError(
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "a.py", line 1\nstage_interactor.errors.UserError: a.jpg is no picture\n'
    )
    assert explain(error) == "a.jpg is no picture"


@pytest.mark.soak
def test_a_full_disk_ends_all_processes_of_a_run(disk, images, whole, train_net, tmp_path):
    folder, remount = disk
    remount("size=900k")
    run = ("--num-gpus", "2", "--dist-url", "auto", "--config-file", TINY)
    settings = (f"shapes.root={images}", *OFTEN, ALL, f"train.output_dir={folder}/run")
    process = train_net(*run, *settings)
    assert process.returncode and "No space left on device" in process.output
    assert_nothing_is_torn(folder / "run")
    remount("size=200m")
    process = train_net("--resume", *run, *settings)
    assert process.returncode == 0, process.output


def test_a_disk_that_is_full_from_the_start_is_told_without_a_trace(disk, images, tmp_path, capfd):
    folder, remount = disk
    assert remount("size=4k").returncode == 0
    with pytest.raises(OSError) as caught:
        train(TINY, [f"shapes.root={images}"], output_dir=folder)
    assert str(folder) in explain(caught.value) and "No space left" in explain(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())
