"""What is kept of each object at every evaluation, and what a report makes of it."""

import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch

from stage_interactor import get_config, train
from stage_interactor.commands import main
from stage_interactor.config import build
from stage_interactor.d2 import comm
from stage_interactor.d2 import transforms as T
from stage_interactor.data import DetrDatasetMapper
from stage_interactor.engine.flight_recorder import FlightRecorder
from stage_interactor.engine.validation import ValidationLoss
from stage_interactor.inference.blueprint import load_model
from stage_interactor.pages.flight import (
    FAR,
    LOST,
    OTHERS,
    TAKEN,
    UNSURE,
    Flight,
    matching_section,
    missed_section,
    read_flight,
    read_flights,
    why_missed,
)
from stage_interactor.pages.matching import ImageResult
from stage_interactor.pages.object_trace import DROPPED, KEPT, OUT_OF_SCOPE, ObjectTrace

OPTIONS = [
    "train.device=cpu", "train.amp.enabled=false", "train.max_iter=4", "train.eval_period=2",
    "train.flight_recorder.enabled=true",
]  # fmt: skip


def options(folder, shapes, *more):
    return [f"train.output_dir={folder}", f"shapes.root={shapes}", *OPTIONS, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes):
    folder = str(tmp_path_factory.mktemp("flights") / "out")
    train("tests/tiny_config.py", options(folder, shapes))
    return folder


def images_of(shapes, augmentation=()):
    cfg = get_config("tests/tiny_config.py", [f"shapes.root={shapes}"])
    mapper = DetrDatasetMapper(augmentation=list(augmentation), is_train=False, with_objects=True)
    return [mapper(record) for record in build(cfg, "dataloader.test.dataset")]


def detector_of(run):
    path = os.path.join(run, "model_final.pth")
    return load_model(path, "tests/tiny_config.py")[0]


def test_every_evaluation_leaves_what_its_stages_made_of_the_objects(run, shapes):
    flights = read_flights(run)
    assert [*flights] == [1, 3]
    with open(os.path.join(run, "results.json")) as file:
        assert "validation" not in json.load(file)  # which were not asked for
    last = flights[3]
    model = detector_of(run)
    images = images_of(shapes)
    assert last.image_ids.tolist() == [str(image["image_id"]) for image in images]
    assert last.class_names.tolist() == ["ellipse", "rectangle", "triangle", "cross", "ring"]
    start = 0
    labelled = last.queries_labelled
    for number, image in enumerate(images):
        objects = image["instances"]
        rows = slice(start, start + len(objects))
        start += len(objects)
        assert (last.image[rows] == number).all()
        np.testing.assert_allclose(last.boxes[rows], objects.gt_boxes.tensor, atol=1e-4)
        assert last.classes[rows].tolist() == objects.gt_classes.tolist()
        batch = model.preprocess([image])
        with torch.no_grad():
            stages = model.decode(batch.tensor, batch.sizes)
        alone = FlightRecorder(last.class_names)
        alone.add(model.criterion, stages, [image], [objects])
        (row,) = alone._rows
        for name in ("query", "labels"):
            assert np.array_equal(getattr(last, name)[rows], row[name]), name
        for name in ("iou", "nearest", "score"):
            np.testing.assert_allclose(getattr(last, name)[rows], row[name], atol=1e-4)
        for index in range(len(objects)):
            for stage, output in enumerate(stages):
                query = int(row["query"][index, stage])
                score = output.logits[0, query, objects.gt_classes[index]].sigmoid()
                assert row["score"][index, stage] == pytest.approx(float(score), abs=1e-5)
        trace = ObjectTrace(
            *(torch.from_numpy(row[name]).movedim(0, -1) for name in ObjectTrace._fields)
        )
        assert np.array_equal(labelled[rows].T, trace.queries_labelled.numpy())
    assert start == len(last.image)


def test_boxes_are_in_pixels_of_the_picture(run, shapes):
    """Whatever size the model sees it in."""
    model = detector_of(run)
    recorder = FlightRecorder(["a"] * 5)
    detector = ValidationLoss(model, recorder=recorder)
    for image in images_of(shapes, [T.ResizeShortestEdge(96, 200)]):
        assert max(image["image"].shape[1:]) >= 96
        detector([image])
    boxes = np.concatenate([row["boxes"] for row in recorder._rows])
    np.testing.assert_allclose(boxes, read_flights(run)[3].boxes, atol=0.01)


def test_some_images_alone_and_those_that_are_not_there(tmp_path, shapes):
    names = [os.path.basename(image["file_name"]) for image in images_of(shapes)]
    wanted = f"train.flight_recorder.images=[{names[3]},{names[5]},nothing.jpg]"
    train("tests/tiny_config.py", options(tmp_path, shapes, wanted))
    log = (tmp_path / "log.txt").read_text()
    assert "not among those evaluated: ['nothing.jpg']" in log
    flights = read_flights(str(tmp_path))
    ids = [str(images_of(shapes)[index]["image_id"]) for index in (3, 5)]
    assert flights[3].image_ids.tolist() == ids
    # Another training sets them aside, and an evaluation alone has a name of its own.
    train("tests/tiny_config.py", [*options(tmp_path, shapes), "train.eval_period=0"])
    assert [*read_flights(str(tmp_path))] == [3]
    assert [*read_flights(str(tmp_path / "earlier_run_1"))] == [1, 3]
    cfg = get_config("tests/tiny_config.py", options(tmp_path, shapes))
    train(cfg, checkpoint=str(tmp_path / "model_final.pth"), eval_only=True)
    assert [*read_flights(str(tmp_path / "eval_only"))] == [-1]


