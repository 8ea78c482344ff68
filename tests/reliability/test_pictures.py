"""A picture or video from anywhere is read, or named with what is wrong: no more happens."""

import dis
import itertools
import os
import socket
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
import torch
from hostile_pictures import BOMBS, LARGE, OTHERS, damaged, of_many_scans, png
from PIL import Image
from torch.utils.data import DataLoader

from stage_interactor.commands import main
from stage_interactor.d2 import RUNTIME
from stage_interactor.d2.data import detection_utils
from stage_interactor.d2.structures import Boxes, Instances
from stage_interactor.d2.transforms import AugmentationList
from stage_interactor.data import ImageReadError, check_readable, read_image
from stage_interactor.data.images import IMAGE_SUFFIXES
from stage_interactor.data.sizes import read_sizes
from stage_interactor.inference.detector import Detector
from stage_interactor.inference.sources import open_video
from stage_interactor.untrusted.pictures import (
    PictureTooLargeError,
    decoding,
    limit_pixels,
    max_pixels,
    open_image,
)


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.delenv("STAGE_INTERACTOR_MAX_PIXELS", raising=False)


@pytest.fixture
def no_programs(monkeypatch):
    """Nothing is started, and no connection is opened."""

    def refuse(*arguments, **options):
        raise AssertionError(f"started or connected: {arguments}")

    for name in ("system", "posix_spawn", "execv", "fork"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("subprocess.Popen.__init__", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def refused(path) -> str:
    """What is told of a picture, which is the same wherever it is read."""
    start = time.monotonic()
    with pytest.raises(ImageReadError) as error:
        read_image(path)
    with pytest.raises(ImageReadError, match=path.name):
        check_readable([str(path)])
    if RUNTIME == "embedded":  # that of detectron2 is never called
        with pytest.raises((ValueError, OSError, SyntaxError)):
            detection_utils.read_image(str(path), "RGB")
    assert time.monotonic() - start < 60
    text = str(error.value)
    assert str(path) in text and len(text) < 1000 and "\n" not in text
    return text


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_picture_is_named_and_opened_by_no_program(tmp_path, kind, no_programs):
    for suffix in (".jpg", ".png", ".tif", ".webp", ".tga"):
        path = tmp_path / f"photo{suffix}"
        path.write_bytes(OTHERS[kind])
        refused(path)


@pytest.mark.parametrize("kind", BOMBS)
def test_what_grows_without_an_end_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "photo.png"
    path.write_bytes(BOMBS[kind]())
    refused(path)


@pytest.mark.cases(150)
def test_damaged_pictures_are_read_or_named(tmp_path, rng, cases):
    path = tmp_path / f"photo{IMAGE_SUFFIXES[0]}"
    for _ in range(cases):
        name, content = damaged(rng)
        path.write_bytes(content)
        start = time.monotonic()
        size = read_sizes([str(path)])[str(path)]
        try:
            pixels = read_image(path)
        except ImageReadError as error:
            assert str(path) in str(error), name
        else:
            assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8, name
            assert not isinstance(size, str) and size.upright == pixels.shape[1::-1], name
        assert time.monotonic() - start < 60, name


def test_a_picture_with_something_behind_it_is_a_picture(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.jpg")
    with open(tmp_path / "photo.jpg", "ab") as file:
        file.write(OTHERS["zip"] + OTHERS["postscript"])
    assert read_image(tmp_path / "photo.jpg").shape == (30, 40, 3)


def test_a_progressive_picture_is_a_picture(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(of_many_scans(3))
    assert read_image(tmp_path / "photo.jpg").shape == (64, 64, 3)


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo("pipe.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket.png")
    places = {"folder.png": "/tmp", "device.png": "/dev/zero", "kernel.png": "/proc/self/status"}
    for name, target in places.items():
        os.symlink(target, name)
    os.symlink("circle.png", "circle.png")
    for name in ("pipe.png", "socket.png", *places, "circle.png", "nowhere.png"):
        refused(tmp_path / name)
    server.close()


def test_files_that_are_far_too_large_are_not_read(tmp_path):
    for name, head in (("a.png", png(8, 8)[:-12]), ("a.webp", b"RIFF\xff\xff\xff\x7fWEBPVP8X")):
        with open(tmp_path / name, "wb") as file:
            file.write(head)
            file.truncate(2**40)
        assert "bytes are those of" in refused(tmp_path / name)


# The limit on pixels.


def test_the_limit_names_file_size_limit_and_key(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png(LARGE, LARGE))
    for text in (refused(path), f"{path} {read_sizes([str(path)])[str(path)]}"):
        for part in (str(path), f"{LARGE**2:,}", "178,956,970", "train.max_pixels", "--max-pixels"):
            assert part in text


def test_the_limit_can_be_lowered_and_raised(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png(LARGE, LARGE))
    small = tmp_path / "small.png"
    small.write_bytes(png(100, 100))
    limit_pixels(9_999)
    assert "it is 100 x 100 pixels large, 10,000, more than the limit of 9,999" in refused(small)
    limit_pixels(10_000)
    assert read_image(small).shape == (100, 100, 3)
    limit_pixels(LARGE**2)
    with open_image(path) as image:
        assert image.size == (LARGE, LARGE)
    limit_pixels(None)
    assert max_pixels() == 178_956_970
    for wrong in (0, -1, 1.5, True, "9"):
        with pytest.raises(ValueError, match="max_pixels must be a whole number above 0"):
            limit_pixels(wrong)


class Reading:
    """A data set of one picture, for the workers of a loader."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            return str(read_image(self.path).shape)
        except ImageReadError as error:
            return str(error)


def test_the_limit_holds_in_the_workers_of_a_loader(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png(100, 100))
    limit_pixels(9_999)
    (told,) = next(iter(DataLoader(Reading(str(path)), num_workers=1)))
    assert "more than the limit of 9,999" in told
    # As a worker of other systems, and a process of a run, is started.
    program = "from stage_interactor.untrusted.pictures import max_pixels; print(max_pixels())"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert output.stdout.strip() == b"9999"


def test_the_flag_of_the_commands_and_the_key_of_a_config(tmp_path, capsys):
    for name in "abcd":
        Image.new("RGB", (40, 30), name and (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("cat\n")
    assert main(["data", "check", str(tmp_path), "--max-pixels", "1199"]) == 1
    assert "more than the limit of 1,199" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path), "--max-pixels", "1200"]) == 0
    words = ["train", str(tmp_path), "--preset", "nano", "--dry-run", "--output-dir"]
    assert main([*words, str(tmp_path / "out"), "train.max_pixels=1199"]) == 2
    assert "more than the limit of 1,199" in capsys.readouterr().err


def test_threads_decode_together_no_more_than_one_picture_may_have():
    limit_pixels(1000)
    picture = Image.new("L", (20, 30))
    with decoding(picture):
        reached = []

        def decode():
            with decoding(picture):
                reached.append(time.monotonic())

        thread = threading.Thread(target=decode)
        thread.start()
        thread.join(0.2)
        assert not reached
    thread.join(10)
    assert reached


def interrupted(act, moment):
    """Does something with Ctrl-C at the n-th moment at which Python looks whether there has been
    one, behind a call and where a function or a round of a loop begins; whether there are so many.
    """
    moments = itertools.count(1)
    last = {}  # operation, by frame, which is not kept

    def trace(frame, event, _):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before = last.get(id(frame), "RESUME")
            last[id(frame)] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before.startswith(("RESUME", "CALL", "JUMP_BACK")) and next(moments) == moment:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_ctrl_c_while_decoding_does_not_make_the_next_picture_wait_for_ever():
    limit_pixels(1000)

    picture = Image.new("L", (20, 30))

    def decode():
        with decoding(picture):
            pass

    for moment in itertools.count(1):
        again = interrupted(decode, moment)
        thread = threading.Thread(target=decode, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), moment
        if not again:
            break
    assert moment > 15


# Videos.


def write_video(path, width=64, height=48):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for level in (0, 90, 180):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def frames(path) -> int:
    with open_video(str(path)) as video:
        return sum(1 for _ in video.frames)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.mov", "clip.mpg",
                                  "file:clip.mp4", "http:clip.mp4", "concat:clip.mp4"])  # fmt: skip
def test_videos_are_read_by_what_is_in_them(tmp_path, name, monkeypatch):
    write_video(tmp_path / "clip.mp4") if ":" in name else write_video(tmp_path / name)
    if ":" in name:
        os.rename(tmp_path / "clip.mp4", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert frames(name) == 3


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    "<AdaptationSet><Representation><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period>"
    "</MPD>",
    "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "smooth": '<?xml version="1.0"?><SmoothStreamingMedia><!-- {} --></SmoothStreamingMedia>',
    "subtitles": "1\n00:00:00,000 --> 00:00:01,000\n{}\n",
    "text": "{}\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_lists_of_other_videos_are_no_videos(tmp_path, kind):
    write_video(tmp_path / "secret.mp4")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for place in (str(tmp_path / "secret.mp4"), f"http://127.0.0.1:{port}/x.mp4"):
            for suffix in (".mp4", ".avi", ".mkv", ".ts", ".mpg"):
                path = tmp_path / f"clip{suffix}"
                path.write_text(PLAYLISTS[kind].format(place))
                with pytest.raises((av.FFmpegError, ValueError, OSError)):
                    frames(path)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_limit_on_pixels_is_that_of_frames_too(tmp_path):
    write_video(tmp_path / "clip.mp4")
    limit_pixels(64 * 48 - 1)
    with pytest.raises(ValueError, match="64 x 48 pixels large, 3,072, more than the limit"):
        frames(tmp_path / "clip.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="pipe"):
        frames(tmp_path / "pipe.mp4")


def test_what_a_detector_takes_has_a_limit_of_its_own(tmp_path, monkeypatch):
    """Of a detector that does not make pictures smaller, padded pixels included."""
    monkeypatch.setattr("stage_interactor.untrusted.pictures._MAX_PIXELS_OF_MODEL", 64 * 64)
    seen = []

    class Model:
        size_divisibility = 32

        def __call__(self, inputs):
            seen.extend(image["image"].shape[-2:] for image in inputs)
            boxes = Boxes(torch.zeros(0, 4))
            empty = Instances((1, 1), pred_boxes=boxes, scores=torch.zeros(0))
            empty.pred_classes = torch.zeros(0, dtype=torch.int64)
            return [{"instances": empty}] * len(inputs)

    detector = Detector(Model(), [{"id": 1, "name": "x"}], AugmentationList([]))
    for name, size in {"a": (64, 64), "b": (65, 64), "c": (200, 1), "d": (60, 33)}.items():
        (tmp_path / f"{name}.png").write_bytes(png(*size))
    results = detector.predict_files(tmp_path)
    told = [line for line in results.unreadable if "for the detector" in line]
    assert len(told) == 2 == len(results.unreadable) and "b.png: it is 96 x 64 pixels" in told[0]
    assert sorted(map(tuple, seen)) == [(33, 60), (64, 64)]
    with pytest.raises(PictureTooLargeError, match="--max-pixels"):
        detector(np.zeros((65, 65, 3), np.uint8))
    limit_pixels(96 * 96)  # what is said counts for both
    assert len(detector(np.zeros((65, 65, 3), np.uint8))) == 0
