"""AP of the stages of a cascade, and of what is left of it without some of its parts."""

import json

import pytest
import stages_ap
import torch
from checks.small import random_image, tiny_model, without_zeros

from stage_interactor.commands import main
from stage_interactor.d2.evaluation import DatasetEvaluator
from stage_interactor.engine.cascade import ORACLE, score_exits, score_stages
from stage_interactor.engine.judge import Judge
from stage_interactor.inference.blueprint import load_model
from stage_interactor.modeling import Decoder
from stage_interactor.modeling.geometry import box_iou


class Kept(DatasetEvaluator):
    """What came, in place of an AP of it."""

    kept: dict = {}

    def __init__(self, name):
        self.name = name

    def reset(self):
        self.kept[self.name] = []

    def process(self, inputs, outputs):
        self.kept[self.name] += [output["instances"] for output in outputs]

    def evaluate(self):
        return {"bbox": {"AP": float(len(self.kept[self.name]))}}


def kept_of(model, images):
    Kept.kept = {}
    count = iter(range(100))
    found = score_stages(model, [[image] for image in images], lambda: Kept(next(count)))
    return found, dict(zip(found.metrics, Kept.kept.values()))


def detector(**options):
    torch.manual_seed(0)
    return without_zeros(tiny_model(**{"num_points": (16, 8, 8, 8)} | options), std=0.05).eval()


IMAGES = [random_image(3, size, seed=seed) for seed, size in enumerate([(64, 96), (96, 64)] * 2)]


def equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.pred_classes, other.pred_classes)
        torch.testing.assert_close(one.scores, other.scores)
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor)


def alone(model):
    with torch.no_grad():
        return [model([image])[0]["instances"] for image in IMAGES]


def test_every_stage_is_evaluated_as_if_it_was_the_last():
    found, kept = kept_of(detector(exit_stage=2), IMAGES)  # whatever ends it early
    assert [name for name in found.metrics if name.startswith("stage")] == [
        "stage 1", "stage 2", "stage 3", "stage 4"
    ]  # fmt: skip
    for stage in range(1, 5):
        equal(kept[f"stage {stage}"], alone(detector(exit_stage=stage)))


@pytest.mark.parametrize("name", ["no reuse", "no reuse on stage 4", "no static mixing",
                                  "no static mixing on stage 3"])  # fmt: skip
def test_a_part_is_left_out_by_what_makes_it_nothing(name):
    """By weights: gates of 0 take the own filter, layers of 0 add nothing."""
    model = detector()
    before = [instances.scores.clone() for instances in alone(model)]
    _, kept = kept_of(model, IMAGES)
    assert all(torch.equal(a, b.scores) for a, b in zip(before, alone(model)))  # no hook is left
    changed = detector()
    stages = changed.decoder.stages[2:]
    if "stage" in name:
        stages = [changed.decoder.stages[int(name[-1]) - 1]]
    for stage in stages:
        mixing = stage.mixing
        if "static" in name:
            for step in mixing.channel_reuse:
                for layer in (step.static.within, step.static.across):
                    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
            continue
        layers = [step.gates for step in mixing.channel_reuse]
        for layer in [*layers, mixing.spatial_reuse.row_gates]:
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, -1e4)
    equal(kept[name], alone(changed))
    assert any(not torch.equal(a, b.scores) for a, b in zip(before, kept[name]))


def test_a_cascade_without_these_parts_has_none_to_leave_out():
    found, _ = kept_of(detector(first_reusing_stage=None), IMAGES)
    assert [*found.metrics] == ["stage 1", "stage 2", "stage 3", "stage 4", ORACLE]
    found, _ = kept_of(detector(static_mixing="none"), IMAGES)
    assert [name for name in found.metrics if "static" in name] == []
    found, _ = kept_of(detector(num_points=(16, 8, 8)), IMAGES)  # one stage reuses
    assert [name for name in found.metrics if name.startswith("no ")] == [
        "no reuse", "no static mixing"
    ]  # fmt: skip


def test_the_oracle_takes_the_box_of_the_best_stage():
    model = detector()
    found, kept = kept_of(model, IMAGES)
    sums, best = [0.0] * 4, [0] * 4
    for image, instances in zip(IMAGES, kept[ORACLE]):
        batch = model.preprocess([image], [image["instances"]])
        with torch.no_grad():
            stages = model.decode(batch.tensor, batch.sizes)
        matched = model.criterion.matcher(
            stages[-1].logits[None], stages[-1].boxes[None], batch.targets
        )[0, 0]
        boxes = stages[-1].boxes[0].clone()
        for query, index in enumerate(matched.tolist()):
            if index < 0:
                continue
            of_object = batch.targets.boxes[0, index]
            ious = [float(box_iou(output.boxes[0, query], of_object)) for output in stages]
            sums = [total + iou for total, iou in zip(sums, ious)]
            chosen = max(range(4), key=lambda stage: (ious[stage], stage))
            best[chosen] += 1
            boxes[query] = stages[chosen].boxes[0, query]
        pairs = model.best_pairs(stages[-1]._replace(boxes=boxes[None]))
        (expected,) = model.postprocess(pairs, batch.image_sizes, [image])
        equal([instances], [expected["instances"]])
    assert found.best == best and sum(best) == 12
    assert found.iou == pytest.approx([total / 12 for total in sums])


