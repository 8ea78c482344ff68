"""Live sources: what comes, what is lost and comes back, what ends, and what is no stream."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from streaming import (
    closed_port,
    encoded,
    http_server,
    packets_of_rtp,
    picture,
    rtsp_server,
)

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.d2 import transforms
from stage_interactor.d2.detections import UnusableDetectionsError
from stage_interactor.d2.structures import Boxes, Instances
from stage_interactor.errors import TRACE, end_on_signals
from stage_interactor.inference import streams
from stage_interactor.inference.live import predict_live
from stage_interactor.inference.live_addresses import live_address
from stage_interactor.inference.sources import Frame, VideoWriter
from stage_interactor.inference.streams import LiveFrames, LiveSourceError

SECRET = "s3cret"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(streams, "_FIRST_PAUSE", 0.05)


def finds_the_grey(pause=0.0):
    """A stand-in for a model: a box on each frame whose score is its grey value; NaN on white."""

    def model(inputs):
        time.sleep(pause)
        outputs = []
        for item in inputs:
            value = float(item["image"].float().mean()) / 255
            found = Instances(item["image"].shape[1:])
            corner = float("nan") if value > 0.97 else 20.0
            found.pred_boxes = Boxes(torch.tensor([[2.0, 2.0, corner, 20.0]]))
            found.scores, found.pred_classes = torch.tensor([value]), torch.zeros(1).long()
            outputs.append({"instances": found})
        return outputs

    return Detector(model, [{"id": 3, "name": "grey"}], transforms.AugmentationList([]))


def greys(frames):
    return [round(float(frame.picture.mean())) for frame in frames]


def taken(address, most=None, **options):
    """The frames that come, and why they end."""
    found = []
    with LiveFrames(live_address(address), **options) as frames:
        try:
            for frame in frames:
                found.append(frame)
                if len(found) == most:
                    return found, None, frames
        except LiveSourceError as error:
            return found, str(error), frames
    return found, None, frames


def test_a_stream_that_breaks_off_and_comes_back_is_connected_again(caplog):
    def answer(request, number):
        request.multipart()
        for index in range(4):
            request.part(picture(40 * (number + 1) + index))

    with http_server(answer) as server:
        found, end, frames = taken(f"{server.address}/cam?token={SECRET}", reconnect=2, timeout=3)
    assert {round(value / 40) for value in greys(found)} == {1, 2, 3}
    times = [frame.time for frame in found]
    assert times == sorted(times) and times[0] == 0 and times[-1] > 0.2
    shown = server.address.replace(f"user:{SECRET}@", "")
    assert end.startswith(f"{shown}: lost after {frames.received} frames (")
    assert end.endswith("; 2 tries to connect again did not last")
    first, second = (record.getMessage() for record in caplog.records)
    assert "connecting again in 0.05 s, try 1 of 2" in first and "in 0.1 s, try 2 of 2" in second
    assert SECRET not in f"{end}{first}{second}" and len(server.requests) == 3


def test_a_connection_that_was_a_good_one_has_all_tries_again(monkeypatch):
    monkeypatch.setattr(streams, "_STEADY", 0.0)

    def answer(request, number):
        if number > 3:  # from then on for good
            return
        request.multipart()
        for _ in range(4):
            request.part(picture(100))

    with http_server(answer) as server:
        found, end, _ = taken(server.address, reconnect=1, timeout=3)
    assert len(server.requests) == 5 and "1 tries to connect again did not last" in end


def test_a_stream_that_stalls_is_left_after_the_timeout():
    released = threading.Event()

    def answer(request, number):
        request.multipart()
        for value in range(50, 60):
            request.part(picture(value))
        if number == 0:
            released.wait(5)

    with http_server(answer) as server:
        start = time.monotonic()
        found, end, _ = taken(server.address, reconnect=1, timeout=0.4)
        released.set()
    assert 0.4 < time.monotonic() - start < 3
    assert len(server.requests) == 2 and len(found) >= 3


def test_the_newest_frame_is_given_and_others_are_dropped():
    def answer(request, _):
        request.multipart()
        for value in range(20, 220, 2):
            request.part(picture(value), pause=0.01)

    with http_server(answer) as server, LiveFrames(live_address(server.address)) as frames:
        coming = iter(frames)
        values = []
        for frame in coming:
            values.append(frame.picture.mean())
            time.sleep(0.2)
            if len(values) == 4:
                break
    steps = np.diff(values)
    assert (steps[1:] > 10).all()  # of the 20 that have come meanwhile
    # The first ones come at once, when the stream is known.
    assert frames.dropped >= 40 and frames.received >= frames.dropped + len(values)


def test_seconds_are_the_end_also_where_nothing_comes_any_more():
    released = threading.Event()

    def answer(request, _):
        request.multipart()
        for value in range(50, 60):
            request.part(picture(value))
        released.wait(8)

    with http_server(answer) as server:
        start = time.monotonic()
        found, end, _ = taken(server.address, seconds=0.5, timeout=5)
        released.set()
    assert found and end is None and time.monotonic() - start < 3


ANSWERS = {
    "a picture": (lambda request: request.whole(b"\xff\xd8\xff\xe0" + bytes(99), "image/jpeg"),
                  "no live video in a format"),
    "a page": (lambda request: request.whole(b"<html>hello</html>" * 9, "text/html"),
               "no live video in a format"),
    "a playlist": (lambda request: request.whole(
        b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "application/vnd.apple.mpegurl"), "of a playlist (.m3u8, .mpd) name a stream itself"),
    "noise": (lambda request: request.whole(np.random.default_rng(0).bytes(200_000)),
              "no live video in a format"),
    "an error": (lambda request: request.handler.send_error(401), "401 Unauthorized"),
    "nothing": (lambda request: None, "End of file"),
    "silence": (lambda request: time.sleep(0.6), "nothing has come for 0.3 s"),
}  # fmt: skip


@pytest.mark.parametrize("what", ANSWERS)
def test_what_is_no_stream_is_told_in_a_line(what, tmp_path, monkeypatch, capsys):
    answer, message = ANSWERS[what]
    monkeypatch.setenv(TRACE, "")  # which --trace sets for all that comes after
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_the_grey())
    out = tmp_path / "out"
    command = ["predict", "--checkpoint", "any", "--output-dir", str(out), "--timeout", "0.3"]
    with http_server(lambda request, _: answer(request)) as server:
        assert main([*command, "--trace", f"{server.address}/{SECRET}"]) == 2
        deadline = time.monotonic() + 30
        while not server.requests and time.monotonic() < deadline:  # its thread may come late
            time.sleep(0.01)
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert message in told and SECRET not in told and not out.exists()
    assert len(server.requests) == 1  # what never was there is not tried again


def test_a_file_behind_http_is_named_as_a_file_instead(tmp_path):
    content = encoded([picture(90)] * 8, tmp_path / "clip.mp4", "mp4")
    with http_server(lambda request, _: request.whole(content, "video/mp4")) as server:
        found, end, _ = taken(f"{server.address}/clip.mp4", timeout=3)
    assert not found and "download it, and name the file" in end


@pytest.mark.parametrize("format", ["mpegts", "mp4"])
def test_video_over_http(format, tmp_path):
    fragments = {"movflags": "frag_keyframe+empty_moov"} if format == "mp4" else {}
    pictures = [picture(value) for value in range(40, 140, 5)]
    content = encoded(pictures, tmp_path / "video", format, **fragments)

    def answer(request, _):
        request.head()
        for start in range(0, len(content), 752):
            request.write(content[start : start + 752])
            time.sleep(0.005)

    with http_server(answer) as server:
        found, _, frames = taken(server.address, reconnect=0, timeout=3)
    assert frames.received >= 18 and abs(greys(found)[-1] - 135) < 8


def test_rtsp_over_its_own_connection(tmp_path):
    groups = packets_of_rtp([picture(value) for value in range(40, 240, 5)], tmp_path / "video")
    with rtsp_server(groups, pause=0.005) as address:
        found, end, frames = taken(address, reconnect=0, timeout=3)
    assert frames.received == 40 and found[-1].picture.shape == (48, 64, 3)
    assert abs(greys(found)[-1] - 235) < 8
    assert SECRET not in end and "/live" not in end


def test_what_is_damaged_in_between_is_passed_over():
    def answer(request, number):
        request.multipart()
        for index in range(6):
            request.part(picture(100 + index))
            broken = np.random.default_rng(index).bytes(500)
            request.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 500\r\n\r\n")
            request.write(broken + b"\r\n")
        time.sleep(0.2)

    with http_server(answer) as server:
        found, _, frames = taken(server.address, reconnect=0, timeout=3)
    assert frames.received == 6 and abs(greys(found)[-1] - 105) < 3


def camera(request, number):
    """Frames of one grey value, one that is white, then another size, and no end."""
    request.multipart()
    for _ in range(6):
        request.part(picture(120), pause=0.05)
    request.part(picture(255), pause=0.3)
    while True:
        request.part(picture(180, size=(96, 80)), pause=0.05)


def test_all_is_written_as_it_comes(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "predictions.json").write_text("of another run")
    seen = []

    class Watched(type(finds_the_grey())):
        def detect_prepared(self, inputs, select):
            table = out / "predictions.csv"
            seen.append(len(table.read_text().splitlines()) if table.exists() else None)
            return super().detect_prepared(inputs, select)

    plain = finds_the_grey()
    detector = Watched(plain.model, plain.categories, plain.augmentation)
    with http_server(camera) as server:
        options = dict(output_dir=out, progress=False, frames=16, threshold=0.2, track=False)
        result = predict_live(detector, f"{server.address}/{SECRET}", **options)
    assert result.num_frames == 16 and result.problem is None
    assert result.num_unusable == 1 and "NaN" in result.unusable
    assert result.num_objects == 15
    # The table has a line for each object so far, below its head.
    assert seen[0] == 1 and seen[-1] == 15

    name = live_address(server.address).name
    assert name == f"http_127.0.0.1_{server.address.rpartition(':')[2]}"
    content = json.loads((out / "predictions.json").read_text())
    assert content["categories"] == [{"id": 3, "name": "grey"}]
    assert len(content["images"]) == len(content["annotations"]) == 15
    frames = [image["frame"] for image in content["images"]]
    left_out = (set(range(16)) - set(frames)).pop()
    assert frames == sorted(frames) and result.unusable.startswith(f"frame {left_out}: ")
    assert content["images"][-1].items() >= {"width": 96, "height": 80, "file_name": name}.items()
    assert [item["image_id"] for item in content["annotations"]] == list(range(1, 16))
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [float(row["time"]) for row in rows] == [i["time"] for i in content["images"]]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["predictions.csv", "predictions.json", f"{name}.mp4", f"{name}_2.mp4"]
    )
    assert result.copies == [str(out / f"{name}.mp4"), str(out / f"{name}_2.mp4")]
    times = [image["time"] for image in content["images"] if image["width"] == 96]
    with av.open(result.copies[1]) as copy:
        written = list(copy.decode(video=0))
    assert [(frame.width, frame.height) for frame in written] == [(96, 80)] * len(times)
    of_copy = [frame.time for frame in written]
    assert np.allclose(of_copy, np.array(times) - times[0], atol=1e-3)
    drawn = written[0].to_ndarray(format="rgb24")
    assert not np.array_equal(drawn, np.broadcast_to(drawn[:1, :1], drawn.shape))
    assert SECRET not in (out / "predictions.json").read_text() + str(list(out.iterdir()))


def test_the_command_tells_what_was_lost_and_dropped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_the_grey(0.05))

    def answer(request, number):
        request.multipart()
        for value in range(100, 130):
            request.part(picture(value), pause=0.01)

    out = tmp_path / "out"
    command = ["predict", "--checkpoint", "any", "--output-dir", str(out), "--no-pictures"]
    with http_server(answer) as server:
        assert main([*command, "--reconnect", "0", server.address]) == 1
        told = capsys.readouterr().out
        assert main([*command, "--frames", "2", server.address]) == 0
        assert " objects in 2 frames " in capsys.readouterr().out
    first, lost = told.strip().splitlines()
    assert "more frames came meanwhile and were dropped" in first
    assert "lost after 30 frames" in lost and SECRET not in told
    assert sorted(os.listdir(out)) == ["predictions.csv", "predictions.json"]


def endless(request, _):
    request.multipart()
    while True:
        request.part(picture(120), pause=0.03)


def of_copy(path):
    with av.open(str(path)) as copy:
        return [frame.time for frame in copy.decode(video=0)]


@pytest.fixture
def program_s_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    end_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_and_all_is_written(
    number, tmp_path, monkeypatch, capsys, program_s_signals
):
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_the_grey())
    table = tmp_path / "predictions.csv"

    def interrupt():
        while not table.exists() or table.read_text().count("\n") < 6:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with http_server(endless) as server:
        command = ["predict", "--checkpoint", "any", "--output-dir", str(tmp_path)]
        try:
            status = main([*command, "--seconds", "30", server.address])
        except SystemExit as end:
            status = end.code
    assert status == {signal.SIGINT: 0, signal.SIGTERM: 143}[number]
    rows = list(csv.DictReader(table.open()))
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert 5 <= len(rows) < 60 and len(content["annotations"]) == len(rows)
    assert len(of_copy(next(tmp_path.glob("*.mp4")))) == len(rows)
    if number == signal.SIGINT:
        assert f"{len(rows)} objects in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["rtsp://h:5/a", "b.png"], "rtsp://h:5: a live source is named alone"),
        (["ftp://u:s3cret@h/a"], "ftp:// is no live source that is read"),
        (["rtsp://u:s3cret/x@h/a"], "no host, or another port than a number"),
        (["http://u:s3cret@/a"], "no host"),
        (["x.mp4", "--seconds", "3"], "--seconds: of live sources alone, and x.mp4 is none"),
        (["rtsp://h/a", "--seconds", "0"], "seconds (--seconds) must be more than 0"),
        (["rtsp://h/a", "--frames", "0"], "frames (--frames) must be a whole number of 1"),
        (["rtsp://h/a", "--reconnect", "-1"], "reconnect (--reconnect) must be"),
        (["rtsp://h/a", "--timeout", "nan"], "timeout (--timeout) must be more than 0"),
        (["rtsp://h/a", "--batch-size", "2"], "of tiles here"),
        ([f"rtsp://u:s3cret@127.0.0.1:{closed_port()}/a"], "Connection refused"),
    ],
)
def test_mistakes_are_told_in_a_line(sources, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_the_grey())
    command = ["predict", "--checkpoint", "any", "--output-dir", str(tmp_path / "out")]
    assert main([*command, *sources]) == 2
    told = capsys.readouterr()
    assert message in told.err and SECRET not in told.err + told.out
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="cameras of Linux")
def test_a_camera_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_the_grey())
    monkeypatch.chdir(tmp_path)
    for name in ("4321", "/dev/video4321"):
        assert main(["predict", "--checkpoint", "any", name]) == 2
        assert "camera 4321: No such file or directory; cameras here: " in capsys.readouterr().err
    (tmp_path / "4321").mkdir()  # what is there is what is meant
    assert main(["predict", "--checkpoint", "any", "4321"]) == 2
    assert "4321: no image or video in it" in capsys.readouterr().err


READS_A_CAMERA = """
from stage_interactor.inference import streams
from stage_interactor.inference.live_addresses import live_address

