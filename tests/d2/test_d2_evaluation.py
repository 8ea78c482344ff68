"""Inference over a data set and COCO average precision, on whichever runtime is there."""

import json
import math

import pytest
import torch

from stage_interactor.d2 import structures
from stage_interactor.d2.data import DatasetCatalog, MetadataCatalog, register_coco_instances
from stage_interactor.d2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)

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
