"""Metrics other than COCO's: Pascal VOC's against its development kit's own way, LVIS's against
the package ``lvis``; both from a file to the figure."""

import json
import math
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor.d2 import structures
from stage_interactor.d2.data import DatasetCatalog, MetadataCatalog
from stage_interactor.d2.evaluation import LVISEvaluator, PascalVOCDetectionEvaluator
from stage_interactor.d2.metrics import voc_average_precision
from stage_interactor.data import load_coco_dataset
from stage_interactor.data.folders import read_folder, write_coco
from stage_interactor.data.joining import join_folders


def development_kit(objects, found, threshold, use_07_metric):
    """VOCevaldet.m, step by step, on corners of inclusive pixels from 1 on."""
    npos = sum(not item["iscrowd"] for item in objects)
    taken, right, wrong = set(), [], []
    for item in sorted(found, key=lambda item: -item["score"]):
        x, y, w, h = item["bbox"]
        box = (x + 1, y + 1, x + w, y + h)
        most, nearest = -math.inf, None
        for index, other in enumerate(objects):
            if other["image_id"] != item["image_id"]:
                continue
            x, y, w, h = other["bbox"]
            there = (x + 1, y + 1, x + w, y + h)
            width = min(box[2], there[2]) - max(box[0], there[0]) + 1
            height = min(box[3], there[3]) - max(box[1], there[1]) + 1
            if width > 0 and height > 0:
                areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, there)]
                overlap = width * height / (sum(areas) - width * height)
                if overlap > most:
                    most, nearest = overlap, index
        hit = most >= threshold
        if hit and objects[nearest]["iscrowd"]:
            right.append(0), wrong.append(0)
        else:
            first = hit and nearest not in taken
            taken |= {nearest} if hit else set()
            right.append(int(first)), wrong.append(int(not first))
    tp, fp = np.cumsum(right), np.cumsum(wrong)
    recall = tp / npos
    precision = tp / np.maximum(tp + fp, 1e-9)
    if use_07_metric:
        return sum(max(precision[recall >= t], default=0) / 11 for t in np.arange(0, 1.1, 0.1))
    recall, precision = [0, *recall, 1], [0, *precision, 0]
    for index in range(len(precision) - 2, -1, -1):
        precision[index] = max(precision[index], precision[index + 1])
    steps = [i for i in range(1, len(recall)) if recall[i] != recall[i - 1]]
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in steps)


def random_detections(seed, images=12):
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = rng.integers(1, 60, 4)
            crowd = int(rng.random() < 0.25)
            objects.append({"image_id": image, "bbox": [x, y, w, h], "iscrowd": crowd})
            for _ in range(rng.integers(0, 4)):
                moved = np.array([x, y, w, h]) + rng.integers(-5, 6, 4)
                box = [*moved[:2], *moved[2:].clip(1)]
                found.append({"image_id": image, "bbox": box, "score": rng.random()})
        box = [*rng.integers(1, 60, 4)]
        found.append({"image_id": image, "bbox": box, "score": rng.random()})
    return objects, found