streams._FIRST_PAUSE = 0.05
kept = []
try:
    with streams.LiveFrames(live_address("0"), reconnect=1) as frames:
        for frame in frames:
            kept.append(frame)
except streams.LiveSourceError as error:
    print(error)
print(len(kept), {frame.picture.shape for frame in kept}, frames.received)
levels = [int(frame.picture.mean()) for frame in kept]  # of all, when the camera is closed
print(levels[0] < 8, max(levels) > 10, all(frame.picture.flags.owndata for frame in kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="cameras of Linux")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the camera is compiled")
def test_a_camera_that_is_unplugged(tmp_path):
    """FFmpeg gives the memory of its driver, which is gone then."""
    driver = tmp_path / "camera.so"
    source = Path(__file__).parent / "camera.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", driver, source, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(driver), "CAMERA_LAST": "30"}
    done = subprocess.run(
        [sys.executable, "-c", READS_A_CAMERA], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lost, counted, pixels = done.stdout.splitlines()
    assert lost.startswith("camera 0: lost after 60 frames (No such device; cameras here: ")
    assert int(counted.split()[0]) > 10 and counted.endswith("{(48, 64, 3)} 60")
    assert pixels == "True True True"


def test_no_list_leads_to_the_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Detector, "from_checkpoint", lambda *_, **__: finds_the_grey())
    with http_server(lambda request, _: request.multipart()) as server:
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{server.address}/a\n"))
        assert main(["predict", "--checkpoint", "any", "-"]) == 2
        told = capsys.readouterr().err
        assert "a live source is named alone, on the command line" in told and SECRET not in told
        with pytest.raises(ValueError, match=r"in Python by detector.stream\(\)"):
            finds_the_grey().predict_files(f"{server.address}/a")
        # A file that leads there, whatever its name.
        for name in ("a.mp4", "a.ts"):
            text = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{server.address}/b\n"
            (tmp_path / name).write_text(text)
            assert finds_the_grey().predict_files(tmp_path / name, progress=False).unreadable
    assert server.requests == []


