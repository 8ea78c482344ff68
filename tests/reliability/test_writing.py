"""Files are whole or not there, and never written through a link out of the output folder."""

import csv
import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor.commands import main
from stage_interactor.d2.logger import setup_logger
from stage_interactor.engine.writers import MetricsWriter
from stage_interactor.errors import explain
from stage_interactor.inference.detector import Detections
from stage_interactor.inference.results import Found, Results
from stage_interactor.pages.page import save_picture, write_page
from stage_interactor.writing import (
    growing_file,
    inside,
    new_file,
    open_to_append,
    write_atomically,
    write_text,
)

SECRET = "not to be touched"


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "elsewhere/victim"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


WRITERS = {
    "text": lambda path: write_text(path, "x"),
    "page": lambda path: write_page(path, "title", "", [], []),
    "picture": lambda path: save_picture(Image.new("RGB", (4, 4)), f"{path}"),
    "tensors": lambda path: write_atomically(path, lambda file: torch.save([1], file)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("target", ["victim", "missing", "relative"])
def test_a_link_at_the_place_is_replaced_and_not_followed(write, target, tmp_path, victim):
    folder = tmp_path / "output"
    folder.mkdir()
    path = folder / "file.png"
    leads = {"victim": victim, "missing": victim.parent / "new", "relative": "../elsewhere/victim"}
    path.symlink_to(leads[target])
    write(path)
    assert path.is_file() and not path.is_symlink() and path.stat().st_size
    assert victim.read_text() == SECRET and os.listdir(victim.parent) == ["victim"]
    assert os.listdir(folder) == ["file.png"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_errors_name_the_path_and_leave_nothing(write, tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/full")
    names = ["folder.png", "pipe.png", "device.png", "folder.png/pipe.png/x.png"]
    names[3] = "none/x.png" if write in (WRITERS["text"], WRITERS["tensors"]) else names[2]
    for name in names:
        with pytest.raises(OSError) as caught:
            write(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
        assert str(tmp_path / name) in explain(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["device.png", "folder.png", "pipe.png"]
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_told_as_such_and_the_file_of_before_stays(write, tmp_path, monkeypatch):
    from stage_interactor import writing

    path = tmp_path / "file.png"
    path.write_text("<html>")

    def full(self, data):
        self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise self.error

    monkeypatch.setattr(writing._File, "write", full)
    with pytest.raises(OSError) as caught:
        write(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "<html>" and os.listdir(tmp_path) == ["file.png"]


def test_a_file_system_that_is_full_leaves_no_half_files(tmp_path):
    """With a real one, of a megabyte."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=False)
    if made.returncode:
        pytest.skip("needs the right to mount")
    try:
        write_text(mount / "before.txt", "x")
        for write in (
            lambda path: write_text(path, "x" * 2**22),
            lambda path: write_atomically(path, lambda file: torch.save(torch.rand(2**20), file)),
            lambda path: save_picture(
                Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)),
                path,
            ),
        ):
            with pytest.raises(OSError, match="No space left") as caught:
                write(mount / "large.png")
            assert caught.value.filename == str(mount / "large.png")
            assert os.listdir(mount) == ["before.txt"]
    finally:
        subprocess.run(["umount", mount], check=True)


def test_an_interruption_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "x"
    path.write_text("of before")
    for error in (KeyboardInterrupt, ValueError, SystemExit):
        with pytest.raises(error), new_file(path) as file:
            file.write(b"half")
            file.flush()
            raise error
    assert path.read_text() == "of before" and os.listdir(tmp_path) == ["x"]


def test_names_as_long_as_a_file_system_takes_and_of_any_bytes(tmp_path):
    for name in ("n" * 255, "ü" * 127, os.fsdecode(b"\xff\xfe x"), "a\nb", "-x", ".x", "x.tmp"):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
    with pytest.raises(OSError) as caught:
        write_text(f"{tmp_path}/a\0b", "x")
    assert caught.value.filename == f"{tmp_path}/a\0b"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends a signal")
def test_a_signal_that_raises_has_nothing_written_twice(tmp_path):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    delays = random.Random(0)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(300):
            with pytest.raises(Stop), growing_file(tmp_path / "rows.csv") as file:
                signal.setitimer(signal.ITIMER_REAL, delays.uniform(2e-5, 4e-4))
                for index in range(1_000_000):
                    file.write(b"%d\n" % index)
                    file.flush()
            rows = (tmp_path / "rows.csv").read_text().splitlines()
            assert rows == [str(index) for index in range(len(rows))]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_what_grows_is_not_written_through_a_link(tmp_path, victim):
    for name in ("metrics.json", "log.txt"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match=r"it is a link, to .*victim: remove it") as caught:
        MetricsWriter(str(tmp_path / "metrics.json"), 0)
    assert caught.value.filename == str(tmp_path / "metrics.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):
        open_to_append(tmp_path / "pipe")
    if setup_logger.__module__.startswith("stage_interactor"):
        with pytest.raises(OSError, match="it is a link"):
            setup_logger(str(tmp_path), name="of this test")
    assert victim.read_text() == SECRET


def test_lines_of_others_in_metrics_are_taken_out(tmp_path):
    path = tmp_path / "metrics.json"
    good = '{"iteration": 1, "x": 2}\n'
    path.write_bytes(good.encode() + b'[1]\n"x"\n{"iteration": "a"}\n\xff\n' + b"[" * 50_000)
    MetricsWriter(str(path), 5).close()
    assert path.read_text() == good


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "log.txt", "annotations", "coco_instances_results.json",
     "instances_predictions.pth"],
)  # fmt: skip
def test_a_run_does_not_begin_where_a_link_leads_out(name, tmp_path, victim, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (output / name).symlink_to(victim.parent if name == "annotations" else victim)
    for part in ("train", "val"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (64, 64)).save(tmp_path / f"data/{part}/{part}{index}.png")
            line = "0 0.5 0.5 0.5 0.5\n"
            (tmp_path / f"data/{part}/{part}{index}.txt").write_text(line)
    (tmp_path / "data/classes.txt").write_text("cat\n")
    command = ["train", tmp_path / "data", "--preset", "nano", "--output-dir", output]
    assert main([*map(str, command), "train.max_iter=1", "train.device=cpu"]) == 2
    told = capsys.readouterr().err
    assert str(output / name) in told and ("is a link" in told or "leads out" in told)
    assert victim.read_text() == SECRET and os.listdir(victim.parent) == ["victim"]


def test_the_output_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "real/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real/inner").symlink_to("sub")
    (tmp_path / "real/out").symlink_to("..")
    for name in ("x", "sub/x", "inner/x", "new/folder/x"):
        assert inside(tmp_path / "link", name) == str(tmp_path / "link" / name)
    for name in ("out/x", "../x", "sub/../../x", str(tmp_path / "x"), "out/real/../x"):
        with pytest.raises(OSError, match="leads out of"):
            inside(tmp_path / "link", name)


def test_random_names_stay_inside_or_are_refused(rng: random.Random, tmp_path):
    """Whatever links lie on the way."""
    (tmp_path / "output/a/b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name, target in {"l": "..", "a/m": "b", "a/b/n": "../../../elsewhere", "o": "/"}.items():
        (tmp_path / "output" / name).symlink_to(target)
    parts = ["a", "b", "l", "m", "n", "o", "..", ".", "", "x", "~", "C:", "%2e%2e", "..\\..", "…"]
    before = sorted(os.listdir(tmp_path))
    written = 0
    for _ in range(400):
        name = "/".join(rng.choices(parts, k=rng.randint(1, 5))) + rng.choice(["", "f", "/f"])
        try:
            path = inside(tmp_path / "output", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_text(path, "x")
        except OSError as error:
            assert error.filename
        else:
            written += 1
            place = Path(os.path.realpath(os.path.dirname(path)))
            assert place.is_relative_to(os.path.realpath(tmp_path / "output")), name
    assert written > 20
    assert sorted(os.listdir(tmp_path)) == before and not os.listdir(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def checkpoint(small_run):
    return small_run / "model_final.pth"


def predict(checkpoint, *arguments):
    command = ["predict", "--checkpoint", checkpoint, *arguments, "--device", "cpu"]
    return main([*map(str, command), "--threshold", "0"])


def test_copies_have_places_of_their_own_inside_the_folder(checkpoint, tmp_path, victim):
    folder = tmp_path / "in"
    (folder / "predictions.json").mkdir(parents=True)
    names = ["v.jfif", "v.jfif.png", "v.jfif_2.png", "v.bmp", "predictions.csv.png", "=x.png",
             "predictions.json/x.png", "n" * 250 + ".jfif", "a\nb.png", "-x.png"]  # fmt: skip
    for index, name in enumerate(names):
        picture = Image.new("RGB", (64, 64), (index, 0, 0))
        picture.save(folder / name, "BMP" if name.endswith("bmp") else "PNG")
    output = tmp_path / "out"
    output.mkdir()
    for name in ("v.bmp", "predictions.json", "predictions.csv"):
        (output / name).symlink_to(victim)
    again = [os.path.join(folder, ".", "v.bmp"), os.path.relpath(folder / "v.bmp")]
    assert predict(checkpoint, folder, *again, "--output-dir", output) == 0
    assert victim.read_text() == SECRET
    copies = [path for path in output.rglob("*") if path.is_file()]
    assert len(copies) == len(names) + 2 and not any(path.is_symlink() for path in copies)
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = {row["file"] for row in rows}
    assert {"./=x.png", "./-x.png", "a\nb.png"} <= told
    # Also with its prefix it is the path of the file.
    assert all((folder / name).is_file() for name in told) and len(told) == len(names)


def test_copies_do_not_leave_through_a_folder_that_is_a_link(checkpoint, tmp_path, victim, capsys):
    (tmp_path / "in/sub").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "in/sub/x.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "in/y.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").symlink_to(victim.parent)
    assert predict(checkpoint, tmp_path / "in", "--output-dir", tmp_path / "out") == 2
    assert f"{tmp_path}/out/sub/x.png: it leads out of" in capsys.readouterr().err
    assert os.listdir(victim.parent) == ["victim"] and os.listdir(tmp_path / "out") == ["sub"]


def test_the_copy_of_a_video_is_whole_or_not_there(checkpoint, tmp_path, monkeypatch, capsys):
    from stage_interactor import writing
    from stage_interactor.inference.sources import Frame, VideoWriter

    def make(path, count=3):
        with VideoWriter(str(path), Fraction(10)) as writer:
            for index in range(count):
                pixels = np.full((64, 64, 3), 40 * index, np.uint8)
                writer.write(Frame(pixels, Fraction(index, 10), Fraction(1, 10)))

    (tmp_path / "out").mkdir()
    victim = tmp_path / "victim"
    victim.write_text(SECRET)
    (tmp_path / "out/x.mp4").symlink_to(victim)
    make(tmp_path / "x.mp4")
    assert predict(checkpoint, tmp_path / "x.mp4", "--output-dir", tmp_path / "out") == 0
    assert victim.read_text() == SECRET and (tmp_path / "out/x.mp4").stat().st_size > 500
    write, count = writing._File.write, []

    def full(self, data):
        count.append(1)
        if len(count) > 1:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return write(self, data)

    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(writing._File, "write", full)
    assert predict(checkpoint, tmp_path / "x.mp4", "--output-dir", tmp_path / "out") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("stage-interactor: ") and "No space left on device" in told
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("name", "label", "told"),
    [
        ("=cmd|x!A1.jpg", "=1+1", ("./=cmd|x!A1.jpg", "'=1+1")),
        ("@x.jpg", "@SUM(1)", ("./@x.jpg", "'@SUM(1)")),
        ("-x.jpg", "-5", ("./-x.jpg", "-5")),
        ("+x.jpg", "+1.5", ("./+x.jpg", "+1.5")),
        ("a=b.jpg", "a-b", ("a=b.jpg", "a-b")),
    ],
)
def test_a_table_holds_no_formulas_and_the_json_holds_the_names(name, label, told, tmp_path):
    results = Results([{"id": 1, "name": label}])
    found = Detections(np.array([[0.0, 0, 5, 5]]), np.ones(1), np.zeros(1, int), (label,), (9, 9))
    results.found.append(Found(name, name, None, found))
    results.save(tmp_path)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["file"], row["class"]) == told
    content = results.to_coco()
    assert content["images"][0]["file_name"] == name and content["categories"][0]["name"] == label


def test_a_page_is_written_in_the_place_of_a_link(small_run, tmp_path, victim):
    page = tmp_path / "report.html"
    page.symlink_to(victim)
    assert main(["report", str(small_run), "--output", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>") and victim.read_text() == SECRET


def test_what_is_read_is_not_written_over(small_run, tmp_path, capsys):
    data = shutil.copytree(small_run / "shapes", tmp_path / "data")
    picture = str(shutil.copy(next(data.glob("val/*")), tmp_path / "picture.png"))
    weights = str(small_run / "model_final.pth")
    for command, target in [
        (["report", str(small_run)], weights),
        (["report", str(small_run)], f"{small_run}/metrics.json"),
        (["data", "view", str(data)], f"{data}/train.json"),
        (["stages", "--checkpoint", weights, picture], picture),
        (["replay", str(small_run), "--iteration", "0"], weights),
        (["export", "--checkpoint", weights, "--format", "safetensors"], weights),
    ]:
        before = Path(target).read_bytes()
        assert main([*command, "--output", target]) == 2
        assert Path(target).read_bytes() == before
        assert f"{target}" in capsys.readouterr().err


def test_an_empty_argument_is_not_the_folder_that_one_is_in(small_run, monkeypatch, capsys):
    monkeypatch.chdir(small_run / "shapes")
    for command in (["data", "check"], ["data", "view"], ["train"], ["report"]):
        assert main([*command, ""]) == 2
        assert "an argument is empty" in capsys.readouterr().err


def test_a_signal_leaves_no_half_file(small_run, tmp_path):
    """It comes while a copy of a video is written."""
    with av.open(tmp_path / "long.mp4", "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for _ in range(2000):
            picture = np.zeros((64, 64, 3), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    command = [sys.executable, "-m", "stage_interactor.commands", "predict", tmp_path / "long.mp4"]
    command += ["--checkpoint", small_run / "model_final.pth", "--output-dir", tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("*.tmp")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and "Stopped by SIGTERM." in told
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_list_of_files_may_have_any_bytes(checkpoint, tmp_path, monkeypatch):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    Image.new("RGB", (64, 64)).save(open(path, "wb"), "PNG")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path + b"\n"), "utf-8"))
    assert predict(checkpoint, "-", "--output-dir", str(tmp_path / "out")) == 0


def test_a_device_named_as_output_stays_one(small_run, capsys):
    assert main(["report", str(small_run), "--output", "/dev/null"]) == 2
    assert "/dev/null: it is a pipe, a socket or a device, and no file" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):  # root
        pytest.skip("all is permitted")
    with pytest.raises(PermissionError) as caught:
        write_text(tmp_path / "closed/x", "x")
    assert caught.value.filename == str(tmp_path / "closed/x")
