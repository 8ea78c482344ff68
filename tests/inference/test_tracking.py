"""Objects of videos keep their ids: in Python, in what is written, and in the annotated copies."""

import csv
import json
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.d2 import transforms
from stage_interactor.d2.structures import Boxes, Instances
from stage_interactor.inference.detector import Detections
from stage_interactor.inference.predict import predict_files
from stage_interactor.inference.tracking import Tracker, given_and_faint

SIZE = 96
SIDE = 14
RED, GREEN = (230, 20, 20), (20, 230, 20)


def finds_squares(score=lambda frame, colour: 0.9):
    """A stand-in for a model: the red and the green square of a frame, of two classes.

    A frame that is all white is unusable. Its scores are of the frame's number, which it counts.
    """
    seen = []

    def model(inputs):
        outputs = []
        for item in inputs:
            picture = item["image"].float()
            seen.append(len(seen))
            boxes, scores, classes = [], [], []
            for colour in (0, 1):
                # Half of the colour is lost at the borders, where the video blurs it.
                found = (picture[colour] > 120) & (picture[1 - colour] < 110)
                if found.sum() > 20:
                    rows, columns = found.any(1).nonzero(), found.any(0).nonzero()
                    corners = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                    boxes.append([float(value) for value in corners])
                    scores.append(score(seen[-1], colour))
                    classes.append(colour)
            if picture.mean() > 200:
                boxes, scores, classes = [[float("nan")] * 4], [0.9], [0]
            tensor = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
            found = Instances(picture.shape[1:], pred_boxes=Boxes(tensor))
            found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes).long()
            outputs.append({"instances": found})
        return outputs

    categories = [{"id": 7, "name": "red"}, {"id": 9, "name": "green"}]
    return Detector(model, categories, transforms.AugmentationList([]))


def frame_with(*squares):
    """Each is its colour, left and top."""
    picture = np.full((SIZE, SIZE, 3), 20, np.uint8)
    for colour, left, top in squares:
        picture[top : top + SIDE, max(left, 0) : max(left + SIDE, 0)] = colour
    return picture


def write_video(path, frames, rate=10):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv444p"
        for picture in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())
    return path


@pytest.fixture
def trackers():
    pytest.importorskip("trackers", reason="needs stage-interactor[track]")


def tracks_of(results):
    """By frame: ids by class name."""
    return [dict(zip(d.names, d.tracks.tolist())) for _, _, _, d in results]


def test_two_that_cross_keep_their_ids(trackers, tmp_path):
    frames = [frame_with((RED, 4 + 4 * t, 30), (GREEN, 78 - 4 * t, 38)) for t in range(19)]
    path = write_video(tmp_path / "cross.mp4", frames)
    found = tracks_of(predict_files(finds_squares(), path, track=True, progress=False))
    assert len(found) == 19
    assert set(found[0].values()) == {-1}  # one frame is no track yet
    assert set(found[1].values()) == {1, 2}
    assert all(frame == found[1] for frame in found[1:])


@pytest.mark.parametrize(("gap", "same"), [(6, True), (25, False)])
def test_what_comes_back_within_a_second_is_the_same(trackers, tmp_path, gap, same):
    seen = [frame_with((RED, 4 + t, 30)) for t in range(8)]
    back = [frame_with((RED, 12 + gap + t, 30)) for t in range(4)]
    path = write_video(tmp_path / "gone.mp4", [*seen, *[frame_with()] * gap, *back], rate=10)
    found = tracks_of(predict_files(finds_squares(), path, track=True, progress=False))
    ids = [frame.get("red") for frame in found]
    assert ids[:8] == [-1, *[1] * 7] and ids[8 : 8 + gap] == [None] * gap
    assert ids[8 + gap :] == ([1] * 4 if same else [-1, 2, 2, 2])


def test_slow_videos_are_tracked_too(trackers, tmp_path):
    """A frame in five seconds: each is further from the last than a lost object is waited for."""
    frames = [frame_with((RED, 4 + 2 * t, 30)) for t in range(8)]
    path = write_video(tmp_path / "slow.mp4", frames, rate=Fraction(1, 5))
    found = tracks_of(predict_files(finds_squares(), path, track=True, progress=False))
    ids = [frame["red"] for frame in found]
    assert ids[2:] == [ids[2]] * 6 and ids[2] > 0


def test_unusable_frames_are_left_out_and_interrupt_no_track(trackers, tmp_path):
    frames = [frame_with((RED, 4 + 2 * t, 30)) for t in range(10)]
    frames[4] = frames[5] = np.full_like(frames[0], 255)
    path = write_video(tmp_path / "white.mp4", frames)
    results = predict_files(finds_squares(), path, track=True, batch_size=4, progress=False)
    assert [item.frame for item in results] == [0, 1, 2, 3, 6, 7, 8, 9]
    assert [ids["red"] for ids in tracks_of(results)] == [-1, *[1] * 7]
    assert "2 of 10 frames are left out" in results.unreadable[0]


def test_what_is_below_the_threshold_keeps_a_track_and_is_not_given(trackers, tmp_path):
    scores = {0: lambda frame: 0.9 if frame < 5 or frame > 24 else 0.2, 1: lambda frame: 0.2}
    detector = finds_squares(lambda frame, colour: scores[colour](frame))
    frames = [frame_with((RED, 4 + 2 * t, 30), (GREEN, 40, 70)) for t in range(30)]
    path = write_video(tmp_path / "faint.mp4", frames)
    options = {"track": True, "progress": False}
    found = tracks_of(predict_files(detector, path, threshold=0.5, **options))
    # For two seconds, longer than an object that is not found at all is waited for.
    assert found == [{"red": -1}, *[{"red": 1}] * 4, *[{}] * 20, *[{"red": 1}] * 5]
    # Also of a class of which less is asked.
    faint = finds_squares(lambda *_: 0.2)
    found = tracks_of(predict_files(faint, path, threshold={"green": 0.15}, **options))
    assert found == [{"green": -1}, *[{"green": 1}] * 29]