def test_the_images_of_all_processes(run, shapes, tmp_path, monkeypatch):
    model = detector_of(run)
    halves = []
    for images in (images_of(shapes)[:4], images_of(shapes)[4:]):
        halves.append(FlightRecorder(["ellipse", "rectangle", "triangle", "cross", "ring"]))
        detector = ValidationLoss(model, recorder=halves[-1])
        for image in images:
            detector([image])
    other = (halves[1]._image_ids, halves[1]._rows, halves[1]._found)
    monkeypatch.setattr(comm, "all_gather", lambda own: [own, other])
    halves[0].write(tmp_path, 3)
    together, alone = read_flights(str(tmp_path))[3], read_flights(run)[3]
    assert together.has_objects_of(alone) and np.array_equal(together.query, alone.query)


def test_a_report_tells_how_matches_wander_and_why_objects_are_missed(run, capsys):
    assert main(["report", run, "--threshold", "0.9"]) == 0
    with open(os.path.join(run, "report.html")) as file:
        page = file.read()
    assert "Objects with another query than at the evaluation before" in page
    objects = len(read_flights(run)[3].image)
    assert f"{objects} objects that no detection finds" in page  # a threshold that nothing passes
    assert (
        page.count("<td>no query came near enough</td>")
        + page.count("<td>its query is not sure enough of the class</td>")
        + page.count("<td>a box is near enough, of a query that matching does not give it</td>")
        + page.count("<td>an earlier stage had it, the last one does not</td>")
        == objects
    )


def flight(query, iou=None, score=None, labels=None, nearest=None):
    query = np.array(query, dtype=np.int32)
    count, stages = query.shape
    iou = np.zeros(query.shape, dtype=np.float32) if iou is None else np.array(iou, np.float32)
    score = (
        np.zeros(query.shape, dtype=np.float32) if score is None else np.array(score, np.float32)
    )
    if labels is None:
        labels = np.full((count, stages, stages), OUT_OF_SCOPE, dtype=np.int8)
    boxes = np.array([[10.0 * i, 0, 10.0 * i + 8, 8] for i in range(count)], dtype=np.float32)
    image = np.zeros(count, dtype=np.int32)
    names = np.array(["7"]), np.array(["cat", "dog"])
    classes = np.zeros(count, np.int32)
    nearest = iou if nearest is None else np.array(nearest, np.float32)
    return Flight(*names, image, boxes, classes, query, iou, nearest, score, labels)


def test_the_reasons():
    found = flight(
        [[1, 1], [2, 2], [3, 3], [4, 4], [5, 5]],
        iou=[[0.1, 0.49], [0.6, 0.4], [0.2, 0.5], [0.9, 0.9], [0.3, 0.3]],
        nearest=[[0.1, 0.49], [0.6, 0.4], [0.2, 0.5], [0.9, 0.9], [0.6, 0.5]],
        score=[[0.9, 0.9], [0.9, 0.9], [0.9, 0.29], [0.1, 0.3], [0.9, 0.9]],
    )
    assert [why_missed(found, i, 0.3) for i in range(5)] == [FAR, LOST, UNSURE, TAKEN, OTHERS]
    result = ImageResult(
        7, "a/b.jpg", np.vstack([found.boxes + 0.4, [[90.0, 90, 95, 95]]]).astype(float),
        np.array([0, 0, 0, 0, 0, 0]), np.zeros((0, 4)), np.array([], int), np.array([]),
        np.array([3]),
    )  # fmt: skip
    shown = missed_section({5: found}, 5, [result], ["cat", "dog"], [0.3, 0.3])
    assert shown is not None and "4 objects that no detection finds" in shown["text"]
    assert "Of 1 more nothing was recorded" in shown["text"]
    reasons = [row[3] for row in shown["table"][1:]]
    assert sorted(reasons) == sorted([FAR, LOST, UNSURE, OTHERS])
    dogs = result._replace(object_classes=np.array([1, 1, 1, 1, 1, 1]))
    assert missed_section({5: found}, 5, [dogs], ["cat", "dog"], [0.3, 0.3]) is None
    other = missed_section({5: found}, 9, [result], ["cat", "dog"], [0.3, 0.3])
    assert other is not None and "of iteration 5, and the detections are of" in other["text"]
    twice = found._replace(boxes=np.tile(found.boxes[:1], (5, 1)))
    same = result._replace(object_boxes=np.tile(found.boxes[:1].astype(float), (6, 1)))
    shown = missed_section({5: twice}, 5, [same], ["cat", "dog"], [0.3, 0.3])
    assert shown is not None and len({tuple(row) for row in shown["table"][1:]}) == 5


