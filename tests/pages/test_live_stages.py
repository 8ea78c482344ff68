"""A box is dragged, and the stages behind it follow: what is served, and to whom."""

import http.client
import json
import re
import shutil

import numpy as np
import pytest

from stage_interactor.commands import main
from stage_interactor.data import read_picture
from stage_interactor.inference.blueprint import load_model
from stage_interactor.modeling import Decoder
from stage_interactor.modeling.extensions.settled_decoder import SettledDecoder
from stage_interactor.pages.live_stages import LiveStages, serve_stages
from stage_interactor.pages.trace import Edit, Tracer, trace_stages

BOX = [10.0, 12.0, 30.0, 40.0]
NAMES = [f"<class {index}>" for index in range(5)]


@pytest.fixture(scope="module")
def picture(small_run):
    return read_picture(sorted((small_run / "shapes/val").iterdir())[0])


@pytest.fixture(scope="module")
def traced(small_run, picture):
    model, blueprint = load_model(str(small_run / "model_final.pth"))
    augmentation = blueprint.build_augmentation()
    return Tracer(model, picture, augmentation), trace_stages(model, picture, augmentation)


@pytest.fixture
def served(traced, picture, free_port):
    objects = ([BOX], [1])
    live = LiveStages(traced[0], picture, NAMES, objects, "</script><b>x")
    server = serve_stages(live, port=free_port, wait=False)
    yield free_port
    server.shutdown()
    server.server_close()


def ask(port, question, headers=None, path="/stages", method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    sent = {"Content-Type": "application/json"} | (headers or {})
    connection.request(method, path, body if method == "POST" else None, sent)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def test_an_edit_changes_its_stage_and_those_behind(traced):
    tracer, before = traced
    after = tracer(Edit(1, 3, BOX))
    np.testing.assert_array_equal(after[0].boxes, before[0].boxes)
    np.testing.assert_array_equal(after[0].points, before[0].points)
    np.testing.assert_allclose(after[1].start[3], BOX, atol=1e-3)
    others = np.arange(len(before[0].boxes)) != 3
    np.testing.assert_array_equal(after[1].start[others], before[1].start[others])
    for stage, old in zip(after[1:], before[1:]):
        assert np.abs(stage.points[3] - old.points[3]).max() > 1
        assert np.abs(stage.scores[3] - old.scores[3]).max() > 1e-6
    np.testing.assert_array_equal(after[2].start, after[1].boxes)
    again = tracer()
    np.testing.assert_array_equal(again[-1].boxes, before[-1].boxes)  # nothing of it is left


def test_a_box_that_stays_where_it_is_changes_nothing(traced):
    tracer, before = traced
    after = tracer(Edit(2, 5, before[2].start[5]))
    np.testing.assert_allclose(after[-1].boxes, before[-1].boxes, atol=1e-3)
    np.testing.assert_allclose(after[-1].scores, before[-1].scores, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(3, 0, BOX), "stages 0 to 2 and the queries 0 to 7"),
        (Edit(-1, 0, BOX), "stages 0 to 2"),
        (Edit(0, 8, BOX), "queries 0 to 7"),
        (Edit(0, 0, [1, 2, 3]), "left, top, right and bottom"),
        (Edit(0, 0, [1, 2, 1, 4]), "left, top, right and bottom"),
        (Edit(0, 0, [1, 2, float("nan"), 4]), "left, top, right and bottom"),
    ],
)
def test_an_edit_that_is_none_is_told(edit, message, traced):
    with pytest.raises(ValueError, match=message):
        traced[0](edit)


def test_what_is_served_is_what_the_stages_do(served, traced):
    status, text = ask(served, {"query": 3, "stage": 1, "box": BOX})
    answer = json.loads(text)
    assert status == 200 and len(answer["stages"]) == 3
    before = traced[1]
    for told, stage, old in zip(answer["stages"], traced[0](Edit(1, 3, BOX)), before):
        np.testing.assert_allclose(told["start"], stage.start[3], atol=0.01)
        np.testing.assert_allclose(told["box"], stage.boxes[3], atol=0.01)
        np.testing.assert_allclose(told["before"]["box"], old.boxes[3], atol=0.01)
        points = np.array(told["points"])
        np.testing.assert_allclose(points[:, :2], stage.points[3].reshape(-1, 2), atol=0.01)
        assert ((points[:, 2] >= 0) & (points[:, 2] <= 1)).all()
        best = int(stage.scores[3].argmax())
        assert told["scores"][0] == [NAMES[best], round(float(stage.scores[3, best]), 4)]
        assert told["before"]["score"] == round(float(old.scores[3, best]), 4)
    scores = [item["score"] for item in answer["found"]]
    assert len(scores) == 8 and scores == sorted(scores, reverse=True)


def test_the_page_holds_names_and_objects_as_text(served):
    status, page = ask(served, b"", path="/", method="GET")
    assert status == 200 and "</script><b>" not in page and "&lt;/script&gt;&lt;b&gt;x" in page
    content = json.loads(re.search(r"const content = (.*);", page)[1])
    assert content["objects"] == [{"box": BOX, "name": "<class 1>"}] and content["stages"] == 3
    nonces = re.findall(r"nonce-(\S+?)'|<script nonce=\"(\S+?)\"", page)
    assert nonces[0][0] == nonces[1][1] and len(page.split("<script")) == 2
    assert re.search(r"nonce-(\S+?)'", ask(served, b"", path="/", method="GET")[1])[1] not in page


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "query None: 0 to 7"),
        ({"query": True}, "query True"),
        ({"query": 8}, "query 8: 0 to 7"),
        ({"query": 0, "box": BOX}, "goes to a stage"),
        ({"query": 0, "stage": 3, "box": BOX}, "stages 0 to 2"),
        ({"query": 0, "stage": 0, "box": "abcd"}, "four numbers"),
        ({"query": 0, "stage": 0, "box": [0, 0, 5, "5"]}, "four numbers"),
        ({"query": 0, "stage": 0, "box": [5, 5, 1, 9]}, "left, top, right and bottom"),
        (b'{"query": 0, "stage": 0, "box": [0, 0, Infinity, 4]}', "left, top, right"),
        ({"query": 0, "stage": 0, "box": [0, 0, 10**400, 4]}, ""),
        (b"[1]", "a JSON object"),
        (b"{", ""),
        (b"\xff", ""),
        (b"[" * 9000, ""),
    ],
)
def test_a_question_that_is_none_is_answered_with_what_is_wrong(question, message, served):
    status, text = ask(served, question)
    assert status == 400 and message in text and "Traceback" not in text
    assert ask(served, {"query": 0})[0] == 200


