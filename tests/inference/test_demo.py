"""The web page of the demo: what it shows, in Python and in a browser, and that it is local."""

import os
import re
import shutil
import socket
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.data import ImageReadError, read_picture
from stage_interactor.inference.demo import NO_STAGES, Demo
from stage_interactor.untrusted.pictures import limit_pixels


@pytest.fixture(scope="module")
def demo(small_run):
    return Demo.from_checkpoint(small_run / "model_final.pth", device="cpu")


@pytest.fixture(scope="module")
def image(small_run):
    return sorted((small_run / "shapes/val").iterdir())[0]


def test_it_sees_what_a_detector_finds(demo, small_run, image):
    detector = Detector.from_checkpoint(small_run / "model_final.pth", device="cpu")
    for threshold in (None, 0.0, 0.02):
        seen, found = demo.see(image, threshold), detector(image, threshold)
        assert np.array_equal(seen.given.boxes, found.boxes) and seen.given.names == found.names
        again = demo.choose(demo.see(image, 1.0), threshold)
        assert np.array_equal(again.given.scores, found.scores)
        drawn = demo.draw(seen)
        assert drawn.shape == (800, 800, 3)  # of 64 pixels, which nobody could click into
        assert demo.told(seen).startswith(f"{len(found)} objects: " if len(found) else "Nothing")
    assert demo.start == round(float(np.median(detector.select().thresholds)), 2)


def test_a_click_finds_the_smallest_box_around_it(demo, image):
    seen = demo.see(image, 0.0)
    boxes, areas = seen.given.boxes, (seen.given.boxes[:, 2:] - seen.given.boxes[:, :2]).prod(1)
    for x, y in np.random.default_rng(0).uniform(0, 800, (50, 2)):
        left, top = x / 12.5, y / 12.5
        around = [
            index
            for index, (x0, y0, x1, y1) in enumerate(boxes.tolist())
            if x0 <= left <= x1 and y0 <= top <= y1
        ]
        expected = min(around, key=lambda index: areas[index]) if around else None
        assert seen.at(x, y) == expected
    assert demo.choose(seen, 1.0).at(400, 400) is None


def test_the_stages_are_those_of_the_box_that_is_clicked(demo, image):
    seen = demo.see(image, 0.0)
    queries = set()
    for index in range(len(seen.given)):
        told, pictures = demo.stages(seen, index)
        name, score, query = re.fullmatch(r"(\w+) ([\d.]+), found by query (\d+)", told).groups()
        assert name == seen.given.names[index] and len(pictures) == 2
        assert all(p.dtype == np.uint8 and p.shape[2] == 3 and p.shape[1] > 300 for p in pictures)
        queries.add(query)
    # Each box of its own query.
    assert len(queries) == len(seen.given) > 3


def test_an_exported_file_has_no_stages_and_says_so(small_run, image):
    model = Demo.from_checkpoint(small_run / "model_final.pth", device="cpu").detector
    demo = Demo(model)
    assert demo.stages(demo.see(image, 0.0), 0) == (NO_STAGES, [])


def test_pictures_are_screened(demo, image, tmp_path):
    (tmp_path / "no.png").write_text("<svg/>")
    with pytest.raises(ImageReadError):
        demo.see(tmp_path / "no.png")
    limit_pixels(63 * 64)
    with pytest.raises(ImageReadError, match="--max-pixels"):
        demo.see(image)


def test_a_missing_package_and_a_taken_port_are_told_in_a_line(small_run, monkeypatch, capsys):
    command = ["demo", "--checkpoint", str(small_run / "model_final.pth"), "--device", "cpu"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*command, "--port", str(port)]) == 2
        assert f"127.0.0.1:{port} cannot be listened on" in capsys.readouterr().err
    assert main([*command, "--port", "0"]) == 2
    assert "between 1 and 65535" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([*command, "--port", str(port)]) == 2
    assert "pip install 'stage-interactor[demo]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def page(demo):
    """Its address, while it is served."""
    pytest.importorskip("gradio", reason="needs stage-interactor[demo]")
    from stage_interactor.inference.demo_page import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = serve(demo, port=port, wait=False)
    yield f"http://127.0.0.1:{port}"
    served.close()


def test_it_listens_on_this_machine_alone_and_tells_nobody(page):
    import gradio

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    port = int(page.rpartition(":")[2])
    mine = socket.gethostbyname(socket.gethostname())
    if not mine.startswith("127."):
        with pytest.raises(OSError), socket.create_connection((mine, port), timeout=1):
            pass
    assert not gradio.analytics.analytics_enabled()


def test_in_a_browser(page, demo, image, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs chromium")
    seen = demo.see(image)
    lowest = demo.choose(seen, 0.0)
    (tmp_path / "no.png").write_text("no picture")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1100})
        asked, errors = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page)

        def told(box, pattern):
            end = time.monotonic() + 20
            while not re.search(pattern, tab.input_value(f"#{box} textarea")):
                assert time.monotonic() < end, tab.input_value(f"#{box} textarea")
                time.sleep(0.05)

        def drop(path):
            if tab.locator("#picture button[aria-label*=Clear]").count():
                tab.click("#picture button[aria-label*=Clear]")
            tab.set_input_files("#picture input[type=file]", str(path))

        drop(tmp_path / "no.png")
        told("told", "^cannot read the image no.png: ")
        drop(image)
        told("told", f"^{re.escape(demo.told(seen))}$")
        # Of all classes down to 0: its slider by the keyboard.
        slider = tab.locator("#score input[type=range]")
        assert float(slider.input_value()) == demo.start
        slider.focus()
        slider.press("Home")
        slider.dispatch_event("pointerup")
        told("told", f"^{re.escape(demo.told(lowest))}$")
        shown = tab.locator("#detections img").first
        place = shown.bounding_box()
        left, top, right, bottom = lowest.given.boxes[0] / 64
        middle = (left + right) / 2, (top + bottom) / 2
        side = min(place["width"], place["height"])
        margins = (place["width"] - side) / 2, (place["height"] - side) / 2
        shown.click(position={"x": float(middle[0] * side + margins[0]),
                              "y": float(middle[1] * side + margins[1])})  # fmt: skip
        index = lowest.at(*(value * 800 for value in middle))
        told("caption", f"^{re.escape(demo.stages(lowest, index)[0])}$")
        for name in ("boxes", "points"):
            tab.wait_for_selector(f"#{name} img", timeout=20_000)
        browser.close()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(page).netloc} and not errors


def test_an_image_of_the_page_is_what_the_detector_draws(demo, image):
    seen = demo.see(image, 0.0)
    plain = np.array(Image.fromarray(read_picture(image)).resize((800, 800), Image.BICUBIC))
    drawn = demo.draw(seen)
    left, top, _, _ = (seen.given.boxes[0] * 12.5).round().astype(int).clip(0, 799)
    assert not np.array_equal(drawn[top : top + 9, left : left + 9],
                              plain[top : top + 9, left : left + 9])  # fmt: skip
