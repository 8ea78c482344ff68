"""The losses of the images that are evaluated."""

import json
import math

import pytest
import torch

from stage_interactor import get_config, train
from stage_interactor.config import ConfigError, build
from stage_interactor.data import DetrDatasetMapper
from stage_interactor.engine import evaluation
from stage_interactor.engine.process import build_model
from stage_interactor.engine.validation import ValidationLoss


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    options = [f"shapes.root={folder / 'shapes'}", f"train.output_dir={folder / 'out'}"]
    options += ["train.device=cpu", "train.amp.enabled=false", "train.validation_loss=true"]
    return get_config("tests/tiny_config.py", options)


@pytest.fixture(scope="module")
def model(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    records = build(cfg, "dataloader.test.dataset")
    del records
    model.class_names = None
    return model


@pytest.fixture(scope="module")
def inputs(cfg):
    """All images with their objects, some of them of another size, one without an object."""
    mapper = DetrDatasetMapper(augmentation=[], is_train=False, with_objects=True)
    inputs = [mapper(record) for record in build(cfg, "dataloader.test.dataset")]
    for image in inputs[:3]:  # padded to another size
        image["image"] = torch.nn.functional.pad(image["image"], (0, 40))
        image["width"] += 40
        image["instances"]._image_size = tuple(image["image"].shape[1:])
    inputs[4]["instances"] = inputs[4]["instances"][:0]
    return inputs


def losses_of_one_batch(model, inputs):
    """As training has them; images are padded to one size, so only those of one size."""
    model.train()
    with torch.no_grad():
        losses = model(inputs)
    model.eval()
    return {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_losses_are_those_of_all_images_as_one_batch(model, inputs, batch_size):
    same = inputs[3:]
    validation = ValidationLoss(model)
    for start in range(0, len(same), batch_size):
        validation(same[start : start + batch_size])
    found = validation.results()["validation"]
    expected = losses_of_one_batch(model, same)
    assert found.keys() == {"total_loss", *expected}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["total_loss"] == pytest.approx(sum(expected.values()), rel=1e-5)


def test_batches_of_several_sizes_change_nothing(model, inputs):
    results = []
    for order in (inputs, inputs[::-1], inputs[::2] + inputs[1::2]):
        for batch_size in (1, 3, 8):
            validation = ValidationLoss(model)
            for start in range(0, len(order), batch_size):
                validation(order[start : start + batch_size])
            results.append(validation.results()["validation"])
    for found in results[1:]:
        assert found == pytest.approx(results[0], rel=1e-5)


def test_detections_are_those_without_it_and_the_model_keeps_no_hook(model, inputs):
    with torch.no_grad():
        plain = model(inputs)
        found = ValidationLoss(model)(inputs)
    assert not model.decoder._forward_hooks
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one["instances"].scores, other["instances"].scores)
        assert torch.equal(one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)


def test_classes_of_another_order_are_those_of_the_model(model, inputs):
    order = [3, 0, 4, 1, 2]  # by the model's class that of the data
    plain, renamed = ValidationLoss(model), ValidationLoss(model, classes=order)
    plain(inputs)
    turned = []
    for image in inputs:
        objects = image["instances"]
        classes = torch.tensor(order)[objects.gt_classes]
        copied = type(objects)(objects.image_size, gt_boxes=objects.gt_boxes, gt_classes=classes)
        turned.append({**image, "instances": copied})
    renamed(turned)
    found, expected = renamed.results()["validation"], plain.results()["validation"]
    assert found == pytest.approx(expected)


def test_images_without_their_objects_have_no_loss(model, inputs):
    validation = ValidationLoss(model)
    bare = [{k: v for k, v in image.items() if k != "instances"} for image in inputs]
    assert len(validation(bare)) == len(bare)
    assert validation.results() == {}


def test_losses_of_another_criterion_are_not_made_up(cfg, model, monkeypatch, caplog):
    class Own(type(model.criterion)):
        def forward(self, outputs, objects):
            return {"loss": outputs[-1].logits.sum()}

    monkeypatch.setattr(model.criterion, "__class__", Own)
    assert "validation" not in evaluation.do_test(cfg, model)
    assert "another criterion" in caplog.text


def test_a_detector_in_half_precision_leaves_the_losses_as_they_are(cfg, model):
    results = {}
    for dtype in ("float32", "bfloat16"):
        cfg.train.inference.dtype = dtype
        results[dtype] = evaluation.do_test(cfg, model)["validation"]
    cfg.train.inference.dtype = "float32"
    assert results["float32"] == results["bfloat16"]


def test_ap_is_the_same_with_the_losses_and_without(cfg, model):
    found = []
    for wanted in (True, False):
        cfg.train.validation_loss = wanted
        found.append(evaluation.do_test(cfg, model))
    cfg.train.validation_loss = True
    assert found[0].pop("validation")["total_loss"] > 0
    assert str(found[0]) == str(found[1])


def test_a_run_writes_them_and_may_choose_its_best_weights_by_them(cfg, tmp_path):
    options = [
        f"shapes.root={cfg.shapes.root}", f"train.output_dir={tmp_path}", "train.device=cpu",
        "train.amp.enabled=false", "train.max_iter=4", "train.eval_period=2",
        "train.best_checkpointer.val_metric=validation/total_loss",
        "train.log_period=1",
    ]  # fmt: skip
    run = train("tests/tiny_config.py", [*options, "train.validation_loss=true"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    values = {line["iteration"]: line.get("validation/total_loss") for line in lines}
    assert values[1] > 0 and values[3] > 0 and values[0] is None
    assert run.metrics["validation"]["total_loss"] == pytest.approx(values[3])
    assert math.isclose(
        run.metrics["validation"]["total_loss"],
        sum(v for k, v in run.metrics["validation"].items() if k != "total_loss"),
        rel_tol=1e-9,
    )
    best = torch.load(run.best_checkpoint)["run"]["best"]
    assert best["metric"] == "validation/total_loss"
    assert best["value"] == pytest.approx(min(values[1], values[3]))


def test_a_metric_of_losses_that_are_not_computed_is_told_before_training(cfg, tmp_path):
    options = [
        f"shapes.root={cfg.shapes.root}", f"train.output_dir={tmp_path}", "train.device=cpu",
        "train.best_checkpointer.val_metric=validation/total_loss", "train.max_iter=4",
    ]  # fmt: skip
    with pytest.raises((ConfigError, ValueError), match="the evaluator has"):
        train("tests/tiny_config.py", options)
