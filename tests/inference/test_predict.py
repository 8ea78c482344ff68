"""A checkpoint alone finds objects: from Python, and as `stage-interactor predict` does."""

import csv
import io
import json
import os
import re
import shutil
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor import Detector
from stage_interactor.commands import COMMANDS, main
from stage_interactor.config import ConfigError, instantiate, load_config
from stage_interactor.d2 import transforms
from stage_interactor.d2.detections import UnusableDetectionsError
from stage_interactor.d2.structures import Boxes, Instances
from stage_interactor.data import ImageReadError
from stage_interactor.engine import CheckpointError
from stage_interactor.inference.predict import predict_files


@pytest.fixture(scope="module")
def checkpoint(small_run):
    return small_run / "model_final.pth"


@pytest.fixture(scope="module")
def detector(checkpoint):
    return Detector.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def images(small_run):
    return sorted((small_run / "shapes/val").iterdir())


def predict(*arguments):
    return main(["predict", *map(str, arguments), "--device", "cpu"])


def test_a_checkpoint_finds_what_the_evaluation_of_its_run_found(small_run, detector, images):
    evaluated = json.loads((small_run / "coco_instances_results.json").read_text())
    records = json.loads((small_run / "shapes/val.json").read_text())["images"]
    ids = {record["file_name"]: record["id"] for record in records}
    for path, found in zip(images, detector(images, threshold=0.0, multi_label=True)):
        expected = [item for item in evaluated if item["image_id"] == ids[path.name]]
        expected.sort(key=lambda item: -item["score"])
        assert len(found) == len(expected) == 8
        scores = [item["score"] for item in expected]
        np.testing.assert_allclose(found.scores, scores, atol=1e-5)
        boxes = np.array([item["bbox"] for item in expected])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(found.boxes, boxes, atol=1e-2)
        names = [detector.categories[index]["name"] for index in found.classes]
        assert list(found.names) == names and set(names) <= {"ellipse", "rectangle", "triangle",
                                                             "cross", "ring"}  # fmt: skip


def test_pictures_of_every_kind_give_the_same(detector, images):
    array = np.array(Image.open(images[0]).convert("RGB"))
    expected = detector(str(images[0]), threshold=0.0)
    for picture in (images[0], array, Image.open(images[0])):
        found = detector(picture, threshold=0.0)
        assert np.array_equal(found.boxes, expected.boxes)
        assert found.image_size == expected.image_size == (64, 64)
    assert detector([]) == []
    best = expected[expected.scores >= expected.scores[2]]
    assert len(best) == 3 and best.names == expected.names[:3]
    assert len(detector(array, threshold=1.0)) == 0


def test_detections_as_supervision_s_and_as_detectron2_s(detector, images):
    found = detector(images[0], threshold=0.0)
    theirs = found.to_supervision()
    assert np.array_equal(theirs.xyxy, found.boxes)
    assert theirs.data["class_name"].tolist() == list(found.names)
    instances = found.to_instances()
    assert torch.equal(instances.pred_boxes.tensor, torch.from_numpy(found.boxes))
    assert instances.pred_classes.tolist() == found.classes.tolist()
    assert instances.image_size == (64, 64)


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (np.zeros((8, 8), np.uint8), ValueError, r"uint8 \(H, W, 3\).* got uint8 \(8, 8\)"),
        (np.zeros((8, 8, 3)), ValueError, "got float64"),
        (3, TypeError, "not <class 'int'>"),
        ("nowhere.jpg", ImageReadError, "cannot read the image nowhere.jpg"),
    ],
)
def test_what_is_no_picture_is_refused(detector, picture, error, message):
    with pytest.raises(error, match=message):
        detector(picture)


