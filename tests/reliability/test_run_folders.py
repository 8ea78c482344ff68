"""A run folder of anyone is data: a page about it runs nothing, and breaks on nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_runs
import pytest
import yaml

from stage_interactor.commands import main
from stage_interactor.config import ConfigError, read_saved
from stage_interactor.engine.training import Run

SHAPES = "stage_interactor.data.load_shapes"


@pytest.fixture
def run(tmp_path):
    hostile_runs.make_run(tmp_path / "run", tmp_path / "executed")
    return tmp_path / "run"


def change_config(run, key, value):
    path = run / "config_resolved.yaml"
    config = node = yaml.safe_load(path.read_text())
    *parents, last = key.split(".")
    for name in parents:
        node = node[name]
    node[last] = value
    path.write_text(yaml.safe_dump(config))


@pytest.mark.cases(20)
def test_mutated_run_folders_give_a_page_or_a_line(seed, cases, tmp_path):
    command = [sys.executable, hostile_runs.__file__, str(seed), str(cases), str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr[-3000:]
    wrong = json.loads(found.stdout[found.stdout.index("[") :])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "call",
    [
        {"_target_": "os.system", "command": "touch executed"},
        {"_target_": "stage_interactor.config.saved_object", "recipe": {
            "function": "os.system", "arguments": ["touch executed"], "keywords": {}}},
        {"_target_": "stage_interactor.data.load_coco_dataset", "name": "x", "json_file": {
            "_target_": "os.system", "command": "touch executed"}},
        {"_target_": "stranger.load_coco_dataset", "name": "x"},
        {"_target_": SHAPES, "split": "val", "root": "x", "num_val": 2},
        {"_target_": SHAPES, "split": "val", "root": "x", "write": True},
        {"_target_": ["os.system"]},
        "${oc.env:HOME}",
        None,
    ],
)  # fmt: skip
def test_data_of_another_kind_are_told_and_not_called(call, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    change_config(run, "dataloader.test.dataset", call)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "The evaluation cannot be shown: " in page and "20 of 20" in page
    assert sorted(tmp_path.rglob("*")) == sorted([*before, run / "report.html"])


def test_what_leads_out_of_the_data_is_shown_if_the_reader_says_so(run, tmp_path, capsys):
    data = yaml.safe_load((run / "config_resolved.yaml").read_text())["data"]
    path, root = Path(data["json"]), Path(data["root"])
    content = json.loads(path.read_text())
    (root / content["images"][0]["file_name"]).rename(tmp_path / "elsewhere.png")
    content["images"][0]["file_name"] = str(tmp_path / "elsewhere.png")
    path.write_text(json.dumps(content))
    change_config(run, "dataloader.test.dataset.allow_outside", True)
    for flags, shown in (((), False), (("--allow-outside",), True)):
        assert main(["report", str(run), *flags]) == 0
        page = (run / "report.html").read_text()
        assert ("--allow-outside" in page) is not shown
        assert (f"Pictures of {root}" in page) is shown


def test_a_saved_config_is_read_with_its_references_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    path = tmp_path / "config.yaml"
    path.write_text(
        "a: {b: 1.0e-05, name: x, path: '${.name}/${..c.d}', up: '${..c.d}'}\n"
        "c: {d: y, all: '${a.path}', secret: '${oc.env:SECRET}', mixed: '_${oc.env:SECRET}'}\n"
        "circle: ['${circle}']\n"
        "one: '${other}'\nother: '${one}'\nsection: '${a}'\nnowhere: '${a.x.y}'\n"
        "t0: xxxxxxxxxx\n" + "".join(f"t{i + 1}: '{f'${{t{i}}}' * 10}'\n" for i in range(9))
    )
    saved = read_saved(path)
    assert saved.section("a") == {"b": 1e-5, "name": "x", "path": "x/y", "up": "y"}
    assert saved.get("c.all") == "x/y" and saved.get("t1") == "x" * 100
    for key in (
        "c.secret",
        "c.mixed",
        "circle",
        "one",
        "section",
        "nowhere",
        "a",
        "q",
        "a.b.c",
        "t9",
    ):
        assert saved.get(key) is None, key
    assert saved.section("q") == saved.section("a.b") == {}


@pytest.mark.parametrize("text", hostile_runs.TEXTS, ids=range(len(hostile_runs.TEXTS)))
def test_yaml_that_is_no_config_is_one_line(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    try:
        read_saved(path)
    except ConfigError as error:
        assert str(path) in str(error) and len(str(error)) < 1000


def test_a_config_of_gigabytes_is_not_read(run):
    with (run / "config_resolved.yaml").open("wb") as file:
        file.truncate(2**36)
    assert main(["report", str(run)]) == 2


def test_metrics_that_are_none_are_counted_and_the_others_shown(run):
    path = run / "metrics.json"
    path.write_text(path.read_text() + "\n".join(hostile_runs.LINES))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "lines of metrics.json are no values of an iteration" in page


def test_detections_of_nothing_that_is_known_are_counted_and_left_out(run):
    path = run / "coco_instances_results.json"
    assert main(["report", str(run)]) == 0
    before = (run / "report.html").read_text()
    found = json.loads(path.read_text())
    good = found[0]
    others = [
        {**good, "image_id": 99}, {**good, "category_id": "1"}, {**good, "bbox": [1, 2, 3]},
        {**good, "bbox": ["a"] * 4}, {**good, "score": True}, {**good, "image_id": [1]}, [], 7,
        {**good, "bbox": [0, 0, 1e300, 1]}, {"image_id": 1}, {**good, "score": 5.5},
        {**good, "score": -0.5},
    ]  # fmt: skip
    path.write_text(json.dumps(found + others))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "12 entries of coco_instances_results.json are no detections" in page
    start = page.index('id="evaluation"')
    assert page[start:] == before[before.index('id="evaluation"') :]


def test_a_name_that_this_process_knows_keeps_its_data(run):
    from stage_interactor.d2.data import MetadataCatalog

    before = MetadataCatalog.get("coco_2017_val").json_file
    change_config(run, "data.name", "coco_2017")
    assert main(["report", str(run)]) == 0
    assert "Best images" in (run / "report.html").read_text()
    assert MetadataCatalog.get("coco_2017_val").json_file == before


def test_generated_shapes_of_another_run_are_not_replaced(small_run, tmp_path):
    """They may belong to a run that still needs them."""
    config = yaml.safe_load((small_run / "config_resolved.yaml").read_text())
    config["shapes"]["num_val"] = 5
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config_resolved.yaml").write_text(yaml.safe_dump(config))
    for name in ("metrics.json", "coco_instances_results.json"):
        (tmp_path / "run" / name).write_bytes((small_run / name).read_bytes())
    before = {path: path.stat().st_mtime_ns for path in small_run.rglob("*")}
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "does not hold the shapes" in (tmp_path / "run/report.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in small_run.rglob("*")} == before


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, "5", "", "\0", '"x"'])
def test_results_that_are_no_metrics_are_a_line(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        Run.in_folder(tmp_path)


def test_a_page_allows_no_script_and_asks_for_nothing(run):
    assert main(["report", str(run), "--threshold", "0"]) == 0
    page = (run / "report.html").read_text()
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    for name in hostile_runs.CLASSES[1:3]:
        assert name not in page
    assert hostile_runs.MARK in page and "1&lt;b&gt;.png" in page


def test_thousands_of_boxes_in_a_picture_take_little_memory(tmp_path):
    """Of all pairs there are 64 million."""
    code = """
