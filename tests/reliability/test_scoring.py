"""COCO's metric is the same to the last bit, by pycocotools and by the faster package."""

import contextlib
import copy
import io
import logging
import sys

import numpy as np
import pytest
from checks.coco_detections import coco_like
from pycocotools.coco import COCO

from stage_interactor.d2.embedded.scoring import evaluated
from stage_interactor.d2.screening import detection_limits

FIGURES = ("precision", "recall", "scores")


def score(content, results, limits, *, fast):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        return evaluated(truth, copy.deepcopy(results), limits, fast=fast)


def figures(*arguments, **options):
    return {key: score(*arguments, **options).eval[key] for key in FIGURES}


@pytest.fixture
def package():
    pytest.importorskip("faster_coco_eval")


def check_equal(content, results, limits, caplog):
    with caplog.at_level(logging.INFO):
        fast = figures(content, results, limits, fast=True)
    assert "Scored by faster-coco-eval" in caplog.text
    assert "Scored by pycocotools" not in caplog.text
    plain = figures(content, results, limits, fast=False)
    for key in FIGURES:
        assert plain[key].shape == fast[key].shape
        np.testing.assert_array_equal(plain[key], fast[key])  # every bit: no tolerance
    return plain


@pytest.mark.cases(12)
def test_all_figures_are_equal_to_the_last_bit(package, rng, cases, caplog):
    for _ in range(cases):
        content, results = coco_like(
            rng.randint(1, 40),
            classes=rng.choice([1, 2, 5, 80]),
            detections=rng.choice([1, 2, 10, 100]),
            seed=rng.randrange(2**32),
        )
        if rng.random() < 0.3:
            for result in results:
                result["score"] = rng.choice([0.5, 1.0])
        results = results[: rng.randint(1, len(results))]
        limits = detection_limits(rng.choice([None, 1, 2, 5, 10, 300]))
        check_equal(content, results, limits, caplog)


@pytest.mark.parametrize("objects", [1, 2, 100, 101, 150])
@pytest.mark.parametrize("right", ["100", "110", "0100", "1"])
def test_the_first_detections_of_a_class_are_equal(package, objects, right, caplog):
    """Whether the best of them are right, one after the other: where the two packages differ."""
    boxes = [[30.0 * (i % 20), 30.0 * (i // 20), 20.0, 20.0] for i in range(objects + 1)]
    content = {
        "info": {},
        "images": [{"id": 7, "width": 640, "height": 480}],
        "categories": [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}],
        "annotations": [
            {"id": i + 1, "image_id": 7, "category_id": 3, "bbox": box, "area": 400.0, "iscrowd": 0}
            for i, box in enumerate(boxes[:objects])
        ],
    }
    results = []
    for rank, kind in enumerate(right):
        box = boxes[min(rank, objects - 1)] if kind == "1" else [600.0, 470.0, 20.0, 20.0]
        results.append({"image_id": 7, "category_id": 3, "bbox": box, "score": 0.9 - 0.1 * rank})
    plain = check_equal(content, results, [1, 10, 100], caplog)
    assert plain["precision"].max() == (1 if right == "110" and objects > 1 else
                                        0.5 if right == "0100" else 1 - 2**-52)  # fmt: skip


def test_without_the_package_pycocotools_scores_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    content, results = coco_like(3, classes=3)
    with caplog.at_level(logging.INFO):
        fast = figures(content, results, [1, 10, 100], fast=True)
    assert "Scored by pycocotools (faster-coco-eval: not installed" in caplog.text
    plain = figures(content, results, [1, 10, 100], fast=False)
    assert all(np.array_equal(plain[key], fast[key]) for key in FIGURES)


def test_what_the_package_cannot_take_pycocotools_scores(package, caplog):
    content, results = coco_like(3, classes=3)
    for item in (*content["images"], *content["annotations"], *results):
        key = "image_id" if "image_id" in item else "id"
        item[key] = f"picture {item[key]}"
    with caplog.at_level(logging.INFO):
        fast = figures(content, results, [1, 10, 100], fast=True)
    assert "Scored by pycocotools (faster-coco-eval: " in caplog.text
    plain = figures(content, results, [1, 10, 100], fast=False)
    assert all(np.array_equal(plain[key], fast[key]) for key in FIGURES)
