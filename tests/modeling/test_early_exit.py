"""Cascades that end early, at inference alone."""

import pytest
import torch
from checks.small import random_image, tiny_model, without_zeros

from stage_interactor.d2.config import LazyCall as L
from stage_interactor.engine.flight_recorder import FlightRecorder
from stage_interactor.engine.validation import ValidationLoss
from stage_interactor.inference.prepare import prepare_for_inference
from stage_interactor.modeling import build_decoder
from stage_interactor.modeling.extensions.settled_decoder import SettledDecoder
from stage_interactor.modeling.geometry import box_iou

STAGES = (16, 8, 8, 8, 8)


def settled(exit_iou, **options):
    """As a config has it."""
    return {"parts": {"cascade": L(SettledDecoder)(exit_iou=exit_iou)}} | options


def model(**decoder):
    torch.manual_seed(0)
    return without_zeros(tiny_model(num_points=STAGES, **decoder), std=0.05)


def decoded(detector, *images):
    batch = detector.preprocess(images)
    with torch.no_grad():
        return detector.decode(batch.tensor, batch.sizes)


def same(outputs, others):
    for output, other in zip(outputs, others, strict=True):
        for part, expected in zip(output, other, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("exit_stage", [1, 3, 5])
def test_stages_after_the_exit_are_not_computed(exit_stage):
    full, short = model().eval(), model(exit_stage=exit_stage).eval()
    images = [random_image(2, seed=1), random_image(1, seed=2)]
    computed = []
    for stage in short.decoder.stages:
        stage.register_forward_hook(lambda *_: computed.append(1))
    same(decoded(short, *images), decoded(full, *images)[:exit_stage])
    assert len(computed) == exit_stage
    assert short.state_dict().keys() == full.state_dict().keys()
    detections = [item["instances"] for item in short(images)]
    batch = full.preprocess(images)
    pairs = full.best_pairs(decoded(full, *images)[exit_stage - 1])
    expected = full.postprocess(pairs, batch.image_sizes, images)
    for found, item in zip(detections, expected):
        torch.testing.assert_close(found.scores, item["instances"].scores)
        torch.testing.assert_close(
            found.pred_boxes.tensor, item["instances"].pred_boxes.tensor, atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("options", [{"exit_stage": 2}, settled(0.01)])
def test_a_training_has_all_stages(options):
    images = [random_image(2, seed=1), random_image(1, seed=2)]
    losses, expected = model(**options).train()(images), model().train()(images)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert torch.equal(loss, expected[name])


def settled_after(full, image, exit_iou):
    """Told in other words: the first stage whose boxes, weighed by score, lie on those before."""
    outputs = decoded(full, image)
    for number in range(1, len(outputs)):
        now, before = outputs[number], outputs[number - 1]
        weight = now.logits.sigmoid().max(-1).values[0]
        ious = [float(box_iou(a, b)) for a, b in zip(now.boxes[0], before.boxes[0])]
        if sum(float(w) * iou for w, iou in zip(weight, ious)) / float(weight.sum()) >= exit_iou:
            return number + 1
    return len(outputs)


def test_an_image_leaves_when_its_boxes_have_settled():
    full = model().eval()
    images = [
        random_image(1, size, seed=seed) for seed, size in enumerate([(64, 96), (96, 64)] * 4)
    ]
    seen = set()
    for exit_iou in torch.linspace(0.5, 1, 21).tolist():
        early = model(**settled(exit_iou)).eval()
        assert isinstance(early.decoder, SettledDecoder)
        for image in images:
            outputs = decoded(early, image)
            stages = settled_after(full, image, exit_iou)
            assert early.decoder.num_stages == (stages,)
            computed = decoded(full, image)[:stages]
            same(outputs, computed + computed[-1:] * (len(STAGES) - stages))
            seen.add(stages)
    assert len(seen) > 2  # or nothing was tried


def test_what_an_image_gets_does_not_depend_on_others():
    full = model().eval()
    images = [random_image(1, seed=seed) for seed in range(6)]
    for exit_iou in torch.linspace(0.5, 1, 51).tolist():
        stages = [settled_after(full, image, exit_iou) for image in images]
        if len(set(stages)) > 1:
            break
    early = model(**settled(exit_iou)).eval()
    together = decoded(early, *images)
    assert list(early.decoder.num_stages) == stages
    for index, image in enumerate(images):
        alone = decoded(early, image)
        same([type(o)(*(part[index, None] for part in o)) for o in together], alone)


def test_the_exit_stage_comes_first():
    early = model(**settled(1.0, exit_stage=2)).eval()
    assert len(decoded(early, random_image(1))) == 2 and early.decoder.num_stages == (2,)


def test_what_is_not_a_number_never_settles():
    early = model(**settled(0.01)).eval()
    torch.nn.init.constant_(early.decoder.stages[1].head.box_out.bias, float("nan"))
    decoded(early, random_image(1))
    assert early.decoder.num_stages == (len(STAGES),)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"exit_stage": 0}, "exit_stage must be one of 5 stages, got 0"),
        ({"exit_stage": 6}, "exit_stage must be one of 5 stages, got 6"),
        (settled(0.0), "exit_iou must be an IoU above 0 and at most 1, got 0"),
        (
            {"parts": {"cascade": torch.nn.Identity}},
            "parts.cascade must make a Decoder, got .*Ident",
        ),
        (settled(float("nan")), "exit_iou must be an IoU above 0 and at most 1, got nan"),
    ],
)
def test_an_exit_that_there_is_not_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        build_decoder(embed_dim=16, num_groups=2, num_heads=2, num_points=STAGES, **options)


def test_what_is_compiled_cannot_end_early():
    early = model(**settled(0.9)).eval()
    with pytest.raises(ValueError, match="cannot be compiled: leave compile out"):
        prepare_for_inference(early, compile=True)
    prepare_for_inference(early)


@pytest.mark.parametrize("options", [{"exit_stage": 2}, settled(0.01)])
def test_the_losses_of_an_evaluation_are_those_of_all_stages(options):
    images = [random_image(2, seed=1), random_image(3, seed=2)]
    early, full = model(**options).eval(), model().eval()
    recorders = [FlightRecorder(["a", "b", "c"]) for _ in range(2)]
    losses = [ValidationLoss(m, recorder=r) for m, r in zip((early, full), recorders)]
    for image in images:
        found, _ = (loss([image])[0]["instances"] for loss in losses)
        assert torch.equal(found.scores, early([image])[0]["instances"].scores)
    results = [loss.results()["validation"] for loss in losses]
    assert results[0] == pytest.approx(results[1], rel=1e-5) and len(results[0]) == 16
    for ours, theirs in zip(*(recorder._rows for recorder in recorders)):
        assert ours["query"].shape[1] == len(STAGES) and (ours["query"] == theirs["query"]).all()
    assert early.decoder.exit_stage == options.get("exit_stage")  # as it was


def test_an_export_says_that_it_cannot():
    early = model(**settled(0.9)).eval()
    batch = early.preprocess([random_image(1)])

    class Decoding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = early

        def forward(self, images, sizes):
            return self.model.decode(images, sizes)[-1].boxes

    with pytest.raises(ValueError, match=r"cascade to null, and model.decoder.exit_stage"):
        torch.export.export(Decoding(), (batch.tensor, batch.sizes))