@pytest.mark.parametrize("use_07_metric", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_vocs_metric_is_that_of_its_development_kit(seed, use_07_metric):
    objects, found = random_detections(seed)
    ours = voc_average_precision(objects, found, use_07_metric)
    theirs = [
        100 * development_kit(objects, found, threshold, use_07_metric)
        for threshold in np.arange(50, 100, 5) / 100
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert 10 < ours[0] < 95 and ours[-1] < ours[0]


def test_only_the_best_of_an_image_count_where_that_is_asked_for():
    objects = [{"image_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 0}]
    found = [{"image_id": 1, "bbox": [40, 0, 9, 9], "score": 0.9},
             {"image_id": 1, "bbox": [0, 0, 9, 9], "score": 0.8}]  # fmt: skip
    assert voc_average_precision(objects, found)[0] == 50
    assert voc_average_precision(objects, found, limit=1)[0] == 0
    assert np.isnan(voc_average_precision([{**objects[0], "iscrowd": 1}], found)).all()
    assert (voc_average_precision(objects, []) == 0).all()


@pytest.fixture
def names():
    """Of data sets, which are forgotten afterwards."""
    found = []
    yield found
    for name in found:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def given(evaluator, results, sizes, category_ids):
    """What an evaluator says of detections in COCO's format."""
    evaluator.reset()
    for image, (height, width) in sizes.items():
        of = [item for item in results if item["image_id"] == image]
        instances = structures.Instances((height, width))
        boxes = torch.tensor([item["bbox"] for item in of], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = structures.Boxes(boxes)
        instances.pred_boxes.tensor = boxes  # in all their digits
        instances.scores = torch.tensor([item["score"] for item in of], dtype=torch.float64)
        labels = [category_ids.index(item["category_id"]) for item in of]
        instances.pred_classes = torch.tensor(labels, dtype=torch.int64)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


VOC = """<annotation><filename>{name}.jpg</filename><size><width>100</width><height>80</height>
</size>{objects}</annotation>"""
OBJECT = """<object><name>{0}</name><difficult>{1}</difficult><bndbox><xmin>{2}</xmin>
<ymin>{3}</ymin><xmax>{4}</xmax><ymax>{5}</ymax></bndbox></object>"""


def test_difficult_objects_of_vocs_files_count_neither_way(tmp_path, names):
    objects = {
        "a": [("cat", 0, 1, 1, 10, 10), ("cat", 1, 31, 31, 50, 50)],
        "b": [("dog", 0, 11, 11, 30, 30)],
    }
    for name, items in objects.items():
        Image.new("RGB", (100, 80)).save(tmp_path / f"{name}.jpg")
        text = VOC.format(name=name, objects="".join(OBJECT.format(*item) for item in items))
        (tmp_path / f"{name}.xml").write_text(text)
    split = read_folder(str(tmp_path)).splits["train"]
    files = write_coco(read_folder(str(tmp_path)), tmp_path / "out")
    json_file = files["train"]
    names.append("voc_of_a_test")
    load_coco_dataset("voc_of_a_test", json_file, split.image_root, is_train=False)
    evaluator = PascalVOCDetectionEvaluator("voc_of_a_test", output_dir=str(tmp_path / "out"))
    ids = {item["name"]: item["id"] for item in split.categories}
    image = {item["file_name"]: item["id"] for item in split.content["images"]}

    def score(*found):
        results = [
            {"image_id": image[f"{name}.jpg"], "category_id": ids[label], "bbox": box, "score": s}
            for name, label, box, s in found
        ]
        sizes = dict.fromkeys(image.values(), (80, 100))
        return given(evaluator, results, sizes, sorted(ids.values()))

    whole = ("a", "cat", [0, 0, 10, 10], 0.5)  # pixels 1 to 10
    dog = ("b", "dog", [10, 10, 20, 20], 0.5)
    scores = score(whole, dog)
    assert list(scores) == ["AP", "AP50", "AP75", "AP50-cat", "AP50-dog"]
    assert list(scores) == evaluator.metric_names(["cat", "dog"])
    assert set(scores.values()) == {100.0}
    # Two detections of the difficult cat before the other one are as if they were not there.
    hard = ("a", "cat", [30, 30, 20, 20], 0.9)
    assert score(hard, hard, whole, dog) == scores
    assert score(("b", "cat", [30, 30, 20, 20], 0.9), whole, dog)["AP50-cat"] == 50
    # Exactly half is enough.
    assert score(("a", "cat", [0, 0, 10, 5], 0.5), dog)["AP50-cat"] == 100
    assert score(("a", "cat", [0, 0, 10, 4.9], 0.5), dog)["AP50-cat"] == 0
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert [item["category_id"] for item in written] == [ids["cat"], ids["dog"]]
    MetadataCatalog.get("voc_of_a_test").set(year=2007)
    assert PascalVOCDetectionEvaluator("voc_of_a_test").use_07_metric
    assert not PascalVOCDetectionEvaluator("voc_of_a_test", use_07_metric=False).use_07_metric
    with pytest.raises(ValueError, match="use_07_metric must be"):
        PascalVOCDetectionEvaluator("voc_of_a_test", use_07_metric="2007")


def lvis_file(folder, seed, classes=12, images=30):
    """A file as LVIS's, its pictures, and detections."""
    rng = np.random.default_rng(seed)
    categories = [
        {"id": index + 1, "name": f"c{index}", "frequency": "rcf"[index % 3], "synset": "a.n.01",
         "synonyms": [f"c{index}"], "def": "", "image_count": 1, "instance_count": 1}
        for index in range(classes)
    ]  # fmt: skip
    content = {"images": [], "annotations": [], "categories": categories, "info": {}}
    content["licenses"] = []
    found = []
    (folder / "train2017").mkdir(parents=True)
    for image in range(1, images + 1):
        there = rng.choice(classes, 3, replace=False) + 1
        rest = [key for key in range(1, classes + 1) if key not in there]
        name = f"train2017/{image:012d}.jpg"
        Image.new("RGB", (640, 480)).save(folder / name)
        content["images"].append(
            {
                "id": image,
                "width": 640,
                "height": 480,
                "coco_url": f"http://images.cocodataset.org/{name}",
                "neg_category_ids": rng.choice(rest, 4, replace=False).tolist(),
                "not_exhaustive_category_ids": rng.choice([*there, *rest], 2, False).tolist(),
            }
        )
        for key in there:
            for _ in range(rng.integers(1, 4)):
                x, y, w, h = [*rng.uniform(0, 250, 2), *rng.uniform(5, 200, 2)]
                content["annotations"].append(
                    {"id": len(content["annotations"]) + 1, "image_id": image,
                     "category_id": int(key), "bbox": [x, y, w, h],
                     "area": w * h * rng.uniform(0.5, 1), "segmentation": [[0, 0, 1, 1, 2, 2]]}
                )  # fmt: skip
                for _ in range(rng.integers(0, 4)):
                    moved = np.array([x, y, w, h]) + rng.normal(0, 6, 4)
                    label = rng.choice([key, key, key, rng.integers(1, classes + 1)])
                    box = [*moved[:2].tolist(), *moved[2:].clip(1).tolist()]
                    found.append({"image_id": image, "category_id": int(label), "bbox": box,
                                  "score": float(rng.random())})  # fmt: skip
    (folder / "lvis.json").write_text(json.dumps(content))
    return content, found


needs_scorer = pytest.mark.skipif(
    find_spec("faster_coco_eval") is None, reason="needs stage-interactor[lvis]"
)


@needs_scorer
@pytest.mark.parametrize(("seed", "limit"), [(0, None), (1, 6)])
def test_lvis_metric_is_that_of_its_package(seed, limit, tmp_path, names, monkeypatch):
    lvis = pytest.importorskip("lvis", reason="compares with the package lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # which numpy had when it was written
    content, found = lvis_file(tmp_path, seed)
    names.append("lvis_of_a_test")
    path = str(tmp_path / "lvis.json")
    records = load_coco_dataset("lvis_of_a_test", path, str(tmp_path), is_train=False)
    assert len(records) == 30 and records[0]["file_name"].endswith("train2017/000000000001.jpg")
    assert sum(len(r["annotations"]) for r in records) == len(content["annotations"])
    evaluator = LVISEvaluator("lvis_of_a_test", max_dets_per_image=limit)
    sizes = {item["id"]: (480, 640) for item in content["images"]}
    ours = given(evaluator, found, sizes, [item["id"] for item in content["categories"]])
    truth = lvis.LVIS(path)
    results = lvis.LVISResults(truth, [dict(f) for f in found], max_dets=limit or 300)
    scorer = lvis.LVISEval(truth, results, "bbox")
    scorer.params.max_dets = limit or 300
    scorer.run()
    theirs = scorer.get_results()
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"):
        assert ours[name] == pytest.approx(100 * theirs[name], abs=1e-9), name
    assert 10 < ours["AP"] < 60 and ours["APr"] != ours["APf"]
    assert list(ours) == evaluator.metric_names([item["name"] for item in content["categories"]])
    precision = scorer.eval["precision"][:, :, 3, 0]
    assert ours["AP-c3"] == pytest.approx(100 * precision[precision > -1].mean(), abs=1e-9)


@needs_scorer
def test_data_without_what_lvis_metric_needs_are_refused(tmp_path, names):
    content, _ = lvis_file(tmp_path, 0, images=3)
    for item in content["images"]:
        del item["neg_category_ids"]
    (tmp_path / "other.json").write_text(json.dumps(content))
    names.append("other_of_a_test")
    load_coco_dataset("other_of_a_test", str(tmp_path / "other.json"), str(tmp_path))
    with pytest.raises(ValueError, match="its images have no neg_category_ids and not_exhaus"):
        LVISEvaluator("other_of_a_test")
    content, _ = lvis_file(tmp_path / "more", 0, images=3)
    content["images"][1]["neg_category_ids"] = [99]
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"images\[1\].neg_category_ids is \[99\]; it must be a"):
        load_coco_dataset("wrong", str(tmp_path / "wrong.json"), str(tmp_path))
    content["images"][1]["neg_category_ids"] = [1]
    del content["categories"][0]["frequency"]
    (tmp_path / "rare.json").write_text(json.dumps(content))
    names.append("rare_of_a_test")
    load_coco_dataset("rare_of_a_test", str(tmp_path / "rare.json"), str(tmp_path / "more"))
    with pytest.raises(ValueError, match="its categories have no frequency"):
        LVISEvaluator("rare_of_a_test")


def test_joined_data_do_not_keep_ids_of_other_categories(tmp_path):
    lvis_file(tmp_path / "a", 0, images=2)
    folder = read_folder(str(tmp_path / "a"))
    assert "neg_category_ids" in folder.splits["train"].content["images"][0]
    other = read_folder(str(tmp_path / "a"))
    joined = join_folders([folder, other], evaluated=False)
    assert "neg_category_ids" not in joined.splits["train"].content["images"][0]


def test_without_its_scorer_lvis_metric_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'stage-interactor\[lvis\]'"):
        LVISEvaluator("coco_2017_val")