def test_overrides_change_the_checkpoint_s_own_config_or_are_refused(checkpoint, images, tmp_path):
    def load(*overrides):
        return Detector.from_checkpoint(checkpoint, overrides=overrides, device="cpu")

    assert len(load("model.max_detections=3")(images[0], threshold=0.0)) == 3
    flipped = load("dataloader.test.mapper.image_format=BGR")
    assert flipped.image_format == "BGR"
    assert len(load("+model.nms_threshold=0.01")(images[0], threshold=0.0)) < 8
    for override, message in (
        ("model.max_detection=3", "did you mean max_detections"),
        ("train.max_iter=3", "changes nothing of a detector"),
        ("model.num_classes=3", "changes nothing of a detector"),
        ("nonsense", "changes nothing of a detector"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(override)
    with pytest.raises(CheckpointError, match="does not fit"):
        load("model.decoder.out_points=8")
    with pytest.raises(CheckpointError, match="is not known as a part"):
        load("+model.decoder.parts.sampler._target_=os.system")


def test_averaged_weights_are_taken_if_they_were_evaluated(checkpoint, detector):
    content = torch.load(checkpoint, weights_only=True)
    key = "decoder.stages.2.head.box_out.weight"
    averaged = content["ema"][f"module.{key}"]
    assert not torch.equal(content["model"][key], averaged)
    assert torch.equal(detector.model.model.state_dict()[key], averaged)


def test_a_checkpoint_without_its_config_needs_one(checkpoint, images, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    del content["blueprint"]
    path = tmp_path / "plain.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="does not say how.*--config-file"):
        Detector.from_checkpoint(path)
    overrides = ["model.queries.num_queries=8", "dataloader.test.dataset.name=nowhere"]
    options = dict(config_file="configs/quickstart.py", overrides=overrides)
    found = Detector.from_checkpoint(path, device="cpu", **options)(images[0], threshold=0.0)
    expected = Detector.from_checkpoint(checkpoint, device="cpu")(images[0], threshold=0.0)
    assert np.array_equal(found.boxes, expected.boxes)
    assert set(found.names) <= set("01234")  # the data set is not there


def test_a_checkpoint_cannot_reach_outside_by_interpolation(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    command = "${oc.create:{_target_:os.mkdir,path:" + str(tmp_path / "made") + "}}"
    neck = {"_target_": "torch.nn.Identity", "x": command}
    content["blueprint"]["config"]["model"]["neck"] = neck
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="calls torch.nn.Identity"):
        Detector.from_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("target", ["os.system", "stage_interactor.config.LazyConfig.load"])
def test_a_checkpoint_cannot_call_what_is_no_part_of_a_detector(checkpoint, tmp_path, target):
    content = torch.load(checkpoint, weights_only=True)
    content["blueprint"]["config"]["model"]["neck"] = {"_target_": target, "command": "true"}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=f"calls {target}, which is not known"):
        Detector.from_checkpoint(tmp_path / "bad.pth")


def test_a_config_file_of_one_s_own_may_call_anything(images, tmp_path):
    overrides = ["dataloader.test.dataset.name=nowhere"]
    config = load_config("tests/tiny_config.py", overrides)  # whose backbone is the tests' own
    torch.save(instantiate(config.model).state_dict(), tmp_path / "bare.pth")
    options = dict(config_file="tests/tiny_config.py", overrides=overrides, device="cpu")
    detector = Detector.from_checkpoint(tmp_path / "bare.pth", **options)
    assert len(detector(images[0], threshold=0.0, multi_label=True)) == 8


@pytest.fixture
def folder(images, tmp_path):
    """Pictures in two folders, one of them broken, a note, and a video of five frames."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    for index, path in enumerate(images[:4]):
        target = root / ("deep" if index % 2 else ".") / f"{index}{path.suffix}"
        shutil.copy(path, target)
    (root / "broken.png").write_bytes(images[0].read_bytes()[:100])
    (root / "notes.txt").write_text("no picture")
    with av.open(str(root / "clip.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for path in images[:5]:
            file.mux(stream.encode(av.VideoFrame.from_image(Image.open(path).convert("RGB"))))
        file.mux(stream.encode())
    return root


def test_a_folder_of_pictures_and_videos(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--checkpoint", checkpoint, "--output-dir", out, "--threshold", 0, "--multi-label")
    assert predict(*options, "--batch-size", 3, folder) == 1
    told = capsys.readouterr().out
    assert "1 of 6 files could not be read" in told and "broken.png: " in told
    assert "72 objects in 9 pictures" in told

    content = json.loads((out / "predictions.json").read_text())
    names = [(image["file_name"], image.get("frame")) for image in content["images"]]
    pictures = [("0.jpg", None), ("2.jpg", None), ("deep/1.jpg", None), ("deep/3.jpg", None)]
    assert names == pictures + [("clip.mp4", frame) for frame in range(5)]
    assert [c["name"] for c in content["categories"]][0] == "ellipse"
    rows = list(csv.DictReader(io.StringIO((out / "predictions.csv").read_text())))
    assert len(rows) == len(content["annotations"]) == 72
    first, row = content["annotations"][0], rows[0]
    assert row["file"] == "0.jpg" and row["frame"] == ""
    assert float(row["left"]) == first["bbox"][0] and float(row["score"]) == first["score"]
    assert float(row["right"]) == pytest.approx(first["bbox"][0] + first["bbox"][2])

    for name, _ in pictures:
        drawn, plain = (np.array(Image.open(root / name)) for root in (out, folder))
        assert drawn.shape == plain.shape and not np.array_equal(drawn, plain)
    with av.open(str(out / "clip.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (64, 64, 3)


def overflows_on_bright(bad_box, bad_score):
    """A detector of two objects, one of which is unusable in pictures that are white."""

    def model(inputs):
        outputs = []
        for image in inputs:
            boxes, scores = [[0, 0, 9, 9], [1, 1, 9, 9]], [0.9, 0.1]
            if image["image"].float().mean() > 200:
                boxes[1], scores[1] = bad_box, bad_score
            found = Instances((64, 64), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float)))
            found.scores, found.pred_classes = (
                torch.tensor(scores),
                torch.zeros(2, dtype=torch.long),
            )
            outputs.append({"instances": found})
        return outputs

    return Detector(model, [{"id": 1, "name": "a"}], transforms.AugmentationList([]))


@pytest.mark.parametrize(
    "detector",
    [
        overflows_on_bright([float("nan")] * 4, 0.1),
        overflows_on_bright([0, 0, float("inf"), 9], 0.9),
        overflows_on_bright([5, 0, 4, 9], 0.9),
        overflows_on_bright([0, 0, 9, 9], float("nan")),
    ],
)
def test_a_picture_whose_detections_are_nan_is_named_and_has_none(detector, tmp_path):
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    root = tmp_path / "in"
    root.mkdir()
    for name, picture in (("0", black), ("1", white), ("2", black)):
        Image.fromarray(picture).save(root / f"{name}.png")
    with av.open(str(root / "clip.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in (black, white, black, white):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())

    with pytest.raises(UnusableDetectionsError, match=r"1.png: 1 detections are NaN, infinite"):
        detector(root / "1.png")
    with pytest.raises(UnusableDetectionsError, match="picture 2 of 2: 1 detections"):
        detector([black, white], threshold=0.5)
    assert len(detector(black)) == 1

    results = predict_files(detector, root, batch_size=2, output_dir=tmp_path / "out")
    places = [(found.name, found.frame) for found in results]
    assert places == [("0.png", None), ("2.png", None), ("clip.mp4", 0), ("clip.mp4", 2)]
    picture, video = results.unreadable
    assert picture.startswith(f"{root}/1.png: 1 detections are NaN")
    assert f"{root}/clip.mp4: 2 of 4 frames are left out, such as frame 1: 1 detections" in video
    text = (tmp_path / "out/predictions.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and len(json.loads(text)["images"]) == 4
    assert not (tmp_path / "out/1.png").exists()
    with av.open(str(tmp_path / "out/clip.mp4")) as copy:
        assert len(list(copy.decode(video=0))) == 4


def test_the_exit_status_tells_of_detections_that_are_nan(images, tmp_path, monkeypatch, capsys):
    detector = overflows_on_bright([float("nan")] * 4, 0.1)
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: detector)
    Image.fromarray(np.full((64, 64, 3), 255, np.uint8)).save(tmp_path / "white.png")
    options = ("--checkpoint", "any.pth", "--output-dir", tmp_path / "out", tmp_path / "white.png")
    assert predict(*options, images[0]) == 1
    told = capsys.readouterr().out
    assert "1 of 2 files could not be read or judged" in told and "white.png: 1 detections" in told


def test_globs_lists_and_classes(checkpoint, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{folder}/0.jpg\n\n{folder}/2.jpg\n"))
    out = tmp_path / "out"
    options = ("--checkpoint", checkpoint, "--output-dir", out, "--threshold", 0, "--no-pictures")
    options += ("--multi-label",)
    assert predict(*options, "-", f"{folder}/**/[13].jpg", f"{folder}/0.jpg") == 0
    assert "32 objects in 4 pictures" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["predictions.csv", "predictions.json"]
    assert predict(*options, folder / "0.jpg", "--classes", "ring", "cross") == 0
    names = {row["class"] for row in csv.DictReader((out / "predictions.csv").open())}
    assert names <= {"ring", "cross"}


def test_a_list_that_is_empty_or_begins_with_a_byte_order_mark(
    checkpoint, folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    options = ("--checkpoint", checkpoint, "--output-dir", out, "--no-pictures")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"\ufeff{folder}/0.jpg\r\n"))
    assert predict(*options, "-") == 0 and "in 1 pictures" in capsys.readouterr().out
    before = (out / "predictions.json").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert predict(*options, "-") == 2
    assert "the list of them is empty" in capsys.readouterr().err
    assert (out / "predictions.json").read_bytes() == before


def test_spaces_around_the_name_of_a_file_are_of_it(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "0.jpg", " a.jpg")
    options = ("--checkpoint", checkpoint, "--output-dir", "out", "--no-pictures")
    assert predict(*options, " a.jpg") == 0


def test_detections_may_be_compared_and_kept_in_sets(checkpoint, folder):
    detector = Detector.from_checkpoint(checkpoint, device="cpu")
    one, other = detector([folder / "0.jpg"] * 2, 0.0)
    assert one == one and one != other and len({one, other, one}) == 2
    with pytest.raises(ValueError, match=r"a picture must be uint8 \(H, W, 3\).* \(0, 10, 3\)"):
        detector(np.zeros((0, 10, 3), np.uint8))
    with pytest.raises(ValueError, match=r"overrides must be a list, \['a=1'\]"):
        Detector.from_checkpoint(checkpoint, overrides="a=1")
    with pytest.raises(CheckpointError, match=f"it is a folder.*; {checkpoint} is one"):
        Detector.from_checkpoint(checkpoint.parent)
    with pytest.raises(ValueError, match="revision='v1': .* is a folder"):
        Detector.from_pretrained(checkpoint.parent, revision="v1")


def finds_each_of(*names):
    """A detector that finds an object of every class in every picture."""

    def model(inputs):
        boxes = [[float(number), 0, 9 + number, 9] for number, _ in enumerate(names)]
        found = Instances((64, 64), pred_boxes=Boxes(torch.tensor(boxes)))
        found.scores = torch.linspace(0.9, 0.5, len(names))
        found.pred_classes = torch.arange(len(names))
        return [{"instances": found} for _ in inputs]

    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return Detector(model, categories, transforms.AugmentationList([]))


NUMBERS = ("2024", "1", "0007", "0", "traffic light", "a,b", 3, "-5")


@pytest.mark.parametrize("name", NUMBERS)
def test_a_class_is_chosen_by_its_name_also_where_that_is_a_number(
    images, tmp_path, monkeypatch, name
):
    detector = finds_each_of(*NUMBERS)
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: detector)
    options = ("--checkpoint", "any.pth", "--output-dir", tmp_path, images[0])
    assert predict(*options, "--classes", name) == 0
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [row["class"] for row in rows] == [str(name)]
    for classes in ([name], str(name), [str(name), name]):
        (found,) = predict_files(detector, images[0], classes=classes, progress=False)
        assert found.detections.names == (str(name),)


def test_what_is_the_name_of_no_class_or_of_two_is_refused(images):
    for classes in (["7"], ["2"], ["traffic"], ["01"], ["a", "b"]):
        with pytest.raises(ValueError, match="knows .*'2024'.* by name, not by index"):
            predict_files(finds_each_of(*NUMBERS), images[0], classes=classes)
    with pytest.raises(ValueError, match=r"\['1'\]: several classes of the detector"):
        predict_files(finds_each_of("1", 1, "b"), images[0], classes=["1", "b"])
    assert predict_files(finds_each_of("1", 1, "b"), images[0], classes=["b"]).num_objects == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["tests/golden"], "tests/golden: no image or video in it"),
        (["{image}", "--classes", "dog"], r"['dog']: the detector knows ['ellipse'"),
        (["{image}", "--threshold", "30"], "from 0 to 1, got 30"),
        (["{image}", "--batch-size", "0"], "of 1 or more, got 0"),
        (["{image}", "--output-dir", "{image}/.."], "would be overwritten"),
        (["{image}", "--checkpoint", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(checkpoint, images, arguments, message, capsys):
    arguments = [argument.format(image=images[0]) for argument in arguments]
    before = images[0].read_bytes()
    assert predict("--checkpoint", checkpoint, *arguments) == 2
    assert message in capsys.readouterr().err
    assert images[0].read_bytes() == before


def test_the_help_of_every_command(capsys):
    for command in (*COMMANDS, "data check", "data view", "data convert"):
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--help"])
        assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: stage-interactor data view" in text and "--threshold" in text
    with pytest.raises(SystemExit) as ended:
        main(["predcit"])
    assert ended.value.code == 2 and "invalid choice: 'predcit'" in capsys.readouterr().err


def video(path, size=(64, 48), times=(0.0, 0.1, 0.2), codec="libx264", options=None, sound=0):
    """Writes a video of noise whose frames are at times, in seconds, with seconds of silence."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as file:
        stream = file.add_stream(codec, rate=10)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        heard = file.add_stream("aac", rate=8000, layout="mono") if sound else None
        for number in range(sound * 8000 // 1024):
            silence = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.rate, frame.pts = 8000, number * 1024
            file.mux(heard.encode(frame))
        for time in times:
            shape = (*size[::-1], 3)
            frame = av.VideoFrame.from_ndarray(noise.integers(0, 255, shape, dtype=np.uint8))
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if heard is not None:
            file.mux(heard.encode())


def times_of(path):
    with av.open(str(path)) as file:
        return [round(float(frame.time), 4) for frame in file.decode(video=0)], file.duration / 1e6


def test_a_folder_gives_pictures_of_every_format_and_says_what_it_passed_over(
    checkpoint, tmp_path, capsys
):
    root = tmp_path / "in"
    root.mkdir()
    for name in ("a.JFIF", "b.Gif", "c.jp2", "d.mpo", "e.pgm", "f.TIFF"):
        Image.new("RGB", (32, 32)).save(root / name)
    for name in ("notes.txt", "more.TXT", "labels.json", "README", "page.eps"):
        (root / name).write_text("no picture")
    out = tmp_path / "out"
    assert predict("--checkpoint", checkpoint, root, "--output-dir", out) == 0
    told = capsys.readouterr().out
    assert "objects in 6 pictures" in told and "5 files in the folders are passed over" in told
    for part in ("2 .txt", "1 .json", "1 .eps", "1 without a suffix"):
        assert part in told
    copies = {path.name for path in out.iterdir()} - {"predictions.json", "predictions.csv"}
    assert copies == {"a.JFIF.png", "b.Gif", "c.jp2.png", "d.mpo.png", "e.pgm.png", "f.TIFF"}


def test_strips_of_a_pixel_are_predicted_and_drawn(detector, images, tmp_path):
    strips = {"wide.png": (1, 3000), "high.png": (3000, 1), "dot.png": (1, 1)}
    for name, size in strips.items():
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(tmp_path / name)
    places = [*(tmp_path / name for name in strips), images[0]]
    out = tmp_path / "out"
    options = dict(threshold=0, multi_label=True, batch_size=4)
    results = predict_files(detector, places, **options, output_dir=out)
    assert not results.unreadable and len(results) == 4
    for found, size in zip(results, strips.values()):
        assert found.detections.image_size == size and len(found.detections) == 8
        assert (found.detections.boxes <= [size[1], size[0], size[1], size[0]]).all()


def test_linked_folders_are_followed_once_and_never_in_a_circle(detector, tmp_path):
    for name in ("in", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("in/0.png", "elsewhere/1.png", "elsewhere/deep/2.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/again").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/deep/up").symlink_to("..")
    (tmp_path / "in/nowhere").symlink_to("nothing")
    results = predict_files(detector, tmp_path / "in", progress=False)
    assert [found.name for found in results] == ["0.png", "again/2.png", "linked/1.png"]
    assert not results.unreadable and results.passed_over == {"": 1}


def test_a_pipe_among_the_files_is_named_and_the_others_are_done(detector, tmp_path):
    for name in ("0.png", "2.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    for name in ("1.png", "clip.mp4"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "dangling.jpg").symlink_to("nothing")
    results = predict_files(detector, tmp_path, progress=False)
    assert [found.name for found in results] == ["0.png", "2.png"]
    assert results.num_files == 5 and len(results.unreadable) == 3
    for told, name, why in zip(
        sorted(results.unreadable), ("1.png", "clip.mp4", "dangling.jpg"), ("pipe", "pipe", "No s")
    ):
        assert name in told and why in told


def test_names_of_files_need_not_be_text(detector, tmp_path):
    names = [b"\xff.png", b"\xfe.png", "Größe 猫.png".encode()]
    for name in names:
        Image.new("RGB", (32, 32)).save(os.path.join(os.fsencode(tmp_path), name), "PNG")
    with open(os.path.join(os.fsencode(tmp_path), b"\xfe.png"), "wb"):
        pass  # cut off
    results = predict_files(detector, tmp_path, threshold=0, output_dir=tmp_path / "out")
    assert len(results) == 2 and len(results.unreadable) == 1
    text = (tmp_path / "out/predictions.csv").read_text(encoding="utf-8")
    assert "Größe 猫.png" in text and "\\udcff.png" in text


TIMES = [0.0, 0.1, 0.15, 0.2, 2.0, 7.5, 7.51]


@pytest.mark.parametrize(
    ("name", "codec", "start"),
    [("a.mp4", "libx264", 0), ("b.mkv", "libx264", 3.5), ("c.webm", "libvpx", 0)],
)
def test_frames_keep_their_times_in_the_copy_and_in_the_results(
    detector, tmp_path, name, codec, start
):
    (tmp_path / "in").mkdir()
    video(tmp_path / "in" / name, times=[start + time for time in TIMES], codec=codec)
    out = tmp_path / "out"
    options = dict(threshold=0, multi_label=True, batch_size=3, progress=False)
    results = predict_files(detector, tmp_path / "in" / name, output_dir=out, **options)
    assert [found.time for found in results] == TIMES and not results.unreadable
    copied, duration = times_of(next(path for path in out.iterdir() if path.suffix == ".mp4"))
    assert copied == TIMES and duration > TIMES[-1]
    images = json.loads((out / "predictions.json").read_text())["images"]
    assert [image["time"] for image in images] == TIMES
    rows = csv.DictReader((out / "predictions.csv").open())
    assert {int(row["frame"]): float(row["time"]) for row in rows} == dict(enumerate(TIMES))
    path, name, frame, detections = results.found[4]
    assert frame == 4 and len(detections) == 8 and name in path


def test_a_video_without_times_runs_at_its_rate(detector, tmp_path):
    video(tmp_path / "raw.h264", times=[number / 10 for number in range(5)])
    (tmp_path / "raw.h264").rename(tmp_path / "raw.ts")  # by its content, which has no times
    results = predict_files(detector, tmp_path / "raw.ts", progress=False)
    steps = np.diff([found.time for found in results])
    assert len(steps) == 4 and (steps > 0).all() and np.allclose(steps, steps[0])


def test_videos_without_a_whole_frame_or_of_one_pixel_are_named_and_others_done(detector, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    video(root / "good.mp4")
    video(root / "pixel.mkv", size=(1, 1), codec="ffv1")
    video(root / "whole.mkv", times=[0, 1, 2])
    content = (root / "whole.mkv").read_bytes()
    (root / "cut.mkv").write_bytes(content[: content.index(b"\x1f\x43\xb6\x75") + 30])
    (root / "whole.mkv").unlink()
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.avi").write_text("no video")
    Image.new("RGB", (32, 32)).save(root / "picture.mp4", "PNG")
    results = predict_files(detector, root, output_dir=tmp_path / "out", progress=False)
    assert [found.name for found in results] == ["good.mp4"] * 3
    names = ("cut.mkv", "empty.mp4", "picture.mp4", "pixel.mkv", "text.avi")
    told = dict(zip(names, results.unreadable))
    assert len(told) == len(results.unreadable) == 5
    assert all(f"{root}/{name}: " in message for name, message in told.items())
    assert "its frames are of 1 x 1 pixels" in told["pixel.mkv"]
    assert "there is no whole frame in it" in told["cut.mkv"]
    assert "it is a picture (PNG) whose name is that of a video" in told["picture.mp4"]
    assert "it is damaged, or no video of a format that is read (asf," in told["text.avi"]
    copies = {path.name for path in (tmp_path / "out").iterdir()}
    assert copies == {"predictions.json", "predictions.csv", "good.mp4"}


@pytest.mark.parametrize(("name", "options"), [("a.mkv", {}), ("b.mp4", {"movflags": "faststart"})])
def test_a_video_that_has_lost_its_end_says_so(name, options, detector, tmp_path):
    path = tmp_path / name
    sound = 16 if name.endswith("mkv") else 0  # longer than the pictures, whose end is not lost
    video(path, times=[number / 5 for number in range(40)], options=options, sound=sound)
    content = path.read_bytes()
    assert not predict_files(detector, path, progress=False).unreadable
    path.write_bytes(content[: len(content) // 2])
    results = predict_files(detector, path, progress=False)
    assert 0 < len(results) < 36
    (told,) = results.unreadable
    assert re.search(
        r": its pictures end after [0-7]\.\d of the [78]\.\d s that it says it has", told
    )


def test_videos_of_one_name_stay_apart_and_links_are_followed(checkpoint, folder, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("clip.avi", "clip.mp4"):
        shutil.copy(folder / "clip.mp4", videos / name)
    out = tmp_path / "out"
    assert predict("--checkpoint", checkpoint, videos, "--output-dir", out) == 0
    assert {p.name for p in out.iterdir()} >= {"clip.avi.mp4", "clip.mp4"}
    (tmp_path / "link").symlink_to(videos)
    assert predict("--checkpoint", checkpoint, videos, "--output-dir", tmp_path / "link") == 2
    assert "would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["foo", ":1", "cuda:x", "meta", "cpu:1:2", "cuda:99", "xla"])
def test_a_device_that_is_none_is_told_in_a_line(checkpoint, images, capsys, device):
    assert main(["predict", "--checkpoint", str(checkpoint), str(images[0]), f"--device={device}"])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"stage-interactor: device {device!r} (--device): ") and "cpu" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {a: [1, 2\ntrain: x\n", "cannot be read as a config: while parsing"),
        (b"model: 1\n\tx: 2\n", "cannot be read as a config: while scanning"),
        (b"\xff\xfe", "cannot be read as a config: 'utf-8' codec"),
        (b"", "is no config: it holds no keys"),
        (b"- 1\n- 2\n", "is no config: it holds no keys"),
        (b"names: [a, b]\n", "lacks the sections model, dataloader, train, and has names"),
        (b"model: {}\ntrain: 2\n", "lacks the sections dataloader, train"),
    ],
)
def test_a_broken_config_is_told_in_a_line(checkpoint, images, tmp_path, capsys, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    commands = [["predict", "--checkpoint", str(checkpoint), str(images[0])], ["train"]]
    for command in commands:
        assert main([*command, "--config-file", str(path)]) == 2
        *_, told = capsys.readouterr().err.splitlines()
        assert told.startswith(f"stage-interactor: {path} ") and message in told


def test_a_syntax_error_in_a_config_is_told_in_a_line(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("x = (\n")
    assert main(["train", "--config-file", str(path)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "syntax error" in told and str(path) in told


def test_a_device_that_is_not_there(checkpoint, images, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert (
        main(["predict", "--checkpoint", str(checkpoint), str(images[0]), "--device", "cuda"]) == 2
    )
    assert "PyTorch finds no CUDA here" in capsys.readouterr().err