def test_classes_of_the_data_in_another_order():
    model = detector()
    swapped = [dict(image) for image in IMAGES]
    order = [2, 0, 1]  # of the model's class its place in the data
    for image in swapped:
        objects = image["instances"]
        image["instances"] = type(objects)(
            objects.image_size,
            gt_boxes=objects.gt_boxes,
            gt_classes=torch.tensor(order)[objects.gt_classes],
        )
    loader = [[image] for image in swapped]
    found = score_stages(model, loader, lambda: Kept("any"), order)
    plain = score_stages(model, [[image] for image in IMAGES], lambda: Kept("any"))
    assert (found.iou, found.best) == (plain.iou, plain.best)
    with pytest.raises(ValueError, match="comes without its objects"):
        score_stages(model, [[{"image": IMAGES[0]["image"]}]], lambda: Kept("any"))


class OwnCascade(Decoder):
    """Which does more than one stage after the other."""


def test_a_cascade_of_ones_own_is_not_taken_apart():
    model = detector(parts={"cascade": OwnCascade})
    for evaluate in (score_stages, score_exits):
        with pytest.raises(ValueError, match="parts.cascade is OwnCascade, whose stages cannot"):
            evaluate(model, [[image] for image in IMAGES], lambda: Kept("any"))


def test_exits_are_timed_and_change_nothing_of_the_model():
    model = detector()
    decoder = model.decoder
    count = iter(range(100))
    exits = score_exits(model, [[image] for image in IMAGES], lambda: Kept(next(count)), [0.01, 1])
    names = ["stage 1", "stage 2", "stage 3", "stage 4", "IoU 0.01", "IoU 1"]
    assert [item.name for item in exits] == names and model.decoder is decoder
    assert [item.stages for item in exits] == [1, 2, 3, 4, 2, 4]
    assert all(item.milliseconds > 0 for item in exits)


def test_the_tool_and_the_report(small_run, tmp_path, monkeypatch, capsys):
    checkpoint, data = small_run / "model_final.pth", small_run / "shapes"
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["stages_ap.py", *arguments, "--exit-iou", "0.5"])
    try:
        stages_ap.main()
        printed = capsys.readouterr().out
        written = json.loads((small_run / "stages_ap.json").read_text())
        expected = Judge(data)(*load_model(str(checkpoint)))
        known = {name: value for name, value in expected.items() if value == value}
        assert set(written["metrics"]["stage 3"]) == set(expected) > set(known)
        for name, value in written["metrics"]["stage 3"].items():
            assert value == pytest.approx(known[name]) if name in known else value is None
        assert written["exits"][2]["metrics"] == written["metrics"]["stage 3"]
        assert "| stage 3" in printed and "IoU 0.5" in printed and written["images"] == 6
        rows = (small_run / "stages_ap.csv").read_text().splitlines()
        assert rows[0] == "of,AP,AP50,AP75,APs,APm,APl,mean_iou,best_boxes,stages,milliseconds"
        assert len(rows) == len(written["metrics"]) + len(written["exits"]) + 1
        assert rows[1].startswith("stage 1,") and rows[-1].startswith("exit IoU 0.5,")
        for name in ("stages_ap.svg", "stages_ap_time.svg"):
            assert (small_run / name).read_text().startswith("<svg")
        page = tmp_path / "report.html"
        assert main(["report", str(small_run), "--output", str(page)]) == 0
        text = page.read_text()
        assert "no static mixing" in text and "Ending early" in text and "AP by stage" in text
        damaged = ["[1", "[]", "{}", '{"metrics": 1, "iou": [], "best": [], "exits": []}']
        wrong = ({"iou": [1]}, {"metrics": {}}, {"exits": [{"name": "<b>", "stages": "x"}]})
        damaged += [json.dumps(written | values) for values in wrong]
        damaged += ["[" * 100_000, "\udcff", "NaN"]
        for value in ({}, "1", int("9" * 400), 1e300, True):
            of_stage = written["metrics"]["stage 1"] | {"APs": value}
            metrics = written["metrics"] | {"stage 1": of_stage}
            damaged.append(json.dumps(written | {"metrics": metrics}))
        for text in damaged:
            (small_run / "stages_ap.json").write_text(text, errors="surrogateescape")
            assert main(["report", str(small_run), "--output", str(page)]) == 0
            assert "The stages cannot be shown: " in page.read_text()
            assert "stages_ap.json" in page.read_text()
    finally:
        for file in small_run.glob("stages_ap*"):
            file.unlink()