def test_how_matches_wander():
    before = flight([[1, 1, 2], [3, 3, 3]], iou=[[0.5, 0.5, 0.7], [0.1, 0.1, 0.1]])
    labels = np.full((2, 3, 3), OUT_OF_SCOPE, dtype=np.int8)
    labels[0, 2] = [KEPT, KEPT, KEPT]  # queries 1, 1 and 2
    labels[0, 1] = [DROPPED, KEPT, DROPPED]
    now = flight([[1, 1, 2], [4, 3, 3]], iou=[[0.5, 0.5, 0.9]] * 2, labels=labels)
    assert now.queries_labelled.tolist() == [[0, 1, 2], [0, 0, 0]]
    shown = matching_section({10: before, 20: now})
    titles = [title for title, _ in shown["charts"]]
    assert len(titles) == 4
    assert [row[1:] for row in shown["table"][1:]] == [
        ("0.500", "0.00", ""), ("0.500", "0.50", "50.0"), ("0.900", "1.00", "50.0"),
    ]  # fmt: skip
    others = before._replace(boxes=before.boxes + 1)
    assert len(matching_section({10: others, 20: now})["charts"]) == 3
    unmatched = flight([[1, -1, -1], [2, 2, 3]], iou=[[0.5, 0, 0], [0.7, 0.8, 0.9]])
    shown = matching_section({-1: unmatched})["table"][1:]
    assert [row[1] for row in shown] == ["0.600", "0.800", "0.900"]
    assert [row[3] for row in shown] == ["", "50.0", "100.0"]
    nothing = flight(np.zeros((0, 3)))
    assert matching_section({10: nothing, 20: nothing})["table"][1] == (1, "", "", "")


class Planted:
    def __reduce__(self):
        return os.system, ("touch planted",)


def write(path, **changes):
    arrays = flight([[1, 2], [3, 4]])._asdict() | changes
    np.savez(path, **arrays)


def test_files_of_others(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "flight_0000003.npz")
    write(path)
    read_flight(path)
    wrong = [
        {"image": np.array([0, 1], np.int32)},  # there is one image
        {"image": np.array([-1, 0], np.int32)},
        {"classes": np.array([0, 2], np.int32)},
        {"query": np.array([1, 2], np.int32)},
        {"query": np.ones((2, 2))},
        {"boxes": np.full((2, 4), np.nan)},
        {"boxes": np.zeros((2, 3))},
        {"labels": np.zeros((2, 2, 3), np.int8)},
        flight(np.zeros((1, 101)))._asdict(),
        {"class_names": np.array([1, 2])},
        {"image_ids": np.array("7")},
        {"score": np.array([["a", "b"], ["c", "d"]])},
        {"image_ids": np.array([Planted()], dtype=object)},
    ]
    for changes in wrong:
        write(path, **changes)
        with pytest.raises(ValueError, match="is not what a flight recorder writes"):
            read_flight(path)
    for content in (b"", b"PK", b"\x93NUMPY", os.urandom(1000)):
        with open(path, "wb") as file:
            file.write(content)
        with pytest.raises(ValueError, match="is not what a flight recorder writes"):
            read_flight(path)
    write(path)
    whole = open(path, "rb").read()
    for at in range(0, len(whole), 37):  # a bad block of a disk
        with open(path, "wb") as file:
            file.write(whole[:at] + b"\xff" * 16 + whole[at + 16 :])
        try:
            read_flight(path)
        except ValueError as error:
            assert "is not what a flight recorder writes" in str(error)
    for header in (
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999, 4), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }",
        b"{'descr': '<i4', 'shape': (2, 2), }",
        b"__import__('os').system('touch planted')",
    ):
        write(path)
        with zipfile.ZipFile(path) as archive:
            parts = {item: archive.read(item) for item in archive.namelist()}
        parts["query.npy"] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        with zipfile.ZipFile(path, "w") as archive:
            for item, content in parts.items():
                archive.writestr(item, content)
        with pytest.raises(ValueError, match="is not what a flight recorder writes"):
            read_flight(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("query.npy", bytes(2**28 + 1))
    assert os.path.getsize(path) < 2**20
    with pytest.raises(ValueError, match="more than a run can have"):
        read_flight(path)
    assert not os.path.exists("planted")
    os.remove(path)
    os.mkfifo(path)
    with pytest.raises(OSError, match="flight_0000003.npz: .*pipe"):
        read_flight(path)
    # The rest of a report is shown.
    bad = os.path.join(run, "flight_0000009.npz")
    with open(bad, "wb") as file:
        file.write(b"x")
    try:
        assert main(["report", run, "--output", str(tmp_path / "page.html")]) == 0
    finally:
        os.remove(bad)
    page = (tmp_path / "page.html").read_text()
    assert re.search("The matching cannot be shown: .*flight_0000009.npz is not what", page)
    assert "AP by class" in page