def test_a_box_out_of_the_picture_is_a_box(served):
    assert ask(served, {"query": 0, "stage": 0, "box": [-500, -500, -490, -480]})[0] == 200
    status, told = ask(served, {"query": 0, "stage": 0, "box": [-1e9, 0, 1e9, 1]})
    assert status == 400 and "too far out of the picture" in told


def test_other_sites_and_other_questions_are_refused(served):
    question = {"query": 0}
    assert ask(served, question, {"Host": "evil.example:80"})[0] == 403
    assert ask(served, b"", {"Host": "evil.example:80"}, path="/", method="GET")[0] == 403
    assert ask(served, question, {"Host": f"localhost:{served}"})[0] == 200
    assert ask(served, question, {"Content-Type": "text/plain"})[0] == 404  # a form of another site
    assert ask(served, question, path="/else")[0] == 404
    assert ask(served, b"", path="/../../etc/passwd", method="GET")[0] == 404
    assert ask(served, b" " * 20_000)[0] == 413
    for length in ("-1", "9" * 5000, "1e3", ""):
        assert ask(served, question, {"Content-Length": length})[0] == 413
    assert ask(served, question, {"Host": "127.0.0.1"})[0] == 200  # of port 80
    assert ask(served, question, {"Host": "[::1]:80"})[0] == 200
    assert ask(served, question, {"Host": "127.0.0.1.evil.example"})[0] == 403
    assert ask(served, question, {"Host": ""})[0] == 403


def test_what_goes_wrong_in_the_machine_is_told(served, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(LiveStages, "answer", fails)
    status, told = ask(served, {"query": 0})
    assert status == 500 and "memory" in told


def test_a_cascade_that_ends_early_is_shown_as_far_as_it_was_asked_for(small_run, picture):
    model, blueprint = load_model(str(small_run / "model_final.pth"))
    fed = picture, blueprint.build_augmentation()
    expected = trace_stages(model, *fed)
    plain, model.decoder = model.decoder, SettledDecoder([*model.decoder.stages], exit_iou=1e-3)
    for stage, other in zip(trace_stages(model, *fed), expected, strict=True):
        np.testing.assert_allclose(stage.boxes, other.boxes, atol=1e-3)
    model.decoder = Decoder([*plain.stages], exit_stage=2)
    tracer = Tracer(model, *fed)
    assert len(tracer()) == 2
    with pytest.raises(ValueError, match="stages 0 to 1"):
        tracer(Edit(2, 0, BOX))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--live", "--output", "x.html"], "writes no --output"),
        (["--live", "--queries", "1"], "chosen on the page"),
        (["--port", "80"], "--port is of --live"),
        (["--live", "--port", "70000"], "between 1 and 65535"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message, small_run, capsys):
    image = sorted((small_run / "shapes/val").iterdir())[0]
    command = ["stages", "--checkpoint", str(small_run / "model_final.pth"), str(image)]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_in_a_browser_a_box_is_dragged_and_the_stages_follow(served):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=quiet)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        wrong = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://127.0.0.1:{served}")
        page.wait_for_selector("#rows tr")

        def boxes():
            return [page.locator("#after rect").nth(index).bounding_box() for index in range(3)]

        def settled(dotted):
            """The boxes, once there are so many of before and no answer is awaited any more."""
            seen = []
            for _ in range(100):  # the page's own rules forbid the library's way of waiting
                page.wait_for_timeout(100)
                if page.locator("#before rect").count() == dotted:
                    seen.append(boxes())
                if seen[-3:-2] == seen[-1:] != []:
                    return seen[-1]
            raise AssertionError(f"not {dotted} dotted boxes")

        # At the first stage every query starts from the whole picture, which covers the others.
        settled(0)
        query = page.input_value("#query")
        other = page.locator("#others rect").last.bounding_box()
        page.mouse.click(other["x"] + other["width"] / 2, other["y"] + other["height"] / 2)
        settled(0)
        assert page.input_value("#query") != query
        page.select_option("#query", query)
        page.select_option("#stage", "1")
        old, start = settled(0), page.locator("#start").bounding_box()
        assert page.inner_text("#rows tr.chosen td:first-child").strip() == "stage 2"
        x, y = start["x"] + start["width"] / 2, start["y"] + start["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 90, y + 60, steps=10)
        page.mouse.up()
        new = settled(2)
        assert new[0] == old[0] and new[1] != old[1] and new[2] != old[2]
        moved = page.locator("#start").bounding_box()
        assert moved["x"] - start["x"] == pytest.approx(90, abs=2)
        assert page.locator("#points circle").count() > 8
        page.locator("#start").focus()
        page.keyboard.press("Shift+ArrowRight")
        settled(2)
        assert page.locator("#start").bounding_box()["width"] > moved["width"]
        page.click("#reset")
        assert settled(0) == old and page.inner_text("#told") == "" and not wrong
        browser.close()
