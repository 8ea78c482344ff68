"""A job in parts has a row for each picture, once, whatever ends it and however often."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.data import images
from stage_interactor.inference.jobs import (
    addresses,
    batch_job,
    part_files,
    part_processes,
    part_writer,
)
from stage_interactor.inference.jobs.addresses import find_pictures, read_address
from stage_interactor.inference.jobs.batch_job import batch_predict
from stage_interactor.inference.jobs.part_files import OtherJobError
from stage_interactor.inference.jobs.part_writer import Part, PartWriter, Task
from stage_interactor.locking import FolderInUseError, folder_lock

ODD = [
    "with space.png",
    "two\nlines.png",
    "细胞 ä.png",
    "[a]*.png",
    "-n.png",
    os.fsdecode(b"\xff.png"),
]


@pytest.fixture(scope="module")
def checkpoint(small_run):
    return small_run / "model_final.pth"


@pytest.fixture
def photos(small_run, tmp_path):
    """Six pictures, as many with odd names, one that is damaged, and what is none."""
    folder = tmp_path / "photos"
    shutil.copytree(small_run / "shapes/val", folder)
    first = min(folder.iterdir())
    for name in ODD:
        shutil.copy(first, folder / name)
    (folder / "damaged.png").write_bytes(first.read_bytes()[:200])
    (folder / "notes.txt").write_text("none")
    return folder


def predict(checkpoint, places, output_dir, **options):
    options = {"threshold": 0.0, "device": "cpu", "progress": False, "part_size": 4} | options
    return batch_predict(checkpoint, places, output_dir=output_dir, **options)


def rows_of(output_dir):
    parts = sorted((Path(output_dir) / "parts").iterdir())
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def pictures_of(folder):
    """As rows name them."""
    paths = [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name != "notes.txt"]
    return [path.encode("utf-8", "backslashreplace").decode() for path in paths]


def test_every_picture_is_a_row_and_has_what_predict_finds(checkpoint, photos, tmp_path):
    done = predict(checkpoint, [photos, photos / "damaged.png"], tmp_path / "job")
    detector = Detector.from_checkpoint(checkpoint, device="cpu")
    found = detector.predict_files(photos, threshold=0.0, output_dir=tmp_path / "plain")
    coco = json.loads((tmp_path / "plain/predictions.json").read_text())
    rows = rows_of(tmp_path / "job")
    assert [row["file"] for row in rows] == pictures_of(photos)
    good = [row for row in rows if row["error"] is None]
    assert len(good) == len(coco["images"]) == len(rows) - 1
    for row, image in zip(good, coco["images"]):
        assert (row["width"], row["height"]) == (image["width"], image["height"])
        same = [item for item in coco["annotations"] if item["image_id"] == image["id"]]
        assert row["scores"] == [item["score"] for item in same] and len(same) > 3
        corners = [
            box[:2] + [round(b - a, 2) for a, b in zip(box, box[2:])] for box in row["boxes"]
        ]
        assert corners == [item["bbox"] for item in same]
        assert row["names"] == [detector.class_names[index] for index in row["classes"]]
    (bad,) = (row for row in rows if row["error"] is not None)
    assert bad["file"] == str(photos / "damaged.png") and bad["boxes"] == [] == bad["names"]
    assert done.unreadable == [f"{bad['file']}: {bad['error']}"] == found.unreadable
    assert (done.num_pictures, done.num_objects) == (len(rows), found.num_objects)
    assert done.passed_over == {".txt": 1}


def test_processes_write_the_same_parts_and_a_call_again_does_nothing(checkpoint, photos, tmp_path):
    predict(checkpoint, photos, tmp_path / "one")
    done = predict(checkpoint, photos, tmp_path / "two", num_gpus=2, batch_size=3)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    again = predict(checkpoint, photos, tmp_path / "two", num_gpus=2)
    assert again.num_resumed == done.num_pictures and again.num_objects == done.num_objects
    assert again.unreadable == done.unreadable and len(done.unreadable) == 1


def test_parquet_holds_the_same(checkpoint, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs stage-interactor[ray]")
    predict(checkpoint, photos, tmp_path / "lines")
    done = predict(checkpoint, photos, tmp_path / "table", output_format="parquet")
    assert parquet.read_table(done.folder).to_pylist() == rows_of(tmp_path / "lines")
    again = predict(checkpoint, photos, tmp_path / "table", output_format="parquet")
    assert (again.num_resumed, again.num_objects) == (done.num_pictures, done.num_objects)


@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)]
)
def test_ended_at_any_moment_it_goes_on_and_has_each_picture_once(
    processes, number, checkpoint, photos, tmp_path
):
    for index in range(100):
        os.link(photos / "with space.png", photos / f"more_{index}.png")
    total = len(pictures_of(photos))
    folder = tmp_path / "job/parts"
    command = [sys.executable, "-m", "stage_interactor.commands", "predict", str(photos)]
    command += ["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "job")]
    command += ["--threshold", "0", "--device", "cpu", "--part-size", "1"]
    command += ["--num-gpus", str(processes)]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    # By what is done, not by time: on a fast machine the whole job takes less than a second.
    enough = random.randint(3, 20)
    while not folder.is_dir() or len(list(folder.iterdir())) < enough:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.02))  # in the middle of a part
    process.send_signal(number)
    assert process.wait() == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        told = f"of {total} pictures are done; the same command goes on from there"
        assert told in log.read_text()
    leftover = folder / f"part-{total - 1:05}.jsonl.0123456789ab.tmp"
    leftover.write_text('{"file": ')  # as a kill leaves it
    left = len(list(folder.glob("*.jsonl")))
    done = predict(checkpoint, photos, tmp_path / "job", part_size=1)
    assert 3 <= left <= done.num_resumed < done.num_pictures == total
    files = [row["file"] for row in rows_of(tmp_path / "job")]
    assert files == pictures_of(photos)


def test_what_is_new_is_told_and_what_is_gone_is_an_error(checkpoint, photos, tmp_path, caplog):
    done = predict(checkpoint, photos, tmp_path / "job")
    os.remove(tmp_path / "job/parts/part-00001.jsonl")
    before = rows_of(tmp_path / "job")
    gone = json.loads((tmp_path / "job/pictures.jsonl").read_text().splitlines()[5])
    os.remove(gone)
    shutil.copy(photos / "with space.png", photos / "new.png")
    again = predict(checkpoint, photos, tmp_path / "job")
    assert "1 pictures are new since the job began, such as" in caplog.text
    assert "new.png" in caplog.text and "1 pictures are gone since" in caplog.text
    rows = rows_of(tmp_path / "job")
    assert len(rows) == done.num_pictures and rows[:4] + rows[8:] == before
    assert "FileNotFoundError" in rows[5]["error"] and rows[4]["error"] is None
    assert len(again.unreadable) == len(done.unreadable) + 1


def test_numbers_of_numpy_are_those_of_python(checkpoint, photos, tmp_path):
    options = dict(nms=np.float32(0.5), max_detections=np.int64(2), tiles=np.int64(48))
    options |= dict(part_size=np.int64(4), batch_size=np.int64(2), num_gpus=np.int64(1))
    done = predict(checkpoint, photos, tmp_path / "job", **options)
    assert done.num_pictures and done.num_objects <= 2 * done.num_pictures
    options |= dict(nms=0.5, max_detections=2, tiles=48, part_size=4)
    assert predict(checkpoint, photos, tmp_path / "job", **options).num_resumed == done.num_pictures


def test_no_picture_is_no_job(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="the list of them is empty"):
        predict(checkpoint, [], tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_another_job_is_refused(checkpoint, photos, tmp_path):
    predict(checkpoint, photos, tmp_path / "job")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(photos / "with space.png", tmp_path / "elsewhere")
    (tmp_path / "model.pth").write_bytes(checkpoint.read_bytes() + b" ")
    before = rows_of(tmp_path / "job")
    for model, places, options, told in (
        (checkpoint, photos, {"threshold": 0.5}, r"--threshold \(was \[0.0, "),
        (checkpoint, photos, {"nms": 0.5}, r"--nms \(was None\);"),
        (checkpoint, photos, {"averaged": False}, r"--trained-weights \(was None\);"),
        (checkpoint, photos, {"tiles": 32}, r"--tiles \(was None\), --overlap \(was None\);"),
        (checkpoint, photos, {"part_size": 5}, r"--part-size \(was 4\);"),
        (checkpoint, tmp_path / "elsewhere", {}, "the pictures"),
        (tmp_path / "model.pth", photos, {}, "--checkpoint;"),
    ):
        with pytest.raises(OtherJobError, match=f"holds a job of other values: {told}"):
            predict(model, places, tmp_path / "job", **options)
    assert rows_of(tmp_path / "job") == before


def test_a_manifest_that_is_none_is_refused(checkpoint, photos, tmp_path):
    predict(checkpoint, photos, tmp_path / "job")
    manifest = tmp_path / "job/job.json"
    good = json.loads(manifest.read_text())
    for changed in (
        {"version": 2},
        {"pictures": "13"},
        {"pictures": True},
        {"part_size": 0},
        {"output_format": "../../x"},
        {"settings": []},
        {"more": 1},
    ):
        manifest.write_text(json.dumps(good | changed))
        with pytest.raises(OtherJobError, match="job.json is no manifest of a job of this"):
            predict(checkpoint, photos, tmp_path / "job")
    for content in ("", "[1]", "[" * 100_000):
        manifest.write_text(content)
        with pytest.raises(OtherJobError, match="job.json is no manifest of a job"):
            predict(checkpoint, photos, tmp_path / "job")


def test_other_files_and_damaged_parts_are_refused(checkpoint, photos, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/predictions.json").write_text("{}")
    with pytest.raises(OtherJobError, match="holds something else, such as predictions.json"):
        predict(checkpoint, photos, tmp_path / "mine")
    assert sorted(os.listdir(tmp_path / "mine")) == ["predictions.json"]
    predict(checkpoint, photos, tmp_path / "job")
    part = tmp_path / "job/parts/part-00001.jsonl"
    content = part.read_text()
    for damaged in (content[:-30], content.partition("\n")[0], "[]\n" * 4, "\0"):
        part.write_text(damaged)
        with pytest.raises(part_files.UserError, match="part-00001.jsonl is no part of this job"):
            predict(checkpoint, photos, tmp_path / "job")
    part.unlink()
    predict(checkpoint, photos, tmp_path / "job")
    assert part.read_text() == content
    with (tmp_path / "job/pictures.jsonl").open("a") as names:
        names.write('"/etc/passwd"\n')
    with pytest.raises(OtherJobError, match="is not the list that the job was begun with"):
        predict(checkpoint, photos, tmp_path / "job")


def test_two_jobs_do_not_write_into_a_folder_at_once(checkpoint, photos, tmp_path):
    with folder_lock(str(tmp_path / "job"), 0, part_files.LOCK):
        with pytest.raises(FolderInUseError, match="another --output-dir"):
            predict(checkpoint, photos, tmp_path / "job")
    assert predict(checkpoint, photos, tmp_path / "job").num_pictures == 13


class Deadly(Task):
    """Of which a part kills its process, each time."""

    def load(self, device):
        def write(part):
            if part.number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return part_processes.Done(part.number, len(part.pictures), 0, [])

        return write


def deadly(parts):
    return [Part(number, [f"{number}.png"]) for number in range(parts)]


def test_a_part_that_kills_its_process_is_named_after_all_others_are_done():
    done = []
    with pytest.raises(part_processes.LostPartsError, match="part 1 .* SIGKILL .*, 3 times"):
        for part in part_processes.run_on_processes(Deadly(*[None] * 8), deadly(3), ["cpu"]):
            done.append(part.number)
    assert done == [0, 2]


def test_what_a_process_raises_ends_the_job_with_its_words(checkpoint, photos, tmp_path, capsys):
    flags = ["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "job")]
    assert main(["predict", str(photos), *flags, "--num-gpus", "2", "--device", "cuda:1"]) == 2
    assert "several processes have a GPU each" in capsys.readouterr().err
    assert main(["predict", "a.mp4", *flags, "--part-size", "3", "--device", "cpu"]) == 2
    assert "a video is not divided among processes" in capsys.readouterr().err
    assert main(["predict", str(photos), *flags, "--output-format", "coco", "--ray", "auto"]) == 2
    assert "--ray: for jobs in parts" in capsys.readouterr().err
    assert not (tmp_path / "job").exists()
    command = ["predict", str(photos), *flags, "--output-format", "jsonl", "--device", "cpu"]
    assert main(command) == 1  # one cannot be read
    out = capsys.readouterr().out
    assert "in 13 pictures; see" in out and "1 of 13 files could not be read" in out
    assert main(command) == 1
    assert "in 13 pictures, 13 of them done before; see" in capsys.readouterr().out


# Addresses.


def test_pictures_are_read_from_archives_and_results_written_to_object_stores(
    checkpoint, photos, tmp_path
):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in ("damaged.png", "with space.png", "细胞 ä.png", "notes.txt"):
            archive.write(photos / name, f"below/{name}")
    place = f"zip://below::{tmp_path}/photos.zip"
    names = [f"zip://below/{name}::{tmp_path}/photos.zip"
             for name in ("damaged.png", "with space.png", "细胞 ä.png")]  # fmt: skip
    assert find_pictures([place, names[1]]) == (names, {".txt": 1})
    pixels = np.asarray(Image.open(photos / "with space.png").convert("RGB"))
    np.testing.assert_array_equal(read_address(names[1]), pixels)
    for output in ("memory://results/job", f"file://{tmp_path}/job"):
        done = predict(checkpoint, place, output, part_size=2)
        assert (done.num_pictures, len(done.unreadable)) == (3, 1)
        files = fsspec.filesystem(output.partition(":")[0])
        paths = sorted(files.ls(f"{output}/parts", detail=False))
        assert [os.path.basename(path) for path in paths] == [
            "part-00000.jsonl",
            "part-00001.jsonl",
        ]
        lines = b"".join(files.cat_file(path) for path in paths).splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["file"] for row in rows] == names
        assert "UnidentifiedImageError" not in (rows[1]["error"] or "")
        files.rm_file(paths[1])
        again = predict(checkpoint, place, output, part_size=2)
        assert again.num_resumed == 2 and again.num_objects == done.num_objects
    fsspec.filesystem("memory").rm("/results", recursive=True)


def test_a_place_that_does_not_answer_ends_the_job_and_one_lost_picture_does_not(
    checkpoint, photos, tmp_path, monkeypatch
):
    tries = []
    whole = fsspec.open

    def fetch(address, mode):
        tries.append(address)
        if "gone" in address or "broken" in address and len(tries) < 3:
            raise ConnectionError("no answer")
        return whole(address, mode)

    monkeypatch.setattr(addresses.fsspec, "open", fetch)
    monkeypatch.setattr(addresses, "_PAUSE", 0.0)
    good = f"file://{photos}/with space.png"
    shutil.copy(photos / "with space.png", photos / "broken.png")
    shutil.copy(photos / "with space.png", photos / "gone.png")
    assert read_address(f"file://{photos}/broken.png").shape == (64, 64, 3) and len(tries) == 3
    done = predict(checkpoint, [good, f"file://{photos}/gone.png"], tmp_path / "job")
    assert len(done.unreadable) == 1 and "ConnectionError: no answer" in done.unreadable[0]
    for number in range(20):
        shutil.copy(photos / "with space.png", photos / f"gone_{number}.png")
    place = f"file://{photos}/gone_*.png"
    for part_size, written in ((20, 0), (15, 1)):  # whatever parts they are in
        lost = tmp_path / f"lost_{part_size}"
        with pytest.raises(part_files.UserError, match="gone_.*no answer.*, as 19 before it"):
            predict(checkpoint, place, lost, part_size=part_size)
        assert len([*lost.glob("parts/*")]) == written and (lost / "job.json").exists()


def test_a_place_that_stops_to_answer_makes_no_picture_an_error(
    checkpoint, photos, tmp_path, monkeypatch
):
    """What is in a part stays so: pictures of an outage are predicted when it is over."""
    whole, fetched, down = fsspec.open, [], []

    def fetch(address, mode):
        fetched.append(address)
        if down and ("ever" in down or len(fetched) < down[0]):
            raise ConnectionError("no answer")
        return whole(address, mode)

    monkeypatch.setattr(addresses.fsspec, "open", fetch)
    monkeypatch.setattr(addresses, "_PAUSE", 0.0)
    places = [f"file://{photos}/{name}.png" for name in ("with space", "-n", "damaged")]
    task = []
    monkeypatch.setattr(batch_job, "PartWriter", lambda *args: task.append(args) or stop())

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(checkpoint, places, tmp_path / "job", part_size=1)
    writer = PartWriter(*task[0])
    assert writer(Part(0, places[:1])).unreadable == []
    down.append(len(fetched) + 3 + 2)  # three tries, and one of the picture that was read before
    assert writer(Part(1, places[1:2])).unreadable == []
    down[:] = ["ever"]
    with pytest.raises(part_files.UserError, match="damaged.*no answer.*-n.png cannot any more"):
        writer(Part(2, places[2:]))
    assert len(rows_of(tmp_path / "job")) == 2
    down.clear()
    (told,) = writer(Part(2, places[2:])).unreadable  # the picture's own fault
    assert "no answer" not in told


def test_a_disk_that_fails_makes_no_picture_an_error(checkpoint, photos, tmp_path, monkeypatch):
    whole, gone = images.open_image, []
    names = "-n.png", "with space.png", "细胞 ä.png"

    def open_image(file):
        if str(file).endswith(gone[0]):
            gone[0] = gone[-1]
            raise OSError(errno.ESTALE, "Stale file handle", file)
        return whole(file)

    monkeypatch.setattr(images, "open_image", open_image)
    places = [photos / name for name in names]
    gone[:] = [names[1]]  # one file alone
    done = predict(checkpoint, places, tmp_path / "job", part_size=1)
    assert len(done.unreadable) == 1 and "Stale file handle" in done.unreadable[0]
    gone[:] = [names[1], ".png"]  # and from then on all of them
    with pytest.raises(part_files.UserError, match=f"{names[1]}.*; and .*{names[0]} cannot any"):
        predict(checkpoint, places, tmp_path / "lost", part_size=1)
    assert len(rows_of(tmp_path / "lost")) == 1
    gone[:] = ["nothing"]
    done = predict(checkpoint, places, tmp_path / "lost", part_size=1)
    assert (done.num_pictures, done.num_resumed, done.unreadable) == (3, 1, [])


def test_pictures_of_a_server_or_a_bucket_are_of_one_place():
    one = part_writer._place_of("s3://bucket/photos/a.png")
    assert one == part_writer._place_of("zip://a.png::s3://bucket/more.zip") == "s3://bucket"
    assert one != part_writer._place_of("s3://other/photos/a.png")


class RefusalError(Exception):
    """As of a cloud's own library."""