import resource, sys
import numpy as np
from stage_interactor.pages.boxes import draw_boxes
from stage_interactor.pages.matching import confusion_matrix, match_images
rng = np.random.default_rng(0)
boxes = np.concatenate((rng.random((8000, 2)) * 900, rng.random((8000, 2)) * 30 + 1), 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
item = {"image_id": 1, "category_id": 1, "iscrowd": 0}
truth = {"images": [{"id": 1, "file_name": "x"}], "categories": [{"id": 1, "name": "x"}],
         "annotations": [{**item, "bbox": box} for box in boxes.tolist()]}
found = [{**item, "bbox": box, "score": 0.5} for box in boxes.tolist()]
(result,) = match_images(truth, found, 0.0)
assert (result.object_of >= 0).all() and confusion_matrix([result], 1)[0, 0] == 8000
boxes[:, 2:] += boxes[:, :2]
draw_boxes(np.zeros((960, 960, 3), np.uint8), boxes[:2000], [0] * 2000, class_names=["x"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert float(found.stdout) < 0.4  # GiB


def test_a_pipe_or_a_device_in_place_of_a_file_is_not_waited_for(run):
    for name in ("metrics.json", "config_resolved.yaml"):
        content = (run / name).read_bytes()
        for make in (os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")):
            (run / name).unlink()
            make(run / name)
            assert main(["report", str(run)]) == 2
        (run / name).unlink()
        (run / name).write_bytes(content)
    (run / "coco_instances_results.json").unlink()
    os.mkfifo(run / "coco_instances_results.json")
    assert main(["report", str(run)]) == 0
