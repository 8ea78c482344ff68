"""What the stage viewer shows is what the model computes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.d2.detections import UnusableDetectionsError
from stage_interactor.data import read_picture
from stage_interactor.inference.blueprint import load_model
from stage_interactor.pages import stages as stages_page
from stage_interactor.pages.stages import label_table
from stage_interactor.pages.trace import Labels, best_queries, trace_labels, trace_stages


@pytest.fixture(scope="module")
def detector(small_run):
    return load_model(str(small_run / "model_final.pth"))


@pytest.fixture(scope="module")
def image(small_run):
    return sorted((small_run / "shapes/val").iterdir())[0]


@pytest.fixture(scope="module")
def stages(detector, image):
    model, blueprint = detector
    return trace_stages(model, read_picture(image), blueprint.build_augmentation())


def test_of_a_very_large_picture_fewer_pixels_are_shown():
    picture = np.zeros((8, 20_000, 3), np.uint8)
    figure, axes = stages_page._panels(1)
    stages_page._show(axes[0], picture, alpha=1)
    (shown,) = axes[0].images
    assert shown.get_array().shape[1] <= 4096
    assert [*shown.get_extent()] == [-0.5, 19_999.5, 7.5, -0.5]


def test_the_last_stage_gives_the_detections(small_run, image, stages):
    found = Detector.from_checkpoint(small_run / "model_final.pth", device="cpu")(image, 0.0)
    pairs = np.argsort(-stages[-1].scores.ravel(), kind="stable")[: len(found)]
    np.testing.assert_allclose(found.scores, stages[-1].scores.ravel()[pairs], atol=1e-5)
    boxes = stages[-1].boxes[pairs // 5].clip(0, 64)
    np.testing.assert_allclose(found.boxes, boxes, atol=1e-2)
    assert best_queries(stages, 2)[0] == pairs[0] // 5


def test_each_stage_starts_where_the_one_before_ended(detector, stages):
    model, _ = detector
    assert len(stages) == 3
    np.testing.assert_allclose(stages[0].start, np.tile([0, 0, 64, 64], (8, 1)), atol=1e-3)
    for before, after in zip(stages, stages[1:]):
        np.testing.assert_allclose(after.start, before.boxes, atol=1e-3)
    for stage, module in zip(stages, model.decoder.stages):
        sampler = module.sampler
        groups = (8, sampler.num_groups, sampler.point_groups, sampler.points_per_group)
        assert stage.points.shape == (*groups, 2)
        assert stage.level_weights.shape == (*groups, 3)
        np.testing.assert_allclose(stage.level_weights.sum(-1), 1, atol=1e-5)
        assert not module.sampler._forward_pre_hooks  # nothing stays behind


def test_points_are_in_pixels_of_the_picture_when_it_is_resized(detector, image, stages):
    model, blueprint = detector
    from stage_interactor.d2 import transforms as T

    twice = T.AugmentationList([T.ResizeShortestEdge((64,), 64, "choice")])
    small = np.asarray(Image.fromarray(read_picture(image)).resize((32, 32)))
    found = trace_stages(model, small, twice)
    np.testing.assert_allclose(found[0].start, np.tile([0, 0, 32, 32], (8, 1)), atol=1e-3)
    # At the first stage points depend on the content of the queries and the size alone.
    np.testing.assert_allclose(found[0].points * 2, stages[0].points, atol=1e-2)


def test_labels_are_those_of_the_criterion(detector, stages):
    model, _ = detector
    boxes = [*stages[2].boxes[:2].clip(0, 64), [1.0, 1.0, 3.0, 3.0]]
    labels = trace_labels(model, stages, (64, 64), boxes, [1, 4, 0])
    from stage_interactor.d2.structures import Boxes, Instances
    from stage_interactor.modeling.matcher import Targets

    truth = Instances((64, 64), gt_boxes=Boxes(torch.tensor(np.array(boxes))),
                      gt_classes=torch.tensor([1, 4, 0]))  # fmt: skip
    targets = Targets.from_instances([truth], torch.float64)
    predicted = torch.from_numpy(np.stack([stage.boxes for stage in stages]))[:, None].double()
    matched = torch.from_numpy(labels.matched)[:, None]
    expected = model.criterion.assigner(matched, predicted, targets, 5)[:, 0]
    ours = torch.zeros_like(expected)
    for stage, other, query in np.argwhere(labels.kept):
        ours[stage, query, labels.classes[labels.matched[other, query]]] = True
    assert torch.equal(ours, expected) and expected.any()
    assert (np.sort(labels.matched, 1)[:, -3:] == [0, 1, 2]).all()


def test_the_table_names_where_a_label_comes_from():
    matched = np.array([[0, -1, 1], [1, -1, 0]])
    kept = np.zeros((2, 2, 3), dtype=bool)
    kept[0, :, 0] = True  # stage 0 labels query 0 with its own match and with that of stage 1
    kept[1, 0, 2] = True
    labels = Labels(np.zeros((2, 4)), np.array([2, 0]), matched, kept)
    assert label_table(labels, "abc") == [
        ("query", "stage 0", "stage 1"),
        ("0", "c #0 ← 0 ●; a #1 ← 1", "a #1 ○"),
        ("2", "a #1 ○", "c #0 ○; a #1 ← 0"),
    ]


def test_a_page_and_a_picture(small_run, image, tmp_path, capsys):
    arguments = ["stages", "--checkpoint", str(small_run / "model_final.pth"), str(image)]
    truth = str(small_run / "shapes/val.json")
    page = tmp_path / "deep/page.html"
    assert main([*arguments, "--annotations", truth, "--output", str(page)]) == 0
    text = page.read_text()
    assert text.count("data:image/jpeg") == 1 + 4
    assert "Labels in training" in text and " objects; one-to-one matching gives " in text
    sheet = tmp_path / "sheet.png"
    assert main([*arguments, "--queries", "5", "0", "--output", str(sheet)]) == 0
    assert Image.open(sheet).size[1] > 900
    assert f"Wrote {sheet}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--queries", "8"], "the model has the queries 0 to 7"),
        (["--output", "page.pdf"], "ends in .html or .png"),
        (["--annotations", "{other}"], "lists no image"),
    ],
)
def test_mistakes_are_told(small_run, image, tmp_path, more, message, capsys):
    other = tmp_path / "other.json"
    categories = [{"id": 1, "name": "ring"}]
    other.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    more = [argument.format(other=other) for argument in more]
    arguments = ["--checkpoint", str(small_run / "model_final.pth"), str(image)]
    assert main(["stages", *arguments, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", [1, 3])
def test_a_stage_that_computes_nan_is_named(
    small_run, image, number, tmp_path, monkeypatch, capsys
):
    model, blueprint = load_model(str(small_run / "model_final.pth"))

    def poison(decoder, inputs, outputs):
        outputs[number - 1].logits[0, 2:4, 1] = float("nan")

    model.decoder.register_forward_hook(poison)
    with pytest.raises(UnusableDetectionsError, match=f"2 of 8 queries .* after stage {number}"):
        trace_stages(model, read_picture(image), blueprint.build_augmentation())
    monkeypatch.setattr(
        "stage_interactor.commands.stages.load_model", lambda *_, **__: (model, blueprint)
    )
    page = tmp_path / "page.html"
    assert main(["stages", "--checkpoint", "any.pth", str(image), "--output", str(page)]) == 2
    assert f"{image}: 2 of 8 queries" in capsys.readouterr().err and not page.exists()