class Refusing(fsspec.AbstractFileSystem):
    """Where nobody may look, or write."""

    protocol = "refusing"

    def ls(self, path, detail=True, **kwargs):
        raise RefusalError("Unable to locate\ncredentials")

    def pipe_file(self, path, value, **kwargs):
        raise FileNotFoundError("The specified bucket does not exist")


@pytest.mark.parametrize("output", ["refusing://bucket/job", "readonly://bucket/job"])
def test_a_place_that_refuses_is_named_in_a_line(output, checkpoint, photos, tmp_path, capsys):
    class ReadOnly(Refusing):
        protocol = "readonly"

        def ls(self, path, detail=True, **kwargs):
            return []

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    fsspec.register_implementation("readonly", ReadOnly, clobber=True)
    command = ["predict", "--checkpoint", str(checkpoint), "--device", "cpu"]
    command += ["--output-format", "jsonl", "--output-dir"]
    assert main([*command, str(tmp_path / "job"), "refusing://bucket/photos"]) == 2
    line = "stage-interactor: refusing://bucket/photos: RefusalError: Unable to locate credentials"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert main([*command, output, str(photos)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"stage-interactor: {output}") and "Traceback" not in told
    assert "credentials" in told or "The specified bucket does not exist" in told


def test_what_the_system_says_of_a_file_is_told_as_elsewhere():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/part")
    with pytest.raises(OSError) as raised, addresses.answering("file:///full"):
        raise full
    assert raised.value is full


def test_an_address_is_a_picture_to_a_job_and_a_live_source_without_one(
    checkpoint, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(addresses, "_PAUSE", 0.0)
    address = "http://127.0.0.1:9/picture.png"  # where nothing answers
    pytest.importorskip("aiohttp", reason="fsspec reads http:// by aiohttp")
    arguments = ["predict", "--checkpoint", str(checkpoint), address, "--output-dir"]
    assert main([*arguments, str(tmp_path / "job"), "--output-format", "jsonl"]) == 2
    assert "live" not in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "job"), "--num-gpus", "2", "--track"]) == 2
    assert "--track: of videos and live sources" in capsys.readouterr().err