def test_frames_one_by_one_from_python(tmp_path):
    detector = finds_the_grey()

    def answer(request, _):
        request.multipart()
        for value in range(60, 80):
            request.part(picture(value), pause=0.05)

    with http_server(answer) as server:
        pairs = list(detector.stream(server.address, frames=3, threshold=0.1))
    assert len(pairs) == 3 and all(isinstance(frame, Frame) for frame, _ in pairs)
    for frame, found in pairs:
        assert found.scores[0] == pytest.approx(frame.picture.mean() / 255, abs=1e-3)
    path = tmp_path / "clip.mp4"
    path.write_bytes(encoded([picture(value) for value in (50, 90, 130, 255)], path, "mp4"))
    coming = detector.stream(path, threshold=0.0)
    assert [float(next(coming)[0].time) for _ in range(3)] == pytest.approx([0, 0.1, 0.2])
    with pytest.raises(UnusableDetectionsError, match="NaN"):
        next(coming)
    assert len(list(detector.stream(path, seconds=0.15))) == 2
    with pytest.raises(ValueError, match="frames"):  # at once
        detector.stream(path, frames=0)


def test_tracks_of_a_live_source(tmp_path):
    pytest.importorskip("trackers", reason="needs stage-interactor[track]")

    def answer(request, _):
        request.multipart()
        while True:
            request.part(picture(150), pause=0.04)

    with http_server(answer) as server:
        options = dict(output_dir=tmp_path, progress=False, frames=8, track=True)
        predict_live(finds_the_grey(), server.address, **options)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [row["track"] for row in rows] == ["", *["1"] * 7]
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert [item.get("track_id") for item in content["annotations"]] == [None, *[1] * 7]
    assert content["videos"][0]["name"] == live_address(server.address).name


def test_what_is_on_disk_is_a_video_all_the_time(tmp_path):
    path, seen = tmp_path / "copy.mp4", []
    with VideoWriter(str(path), 10, grows=True) as writer:
        for index in range(40):
            writer.write(Frame(picture(5 * index), Fraction(index, 10), 0))
            if index in (15, 39):  # what would be left if the process was killed
                (tmp_path / "left.mp4").write_bytes(path.read_bytes())
                seen.append(len(of_copy(tmp_path / "left.mp4")))
    assert 9 <= seen[0] <= 16 and 30 <= seen[1] <= 40
    assert len(of_copy(path)) == 40


def test_a_video_that_grows_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "precious").write_text("precious")
    path = tmp_path / "copy.mp4"
    path.symlink_to(tmp_path / "precious")
    with VideoWriter(str(path), 10, grows=True) as writer:
        writer.write(Frame(picture(9), 0, 0))
    assert not path.is_symlink() and (tmp_path / "precious").read_text() == "precious"
