"""Several runs on one page."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from stage_interactor.commands import main
from stage_interactor.pages.comparison import write_comparison


@pytest.fixture
def runs(small_run, tmp_path):
    """One run, and one that finds nothing in half of the images, with another rate."""
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (first, second):
        shutil.copytree(small_run, folder, ignore=shutil.ignore_patterns("shapes", "*.pth"))
    truth = json.loads((small_run / "shapes/val.json").read_text())
    perfect = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.9,
        }
        for a in truth["annotations"]
    ]
    half = {image["id"] for image in truth["images"][::2]}
    for folder, found in (
        (first, perfect),
        (second, [item for item in perfect if item["image_id"] in half]),
    ):
        (folder / "coco_instances_results.json").write_text(json.dumps(found))
    config = yaml.safe_load((second / "config_resolved.yaml").read_text())
    config["optimizer"]["lr"] = 0.125
    config["train"]["output_dir"] = "elsewhere"
    (second / "config_resolved.yaml").write_text(yaml.safe_dump(config))
    return first, second, truth, half


def table(text, title):
    body = text.split(f'<h2 id="{title.lower().replace(" ", "-")}">')[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.S) for row in rows]


def test_ap_and_configs_stand_beside_each_other(runs, tmp_path):
    first, second, truth, half = runs
    path = write_comparison([first, second], tmp_path / "page.html")
    text = open(path).read()
    rows = {row[0]: row[1:] for row in table(text, "Average precision")}
    assert rows["AP, %"] == ["a/run", "b/run", "difference"]
    assert rows["all"][0] == "100.0"
    counts = {c["id"]: [0, 0] for c in truth["categories"]}
    for item in truth["annotations"]:
        counts[item["category_id"]][0] += 1
        counts[item["category_id"]][1] += item["image_id"] in half
    names = {c["id"]: c["name"] for c in truth["categories"]}
    thresholds = np.linspace(0, 1, 101)
    for key, (number, found) in counts.items():
        if number:
            # Perfect up to the recall that is reached, and nothing behind it.
            expected = 100 * (thresholds <= found / number + 1e-12).mean() if found else 0.0
            assert rows[names[key]][0] == "100.0"
            assert float(rows[names[key]][1]) == pytest.approx(expected, abs=0.06)
            assert float(rows[names[key]][2]) == pytest.approx(100 - expected, abs=0.11)
    differences = {row[0]: row[1:] for row in table(text, "Config")}
    assert set(differences) == {"key", "optimizer.lr"}
    assert differences["optimizer.lr"][1] == "0.125"
    assert text.count('src="data:image/jpeg') >= 2
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # nothing from elsewhere


def test_pictures_are_of_images_in_which_they_differ(runs, tmp_path):
    first, second, truth, half = runs
    text = open(write_comparison([first, second], tmp_path / "page.html", num_pictures=2)).read()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == 4
    shown = {re.search(r"run, (\S+):", caption)[1] for caption in captions}
    names = {image["file_name"] for image in truth["images"] if image["id"] not in half}
    assert len(shown) == 2 and shown <= names
    assert (
        "Where they differ"
        not in open(
            write_comparison([first, second], tmp_path / "none.html", num_pictures=0)
        ).read()
    )


def test_equal_runs_differ_nowhere(runs, tmp_path):
    first, *_ = runs
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    text = open(write_comparison([first, copy], tmp_path / "page.html")).read()
    assert "The configs are the same" in text and "Where they differ" not in text


def test_runs_of_other_data_are_not_compared_silently(runs, tmp_path, small_run):
    first, second, truth, _ = runs
    other = json.loads(json.dumps(truth))
    other["annotations"] = other["annotations"][1:]
    (tmp_path / "other.json").write_text(json.dumps(other))
    config = yaml.safe_load((second / "config_resolved.yaml").read_text())
    config["dataloader"]["test"]["dataset"] = {
        "_target_": "stage_interactor.data.coco.load_coco_dataset", "name": "other",
        "json_file": str(tmp_path / "other.json"), "image_root": str(small_run / "shapes/val"),
        "is_train": False,
    }  # fmt: skip
    (second / "config_resolved.yaml").write_text(yaml.safe_dump(config))
    text = open(write_comparison([first, second], tmp_path / "page.html")).read()
    assert "evaluated on different images, objects or classes" in text
    assert "Where they differ" not in text


def test_what_cannot_be_shown_of_one_is_told_and_the_rest_is_there(runs, tmp_path):
    first, second, *_ = runs
    (second / "coco_instances_results.json").write_text("{")
    text = open(write_comparison([first, second], tmp_path / "page.html")).read()
    assert "b/run: its evaluation cannot be shown" in text and "Average precision" in text
    (second / "coco_instances_results.json").unlink()
    text = open(write_comparison([first, second], tmp_path / "page.html")).read()
    assert "b/run: there was no evaluation yet" in text
    (second / "metrics.json").write_text('{"iteration": 0, "total_loss": 2.0}\n')
    config = yaml.safe_load((second / "config_resolved.yaml").read_text())
    voc = "stage_interactor.d2.evaluation.PascalVOCDetectionEvaluator"
    config["dataloader"]["evaluator"]["_target_"] = voc
    (second / "config_resolved.yaml").write_text(yaml.safe_dump(config))
    text = open(write_comparison([first, second], tmp_path / "page.html")).read()
    assert ">none</" in text and "Pascal VOC&#39;s AP, b/run" in text
    assert "were evaluated by different metrics; the table of AP is COCO" in text
    deep = {"a": 1}
    for _ in range(400):
        deep = {"a": deep}
    config = yaml.safe_load((second / "config_resolved.yaml").read_text())
    (second / "config_resolved.yaml").write_text(json.dumps(config | {"deep": deep}))
    try:
        write_comparison([first, second], tmp_path / "page.html")
    except ValueError as error:
        assert "cannot be read as a saved config" in str(error)


def test_arguments_that_make_no_sense_are_told(runs, tmp_path, capsys):
    first, second, *_ = map(str, runs[:2])
    page = str(tmp_path / "page.html")
    for arguments, told in (
        ([first, first], "is named twice"),
        ([first, str(tmp_path)], "is it the folder of a run"),
        ([first, second, "--threshold", "2"], "between 0 and 1"),
        ([first, second, "--pictures", "-1"], "not be less than 0"),
        ([first, second, "--save-thresholds", "x.pth"], "of one run, not of several"),
        ([first] + [second] * 10, "2 to 10"),
    ):
        assert main(["report", *arguments, "--output", page]) == 2
        assert told in capsys.readouterr().err
    assert main(["report", first, second, "--output", page]) == 0
    assert "open it in a browser" in capsys.readouterr().out
