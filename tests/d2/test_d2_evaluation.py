"""Inference over a data set and COCO average precision, on whichever runtime is there."""

import json
import math

import pytest
import torch
import torch.multiprocessing as mp
from checks.processes import join, leave

from stage_interactor.d2 import structures
from stage_interactor.d2.data import DatasetCatalog, MetadataCatalog, register_coco_instances
from stage_interactor.d2.detections import UnusableDetectionsError, usable
from stage_interactor.d2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from stage_interactor.d2.screening import Screen, Screened

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


@pytest.fixture
def dataset(coco_files, request):
    name = f"shapes_{request.node.name}"
    register_coco_instances(name, {}, *coco_files)
    DatasetCatalog.get(name)  # loads the classes
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def perfect(json_file):
    """Detections that are the annotations themselves."""
    content = json.loads(open(json_file).read())
    ids = sorted(c["id"] for c in content["categories"])
    inputs, outputs = [], []
    for image in content["images"]:
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        instances = structures.Instances((image["height"], image["width"]))
        boxes = torch.tensor([a["bbox"] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = structures.Boxes(boxes)
        instances.scores = torch.ones(len(found))
        instances.pred_classes = torch.tensor([ids.index(a["category_id"]) for a in found])
        inputs.append({"image_id": image["id"]})
        outputs.append({"instances": instances})
    return inputs, outputs


def evaluate(evaluator, inputs, outputs):
    evaluator.reset()
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def test_the_annotations_themselves_score_one_hundred(dataset, coco_files, tmp_path):
    evaluator = COCOEvaluator(dataset, ("bbox",), False, str(tmp_path), use_fast_impl=False)
    scores = evaluate(evaluator, *perfect(coco_files[0]))["bbox"]
    assert list(scores) == METRICS + ["AP-disc", "AP-square", "AP-ring"]
    assert scores["AP"] == pytest.approx(100) and scores["AP-ring"] == pytest.approx(100)
    assert math.isnan(scores["APl"])  # no object is that large


def test_results_are_written_with_the_category_ids_of_the_file(dataset, coco_files, tmp_path):
    evaluator = COCOEvaluator(dataset, output_dir=str(tmp_path), use_fast_impl=False)
    evaluate(evaluator, *perfect(coco_files[0]))
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    annotations = json.loads(open(coco_files[0]).read())["annotations"]
    assert [r["category_id"] for r in results] == [a["category_id"] for a in annotations]
    assert [r["image_id"] for r in results] == [a["image_id"] for a in annotations]
    assert results[0]["bbox"] == pytest.approx(annotations[0]["bbox"], abs=1e-4)
    predictions = torch.load(tmp_path / "instances_predictions.pth", weights_only=True)
    assert len(predictions) == 12
    assert predictions[0]["instances"][0]["category_id"] in (0, 1, 2)


def test_a_file_without_annotations_gives_results_but_no_score(coco_files, tmp_path):
    content = json.loads(open(coco_files[0]).read())
    del content["annotations"]
    path = tmp_path / "test-dev.json"
    path.write_text(json.dumps(content))
    name = "shapes_without_annotations"
    register_coco_instances(name, {}, str(path), coco_files[1])
    DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
    assert evaluate(evaluator, *perfect(coco_files[0])) == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) > 10


def test_a_limit_on_detections_cuts_the_lowest_scores(dataset, coco_files, detections):
    inputs, outputs = detections(coco_files[0], structures, per_image=40)
    evaluators = [
        COCOEvaluator(dataset, use_fast_impl=False, max_dets_per_image=limit)
        for limit in (None, 100, 5)
    ]
    default, hundred, five = (evaluate(e, inputs, outputs)["bbox"]["AP"] for e in evaluators)
    assert default == hundred > five > 0


def test_no_detections_score_nan_and_no_images_score_nothing(dataset, coco_files):
    evaluator = COCOEvaluator(dataset, use_fast_impl=False)
    inputs, outputs = perfect(coco_files[0])
    empty = [{"instances": output["instances"][:0]} for output in outputs]
    scores = evaluate(evaluator, inputs, empty)["bbox"]
    assert list(scores) == METRICS and all(math.isnan(v) for v in scores.values())
    assert evaluate(evaluator, [], []) == {}


def test_a_class_that_the_data_set_lacks_is_refused(dataset, coco_files):
    inputs, outputs = perfect(coco_files[0])
    outputs[0]["instances"].pred_classes[0] = 3
    with pytest.raises((ValueError, AssertionError), match="3"):
        evaluate(COCOEvaluator(dataset, use_fast_impl=False), inputs, outputs)


def test_a_data_set_without_a_file_is_converted(dataset, coco_files, tmp_path):
    records = DatasetCatalog.get(dataset)
    for record in records:
        for annotation in record["annotations"]:
            annotation.pop("segmentation", None)
    name = "shapes_from_a_function"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["disc", "square", "ring"]
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
    scores = evaluate(evaluator, *perfect(coco_files[0]))["bbox"]
    assert scores["AP"] == pytest.approx(100)
    written = json.loads((tmp_path / f"{name}_coco_format.json").read_text())
    assert [c["id"] for c in written["categories"]] == [0, 1, 2]
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


class Counter(DatasetEvaluator):
    def reset(self):
        self.seen = []

    def process(self, inputs, outputs):
        self.seen += outputs

    def evaluate(self):
        return {"count": len(self.seen)}


def test_inference_is_in_evaluation_mode_without_gradients():
    model = torch.nn.Dropout(0.5)
    model.train()
    seen = []
    model.register_forward_hook(lambda m, i, o: seen.append((m.training, torch.is_grad_enabled())))
    loader = [torch.ones(2)] * 7
    assert inference_on_dataset(model, loader, Counter()) == {"count": 14}
    assert seen == [(False, False)] * 7 and model.training and torch.is_grad_enabled()


def test_results_are_printed_to_paste(logged):
    print_csv_format({"bbox": {"AP": 41.23456, "AP50": 60.0, "AP-disc": 1.0}})
    assert logged[1:] == ["copypaste: AP,AP50", "copypaste: 41.2346,60.0000"]


NAN, INF = float("nan"), float("inf")
UNUSABLE = {  # box xyxy, score
    "a_coordinate_is_nan": ([NAN, 10, 30, 30], 0.9),
    "all_are_nan": ([NAN] * 4, NAN),
    "the_width_is_infinite": ([10, 10, INF, 30], 0.9),
    "left_is_minus_infinity": ([-INF, 10, 30, 30], 0.9),
    "left_and_right_are_infinite": ([INF, 10, INF, 30], 0.9),
    "the_width_overflows": ([-3e38, 10, 3e38, 30], 0.9),
    "right_is_left_of_left": ([30, 10, 20, 30], 0.9),
    "bottom_is_above_top": ([10, 30, 20, 10], 0.9),
    "the_score_of_a_good_box_is_nan": ([10, 10, 30, 30], NAN),
    "the_score_of_a_good_box_is_infinite": ([10, 10, 30, 30], INF),
}


def with_another(output, box, score):
    """The output and one more detection, the first."""
    old, new = output["instances"], structures.Instances(output["instances"].image_size)
    new.pred_boxes = structures.Boxes(torch.tensor([box], dtype=torch.float))
    new.scores = torch.tensor([score], dtype=torch.float)
    new.pred_classes = torch.zeros(1, dtype=torch.long)
    return {"instances": structures.Instances.cat([new, old])}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_detection_is_an_error_or_left_out(dataset, coco_files, tmp_path, logged, kind):
    inputs, outputs = perfect(coco_files[0])
    expected = evaluate(COCOEvaluator(dataset, use_fast_impl=False), inputs, outputs)["bbox"]
    inputs[1] |= {"file_name": "some/where.png"}
    for index in (0, 1, 1):
        outputs[index] = with_another(outputs[index], *UNUSABLE[kind])
    told = r"3 detections in 2 pictures .*some/where.png \(2\), image 1 \(1\)"
    options = dict(use_fast_impl=False, output_dir=str(tmp_path))
    with pytest.raises(UnusableDetectionsError, match=told):
        evaluate(COCOEvaluator(dataset, **options), inputs, outputs)
    lenient = COCOEvaluator(dataset, unusable_detections="warning", **options)
    scores = evaluate(lenient, inputs, outputs)["bbox"]
    assert scores == pytest.approx(expected, nan_ok=True)
    assert any("3 detections in 2 pictures" in line for line in logged)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert all(math.isfinite(value) for item in written for value in (*item["bbox"], item["score"]))
    assert len(written) == sum(len(output["instances"]) for output in outputs) - 3
    assert evaluate(lenient, *perfect(coco_files[0]))["bbox"] == pytest.approx(scores, nan_ok=True)


def test_where_nothing_is_usable_nothing_scores_and_a_few_pictures_are_named(dataset, coco_files):
    inputs, outputs = perfect(coco_files[0])
    empty = [{"instances": output["instances"][:0]} for output in outputs]
    outputs = [with_another(output, [NAN] * 4, 0.5) for output in empty]
    with pytest.raises(UnusableDetectionsError, match=r"12 detections in 12 .*\) and 7 more\."):
        evaluate(COCOEvaluator(dataset, use_fast_impl=False), inputs, outputs)
    lenient = COCOEvaluator(dataset, use_fast_impl=False, unusable_detections="warning")
    assert math.isnan(evaluate(lenient, inputs, outputs)["bbox"]["AP"])
    with pytest.raises(ValueError, match="'error' or 'warning', got 'warn'"):
        COCOEvaluator(dataset, unusable_detections="warn")


def test_boxes_without_width_are_detections():
    boxes = torch.tensor([[5.0, 5, 5, 9], [0, 0, 0, 0]])
    assert usable(boxes, torch.tensor([0.0, 1])).all() and len(usable(boxes[:0], boxes[:0, 0])) == 0


def in_two_processes(rank, port, folder):
    join(rank, port, 2)
    boxes = torch.tensor([[0.0, 0, NAN if rank else 2, 2], [0.0, 0, 2, 2]])
    found = structures.Instances((9, 9), pred_boxes=structures.Boxes(boxes), scores=torch.ones(2))
    for kind in ("error", "warning"):
        evaluator = Screened(Counter(), Screen(kind))
        evaluator.reset()
        evaluator.process([{"file_name": f"{rank}.jpg"}], [{"instances": found}])
        try:
            told = str(len(evaluator._evaluator.seen[0]["instances"])) + str(evaluator.evaluate())
        except UnusableDetectionsError as error:
            told = str(error)
        (folder / f"{kind}{rank}").write_text(told)
    leave()


def test_the_error_is_raised_on_every_process(tmp_path, free_port):
    mp.spawn(in_two_processes, args=(free_port, tmp_path), nprocs=2)
    for rank in (0, 1):
        told = (tmp_path / f"error{rank}").read_text()
        assert "1 detections in 1 pictures" in told and "1.jpg (1)" in told
        expected = f"{2 - rank}{{'count': 1}}"
        assert (tmp_path / f"warning{rank}").read_text() == expected


def limited(dataset, coco_files, limit, wrong_class=None):
    """AP50 of the right class where six wrong detections of a class come before a right one."""
    content = json.loads(open(coco_files[0]).read())
    ids = sorted(category["id"] for category in content["categories"])
    objects = [a for a in content["annotations"] if not a["iscrowd"]]
    truth = objects[0]
    label = ids.index(truth["category_id"])
    x, y, w, h = truth["bbox"]
    boxes = torch.tensor([[x, y, x + w, y + h]] + [[0.0, 0, 1, 1]] * 6)
    found = structures.Instances((48, 64), pred_boxes=structures.Boxes(boxes))
    found.scores = torch.tensor([0.1] + [0.9] * 6)
    found.pred_classes = torch.tensor([label] + [label if wrong_class is None else wrong_class] * 6)
    evaluator = COCOEvaluator(dataset, use_fast_impl=False, max_dets_per_image=limit)
    scores = evaluate(evaluator, [{"image_id": truth["image_id"]}], [{"instances": found}])
    return scores["bbox"][f"AP-{['disc', 'square', 'ring'][label]}"]


def test_a_limit_below_ten_counts_as_many_of_a_class(dataset, coco_files):
    assert limited(dataset, coco_files, 7) == limited(dataset, coco_files, None) > 0
    for limit in (1, 2, 5, 6):
        assert limited(dataset, coco_files, limit) == 0
    label = [2, 5, 9].index(json.loads(open(coco_files[0]).read())["annotations"][0]["category_id"])
    assert limited(dataset, coco_files, 1, wrong_class=(label + 1) % 3) > 0  # a class by itself


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "5"])
def test_a_limit_that_is_none_is_refused(dataset, limit):
    with pytest.raises(ValueError, match="max_dets_per_image must be an integer of 1 or more"):
        COCOEvaluator(dataset, max_dets_per_image=limit)


def test_two_classes_of_one_name_are_never_one_line(coco_files, tmp_path):
    content = json.loads(open(coco_files[0]).read())
    for category in content["categories"]:
        category["name"] = "disc"
    path = tmp_path / "same.json"
    path.write_text(json.dumps(content))
    register_coco_instances("shapes_of_one_name", {}, str(path), coco_files[1])
    DatasetCatalog.get("shapes_of_one_name")
    evaluator = COCOEvaluator("shapes_of_one_name", use_fast_impl=False)
    with pytest.raises(ValueError, match="several classes of the name .'disc'"):
        evaluate(evaluator, *perfect(coco_files[0]))