def test_what_fsspec_may_run_is_not_read():
    for read in (read_address, lambda address: find_pictures([address])):
        with pytest.raises(ValueError, match="can be made to run anything"):
            read("reference://a.png::http://127.0.0.1:9/list.json")


def test_no_more_of_a_picture_is_fetched_than_may_be_read(photos, monkeypatch):
    monkeypatch.setenv("STAGE_INTERACTOR_MAX_PIXELS", "10")
    with pytest.raises(ValueError, match="its file has more than 80 bytes"):
        read_address(f"file://{photos}/with space.png")


# Ray.


@pytest.fixture(scope="module")
def ray_of_this_machine():
    ray = pytest.importorskip("ray", reason="needs stage-interactor[ray]")
    pytest.importorskip("ray.data", reason="needs stage-interactor[ray]")
    from stage_interactor.inference.jobs.part_ray import _connected

    with _connected(ray, "local"):
        yield ray


def test_ray_writes_the_same_parts(ray_of_this_machine, checkpoint, photos, tmp_path):
    predict(checkpoint, photos, tmp_path / "here")
    done = predict(checkpoint, photos, tmp_path / "ray", ray="local", num_gpus=1)
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "ray") and done.num_pictures == 13
    os.remove(tmp_path / "ray/parts/part-00002.jsonl")
    again = predict(checkpoint, photos, tmp_path / "ray", ray="local", num_gpus=1)
    assert again.num_resumed == 9 and rows_of(tmp_path / "here") == rows_of(tmp_path / "ray")


def test_a_part_that_kills_its_actor_does_not_end_the_others(ray_of_this_machine):
    from stage_interactor.inference.jobs.part_ray import run_on_ray

    # Actors do not find the modules of tests.
    ray_of_this_machine.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    done = []
    with pytest.raises(part_processes.LostPartsError, match="part 1 .* actor of Ray .* 3 times"):
        for part in run_on_ray(Deadly(*[None] * 8), deadly(3), "local", 1, "cpu"):
            done.append(part.number)
    assert sorted(done) == [0, 2]