def test_given_is_the_same_as_without_tracking():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 50, (40, 2)).astype(np.float32)
    boxes = np.concatenate((boxes, boxes + rng.uniform(5, 30, (40, 2))), 1).astype(np.float32)
    boxes[20:] = boxes[:20]  # each query has a second class
    scores, classes = rng.uniform(0, 1, 40).astype(np.float32), rng.integers(0, 2, 40)
    raw = Detections(boxes, scores, classes, tuple("rg"[index] for index in classes), (80, 80))
    detector = finds_squares()
    for options in ({}, {"nms": 0.5}, {"max_detections": 5}, {"classes": ["red"]}):
        select = detector.select({"red": 0.6, "green": 0.2}, **options)
        given, faint = given_and_faint(raw, select)
        kept = select(boxes, scores, classes)
        assert np.array_equal(given.scores, scores[kept])
        assert not {box.tobytes() for box in faint} & {box.tobytes() for box in given.boxes}
    given, faint = given_and_faint(raw, detector.select(0.5))
    assert len(faint) and len(given)


def test_times_that_stand_still_or_go_back_are_no_end(trackers):
    tracker = Tracker(10)
    one = np.array([[10, 10, 30, 30]], np.float32)
    found = Detections(one, np.ones(1, np.float32), np.zeros(1, int), ("red",), (SIZE, SIZE))
    faint = np.empty((0, 4), np.float32)
    ids = [tracker.update(found, faint, time).tracks.tolist() for time in (3.0, 3.0, 1.0, 1.1, 3.2)]
    assert ids == [[-1], [1], [1], [1], [1]] and tracker.next_id == 2


def test_ids_are_in_all_that_is_written(trackers, tmp_path, monkeypatch, capsys):
    root = tmp_path / "in"
    root.mkdir()
    frames = [frame_with((RED, 4 + 4 * t, 30), (GREEN, 60, 70)) for t in range(6)]
    write_video(root / "a.mp4", frames)
    write_video(root / "b.mp4", frames[:3])
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_squares())
    out = tmp_path / "out"
    command = ["predict", "--checkpoint", "any", f"{root}", "--output-dir"]
    assert main([*command, f"{out}", "--track"]) == 0

    content = json.loads((out / "predictions.json").read_text())
    assert content["videos"] == [{"id": 1, "name": "a.mp4"}, {"id": 2, "name": "b.mp4"}]
    assert [image["video_id"] for image in content["images"]] == [1] * 6 + [2] * 3
    of_first = [item for item in content["annotations"] if item["image_id"] in (1, 7)]
    assert len(of_first) == 4 and not any("track_id" in item for item in of_first)
    by_video: dict[int, set] = {1: set(), 2: set()}
    for item in content["annotations"]:
        if "track_id" in item:
            by_video[item["video_id"]].add(item["track_id"])
    # An id is one object in all of the file.
    assert by_video == {1: {1, 2}, 2: {3, 4}}

    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert list(rows[0])[-1] == "track" and len(rows) == len(content["annotations"]) == 18
    ids = [str(item.get("track_id", "")) for item in content["annotations"]]
    assert [row["track"] for row in rows] == ids

    def drawn(folder):
        with av.open(str(folder / "a.mp4")) as file:
            return [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)]

    plain = tmp_path / "plain"
    assert main([*command, f"{plain}"]) == 0
    assert "track" not in (plain / "predictions.csv").read_text().splitlines()[0]
    without = json.loads((plain / "predictions.json").read_text())
    assert "videos" not in without and "video_id" not in without["images"][0]
    # What is found is the same.
    keys = ("bbox", "score", "category_id", "image_id")
    assert [[a[key] for key in keys] for a in without["annotations"]] == [
        [a[key] for key in keys] for a in content["annotations"]
    ]
    # Behind the red square, where it was, is a line of its colour.
    tracked, untracked = (drawn(folder)[5][37, 16:22] for folder in (out, plain))
    assert tracked[:, 0].min() > 100 > untracked.max() and tracked[:, 2].max() < 100


def test_pictures_several_boxes_and_a_missing_package_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_squares())
    Image.fromarray(frame_with()).save(tmp_path / "still.png")
    command = ["predict", "--checkpoint", "any", "--track", "--output-dir", f"{tmp_path}/out"]
    monkeypatch.setitem(sys.modules, "trackers", None)
    assert main([*command, f"{tmp_path}/still.png"]) == 2
    assert "pip install 'stage-interactor[track]'" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("trackers", reason="needs stage-interactor[track]")
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_squares())
    assert main([*command, f"{tmp_path}/still.png"]) == 2
    assert "still.png is a picture, and objects are tracked" in capsys.readouterr().err
    assert main([*command, "--multi-label", f"{tmp_path}/still.png"]) == 2
    assert "several boxes, which cannot be tracked" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_detections_hand_their_tracks_on():
    boxes = np.array([[0, 0, 9, 9], [20, 20, 40, 40]], np.float32)
    of = (np.array([0.9, 0.8], np.float32), np.array([1, 0]), ("green", "red"), (SIZE, SIZE))
    plain, tracked = Detections(boxes, *of), Detections(boxes, *of, np.array([4, -1]))
    assert plain.tracks is None and plain.to_supervision().tracker_id is None
    assert plain[:1].tracks is None and not plain.to_instances().has("ID")
    assert tracked[1].tracks.tolist() == [-1]
    assert tracked.to_supervision().tracker_id.tolist() == [4, -1]
    assert tracked.to_instances().ID == [4, -1]
