"""Thresholds of scores: the best F1 by class, in the report, in checkpoints and in predict."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import stage_interactor
from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.engine import CheckpointError, evaluation
from stage_interactor.inference.blueprint import Blueprint, load_model
from stage_interactor.inference.export import export_checkpoint
from stage_interactor.inference.thresholds import save_thresholds
from stage_interactor.inference.weights import read_checkpoint
from stage_interactor.pages.matching import best_of_each_box, match_images
from stage_interactor.pages.report import write_report
from stage_interactor.pages.thresholds import (
    ClassThreshold,
    Curve,
    Thresholds,
    choose_thresholds,
)


def place(number, image=1):
    """A box of its own."""
    return {"image_id": image, "bbox": [20.0 * number, 0.0, 10.0, 10.0]}


def truth(counts, crowds=()):
    """One image of so many objects of the classes 1, 2, ..., far apart, and crowds of class 1."""
    numbers = iter(range(1000))
    items = [
        {"category_id": label, "iscrowd": 0, **place(next(numbers))}
        for label, count in enumerate(counts, start=1)
        for _ in range(count)
    ]
    items += [{"category_id": 1, "iscrowd": 1, **place(number)} for number in crowds]
    return {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(len(counts), 0, -1)],
        "annotations": [{"id": i, **item} for i, item in enumerate(items)],
    }


def found(label, scores, start=0):
    """Detections of a class at the places from ``start`` on."""
    return [
        {"category_id": label, "score": score, **place(number)}
        for number, score in enumerate(scores, start=start)
    ]


def test_the_best_threshold_lies_between_what_is_right_and_what_is_not():
    right = [0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4]
    predictions = found(1, right) + found(1, [0.3, 0.2, 0.1], start=500)
    chosen = choose_thresholds(truth([10]), predictions)
    (item,) = chosen.classes
    assert item.threshold == chosen.threshold == 0.35 and not item.reason
    precision, recall, f1 = item.curve.at(0.35)
    assert (precision, recall) == (1, 0.8) and f1 == pytest.approx(16 / 18)
    assert item.curve.at(0.25)[0] == pytest.approx(8 / 9)
    # At a score itself it counts, above all of them nothing does.
    assert item.curve.at(0.4)[1] == 0.8 and item.curve.at(0.400001)[1] == 0.7
    precision, recall, f1 = item.curve.at(0.95)
    assert np.isnan(precision) and recall == f1 == 0
    assert "0.35 for all classes (precision 1.00, recall 0.80, F1 0.89), 0.35 to" in chosen.told()


def test_of_several_that_are_as_good_the_highest_is_taken():
    curve = Curve.of(np.array([0.9, 0.6, 0.5, 0.4]), np.array([1, 0, 0, 1], bool), 2)
    assert curve.best() == 0.75 and curve.at(0.2)[2] == 2 * 2 / 6 == curve.at(0.75)[2]


def test_what_a_tie_holds_is_kept_or_left_out_together():
    curve = Curve.of(np.array([0.5, 0.5, 0.5, 0.2]), np.array([1, 0, 1, 0], bool), 2)
    assert curve.scores.tolist() == [0.5, 0.2] and curve.found.tolist() == [3, 4]
    assert curve.best() == 0.35


def test_scores_beside_one_another_are_told_apart_in_float32():
    high = np.float32(0.5)
    low = np.nextafter(high, np.float32(0))
    curve = Curve.of(np.array([high, low], dtype=float), np.array([True, False]), 1)
    best = np.float32(curve.best())
    assert low < best <= high


def test_classes_with_few_objects_or_nothing_right_have_that_of_all():
    predictions = (
        found(1, [0.9] * 10)
        + found(2, [0.2] * 9, start=10)
        + found(3, [0.8] * 3, start=600)
        + found(4, [0.8] * 3, start=700)
    )
    chosen = choose_thresholds(truth([10, 9, 12, 0, 11]), predictions)
    assert {item.name: item.reason for item in chosen.classes} == {
        "class 1": "",
        "class 2": "fewer than 10 objects",
        "class 3": "nothing found rightly",
        "class 4": "no object",
        "class 5": "nothing found rightly",
    }
    assert [item.category_id for item in chosen.classes] == [1, 2, 3, 4, 5]
    own, *others = (item.threshold for item in chosen.classes)
    assert own == 0.45 and set(others) == {chosen.threshold} == {0.1}
    # Nobody chooses by fewer than ten objects in all, or by nothing that is right.
    assert choose_thresholds(truth([9]), found(1, [0.9] * 9)) is None
    assert choose_thresholds(truth([10]), found(1, [0.9] * 9, start=500)) is None
    assert choose_thresholds(truth([10]), []) is None
    assert choose_thresholds({"images": [], "categories": [], "annotations": []}, []) is None


def test_crowds_count_neither_way():
    right = found(1, [0.9] * 10)
    alarms = found(1, [0.8] * 20, start=100)
    with_crowds = choose_thresholds(truth([10], crowds=range(100, 120)), right + alarms)
    assert with_crowds.curve == choose_thresholds(truth([10]), right).curve
    assert choose_thresholds(truth([10]), right + alarms).threshold == 0.85


def test_a_query_that_wins_two_classes_counts_for_the_better_one():
    right = found(1, [0.9] * 10)
    second = found(2, [0.8] * 10)  # at the same places
    chosen = choose_thresholds(truth([10, 10]), [*second, *right])
    assert chosen.curve.found.tolist() == [10]
    assert best_of_each_box([*second, *right]) == right
    other_image = [item | {"image_id": 2} for item in second]
    assert len(best_of_each_box([*right, *other_image])) == 20


def random_case(random):
    counts = random.integers(0, 30, 3)
    content = truth(counts)
    predictions = []
    for item in content["annotations"]:
        for label in random.permutation([1, 2, 3])[: random.integers(0, 3)]:
            box = [item["bbox"][0] + random.uniform(-6, 6), *item["bbox"][1:]]
            score = round(random.uniform(), random.choice([1, 3]))
            predictions.append(
                {"image_id": 1, "category_id": int(label), "bbox": box, "score": float(score)}
            )
    return content, predictions


def test_no_threshold_has_a_better_f1_than_the_one_that_is_chosen():
    random = np.random.default_rng(0)
    compared = 0
    for _ in range(40):
        content, predictions = random_case(random)
        chosen = choose_thresholds(content, predictions)
        if chosen is None:
            continue

        def f1(threshold, label):
            """By matching anew what is left."""
            kept = [item for item in predictions if item["score"] >= threshold]  # noqa: B023
            (result,) = match_images(content, kept, 0.0)  # noqa: B023
            of, objects = result.classes == label, result.object_classes == label
            if label is None:
                of, objects = result.classes >= 0, result.object_classes >= 0
            right = (result.object_of[of] >= 0).sum()
            return 2 * right / max(of.sum() + objects.sum(), 1)

        everywhere = np.unique([item["score"] for item in predictions])
        best = max(f1(score, None) for score in everywhere)
        assert f1(chosen.threshold, None) == pytest.approx(best) == chosen.curve.at(
            chosen.threshold
        )[2]  # fmt: skip
        for label, item in enumerate(chosen.classes):
            if not item.reason:
                best = max(f1(score, label) for score in everywhere)
                assert f1(item.threshold, label) == pytest.approx(best)
                assert item.curve.at(item.threshold)[2] == pytest.approx(best)
                compared += 1
    assert compared > 30


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    """A run whose detections are right or by far too low, by what its classes are called."""
    folder = tmp_path_factory.mktemp("thresholds") / "run"
    shutil.copytree(small_run, folder)
    random = np.random.default_rng(0)
    content = json.loads((small_run / "shapes/val.json").read_text())
    items = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": s}
        for a in content["annotations"]
        for s in (float(np.float32(random.uniform(0.5, 0.9))),)
    ]
    items += [item | {"bbox": [0, 0, 2, 2], "score": 0.25} for item in items]
    (folder / "coco_instances_results.json").write_text(json.dumps(items))
    return folder


def test_the_page_shows_what_was_chosen_and_its_pictures_follow(run, tmp_path):
    chosen = choose_thresholds(
        json.loads((run / "shapes/val.json").read_text()),
        json.loads((run / "coco_instances_results.json").read_text()),
    )
    assert 0.25 < chosen.threshold < 0.5
    text = open(write_report(run, tmp_path / "page.html")).read()
    cells = f"<td>{chosen.threshold:g}</td><td>1.00</td><td>1.00</td><td>1.00</td>"
    assert f"<tr><td>all classes</td>{cells}<td>14</td>" in text
    assert "of all classes: fewer than 10 objects" in text and "F1 over the score" in text
    assert "with the thresholds of their classes" in text and "of 14 detections 0 are" in text
    low = open(write_report(run, tmp_path / "low.html", threshold=0.1)).read()
    assert "with a score of at least 0.1" in low and "of 14 detections 0 are" not in low
    few = json.loads((run / "coco_instances_results.json").read_text())[-3:]
    shutil.copytree(run, tmp_path / "few", ignore=shutil.ignore_patterns("*.pth"))
    (tmp_path / "few/coco_instances_results.json").write_text(json.dumps(few))
    none = open(write_report(tmp_path / "few")).read()
    assert "None can be chosen" in none and "with a score of at least 0.3" in none


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_thresholds_are_written_into_a_checkpoint_that_is_there(run, tmp_path, capsys, suffix):
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        shutil.copy(run / "model_final.pth", path)
    else:
        export_checkpoint(run / "model_final.pth", "safetensors", path)
    before = read_checkpoint(str(path))
    assert Detector.from_checkpoint(path, device="cpu").thresholds is None
    page = ["--output", str(tmp_path / "page.html")]
    assert main(["report", str(run), *page, "--save-thresholds", str(path)]) == 0
    told = capsys.readouterr().out
    threshold = float(re.search(r"Wrote thresholds into .*: ([\d.]+) for all classes", told)[1])
    detector = Detector.from_checkpoint(path, device="cpu")
    assert detector.thresholds == dict.fromkeys(detector.class_names, threshold)
    after = read_checkpoint(str(path))
    assert after["blueprint"].pop("thresholds") == [threshold] * 5
    assert set(after) == set(before) and after["blueprint"] == before["blueprint"]
    for key, weight in before["model"].items():
        assert torch.equal(after["model"][key], weight)
    assert after.get("iteration") == before.get("iteration")


def test_thresholds_go_where_the_checkpoint_goes(run, tmp_path, caplog):
    path = tmp_path / "model.pth"
    shutil.copy(run / "model_final.pth", path)
    save_thresholds(run, path)
    assert f"Nothing says that {path} is what was evaluated in {run}" in caplog.text
    assert "are replaced" not in caplog.text
    content = torch.load(path, weights_only=True)
    content["blueprint"]["thresholds"] = [0.125] * 5
    torch.save(content, path)
    config = yaml.safe_load((run / "config_resolved.yaml").read_text())
    config["train"]["init_checkpoint"] = str(path)
    shutil.copytree(run, tmp_path / "evaluated")
    (tmp_path / "evaluated/config_resolved.yaml").write_text(yaml.safe_dump(config))
    caplog.clear()
    save_thresholds(tmp_path / "evaluated", path)
    assert "Nothing says" not in caplog.text
    assert "had other thresholds, which are replaced: [0.125, " in caplog.text
    expected = Detector.from_checkpoint(path, device="cpu").thresholds
    assert expected
    exported = export_checkpoint(path, "safetensors")
    assert Detector.from_checkpoint(exported.path, device="cpu").thresholds == expected
    first, *_ = expected
    assert f"{first} {expected[first]:g}, " in open(exported.card).read()
    blueprint = load_model(str(path))[1]
    text = blueprint.to_json()  # what .onnx and .pt2 carry
    assert Blueprint.from_json(text, "m.onnx").thresholds == list(expected.values())
    with pytest.raises(CheckpointError, match="m.onnx: its blueprint is damaged: thresholds.0"):
        Blueprint.from_json(replace(blueprint, thresholds=[2.0] * 5).to_json(), "m.onnx")
    for override, kept in (
        ("model.nms_threshold=0.6", expected),
        ("model.decoder.exit_stage=1", None),
    ):
        assert Detector.from_checkpoint(path, overrides=[override], device="cpu").thresholds == kept
    options = dict(config_file="configs/quickstart.py", device="cpu")
    overrides = ["model.queries.num_queries=8", "dataloader.test.dataset.name=nowhere"]
    assert Detector.from_checkpoint(path, overrides=overrides, **options).thresholds == expected
    # These are of the averages, which were evaluated.
    assert Detector.from_checkpoint(path, averaged=False, device="cpu").thresholds is None
    assert load_model(str(path), averaged=True)[1].thresholds == list(expected.values())


def test_what_cannot_be_kept_is_told(run, tmp_path, capsys):
    content = torch.load(run / "model_final.pth", weights_only=True)
    others = json.loads(json.dumps(content["blueprint"]))
    others["categories"][0]["name"] = "another"
    torch.save(content | {"blueprint": others}, tmp_path / "others.pth")
    torch.save(content["model"], tmp_path / "bare.pth")
    shutil.copytree(run, tmp_path / "none", ignore=shutil.ignore_patterns("*.pth", "coco_*"))
    for folder, name, told in (
        (run, "others.pth", "others.pth has the classes"),
        (run, "bare.pth", "bare.pth does not say which classes it has"),
        (run, "nowhere.pth", "nowhere.pth: there is no such file"),
        (tmp_path / "none", "others.pth", "there is no such file, as an evaluation leaves it"),
    ):
        page = ["--output", str(tmp_path / "page.html")]
        path = str(tmp_path / name)
        assert main(["report", str(folder), *page, "--save-thresholds", path]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([0.5] * 4, "a list of 5 to 5 items"),
        ([0.5] * 6, "a list of 5 to 5 items"),
        ([0.5] * 4 + [1.5], "thresholds.4 is 1.5; expected a number from 0 to 1"),
        ([0.5] * 4 + [float("nan")], "thresholds.4 is nan"),
        ([0.5] * 4 + [True], "thresholds.4 is True"),
        ([0.5] * 4 + ["0.5"], "thresholds.4 is '0.5'"),
        ({"ellipse": 0.5}, "thresholds is {'ellipse': 0.5}"),
        (0.5, "thresholds is 0.5"),
        (None, "thresholds is None"),
    ],
)
def test_a_file_with_thresholds_that_are_none_is_refused(run, tmp_path, value, told):
    content = torch.load(run / "model_final.pth", weights_only=True)
    content["blueprint"]["thresholds"] = value
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=f"blueprint is damaged: .*{re.escape(told)}"):
        Detector.from_checkpoint(tmp_path / "bad.pth")


class Counting:
    """In place of choosing: thresholds that say which evaluation chose them."""

    def __init__(self):
        self.count = 0

    def __call__(self, content, predictions):
        self.count += 1
        empty = Curve.of(np.zeros(0), np.zeros(0, bool), 0)
        choose_thresholds(content, predictions)  # takes what it is given
        classes = [
            (c["id"], c["name"], empty, self.count / 100 + c["id"] / 10000, "")
            for c in content["categories"]
        ]
        return Thresholds(empty, self.count / 100, [ClassThreshold(*item) for item in classes])


def test_a_checkpoint_has_the_thresholds_of_its_own_evaluation(tmp_path, monkeypatch):
    fixed = [f"shapes.root={tmp_path}/shapes", "train.amp.enabled=false", "train.eval_period=4",
             "train.checkpointer.period=3", "train.max_iter=9"]  # fmt: skip

    def train(folder, *overrides, counting, **options):
        monkeypatch.setattr(evaluation, "choose_thresholds", counting)
        options["output_dir"] = tmp_path / folder
        stage_interactor.train("tests/tiny_config.py", [*fixed, *overrides], **options)

    def thresholds(folder, name):
        content = torch.load(tmp_path / folder / f"{name}.pth", weights_only=True)
        return content["blueprint"].get("thresholds")

    counting = Counting()
    train("whole", counting=counting)
    assert counting.count == 3  # after 4, 8 and 9 iterations
    assert thresholds("whole", "model_final") == pytest.approx(
        [0.03 + i / 10000 for i in range(1, 6)]
    )
    for name in ("model_0000002", "model_0000005"):
        assert thresholds("whole", name) is None
    assert thresholds("whole", "model_0000008") == thresholds("whole", "model_final")
    # A kill after the last iteration's checkpoint, before that of the end.
    for name in ("model_final.pth", "model_best.pth"):
        (tmp_path / "whole" / name).unlink(missing_ok=True)
    (tmp_path / "whole/last_checkpoint").write_text("model_0000008.pth")
    train("whole", counting=Counting(), resume=True)
    assert thresholds("whole", "model_final") == thresholds("whole", "model_0000008")
    # Weights to start from bring none.
    start = [f"train.init_checkpoint={tmp_path}/whole/model_final.pth", "train.max_iter=3"]
    train("tuned", *start, "train.eval_period=0", counting=lambda *_: None)
    assert thresholds("tuned", "model_final") is None
