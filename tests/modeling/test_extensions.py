"""What a config can add: equations, figures of public implementations, and what stays as it is."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from checks.small import random_image, tiny_model, without_zeros
from torchvision.ops import box_convert

from stage_interactor import Detector, train
from stage_interactor.commands import main
from stage_interactor.config import load_config
from stage_interactor.d2 import transforms as T
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.events import EventStorage
from stage_interactor.d2.structures import Instances
from stage_interactor.engine.checkpoint import Checkpointer
from stage_interactor.engine.decoder_graph import DecoderGraph
from stage_interactor.engine.parameters import freeze
from stage_interactor.engine.validation import ValidationLoss
from stage_interactor.inference.blueprint import load_model
from stage_interactor.modeling import (
    Criterion,
    CrossStageAssigner,
    HungarianMatcher,
    InitialQueries,
    OneToOneAssigner,
    OverlapAttention,
    Targets,
)
from stage_interactor.modeling.extensions.combined import (
    GroupedIoUAwareCriterion,
    HybridIoUAwareCriterion,
    RecollectingIoUAwareCriterion,
    require_parts_that_fit,
)
from stage_interactor.modeling.extensions.denoising import (
    Denoising,
    DenoisingStageInteractor,
    MaskedOverlapAttention,
    visible_to_each,
)
from stage_interactor.modeling.extensions.fixed_point import FixedPointDecoder, depth
from stage_interactor.modeling.extensions.hybrid_matching import (
    HybridCriterion,
    HybridDecoder,
    HybridQueries,
    copied,
)
from stage_interactor.modeling.extensions.iou_aware import IoUAssigner, IoUAwareCriterion
from stage_interactor.modeling.extensions.layer_gates import LayerGatedMixing, LayerGates
from stage_interactor.modeling.extensions.query_groups import (
    GroupedCriterion,
    GroupedDecoder,
    GroupedQueries,
)
from stage_interactor.modeling.extensions.recollection import (
    RecollectingCriterion,
    RecollectingDecoder,
    paths_to,
)
from stage_interactor.modeling.extensions.scheduled_scope import ScheduledAssigner
from stage_interactor.modeling.geometry import box_iou, boxes_to_xyzr, xyzr_to_boxes
from stage_interactor.modeling.stage import StageOutput
from stage_interactor.ops import Pyramid
from stage_interactor.pages.trace import Edit, Tracer

CONFIGS = sorted(Path("configs/extensions").glob("*.py"))
NAMES = [path.stem.rpartition("12ep_")[2] for path in CONFIGS]
EXTENSIONS = (
    "IoUAssigner", "IoUAwareCriterion", "LayerGatedMixing", "GroupedQueries", "GroupedDecoder",
    "GroupedCriterion", "RecollectingDecoder", "RecollectingCriterion", "MaskedOverlapAttention",
    "DenoisingStageInteractor", "FixedPointDecoder", "HybridQueries", "HybridDecoder",
    "HybridCriterion", "ScheduledAssigner",
)  # fmt: skip
STAGES = (16, 8, 8, 8)
CLASSES = 4


def criterion(kind=Criterion, assigner=None, **options):
    assigner = assigner or CrossStageAssigner(scope=("i-1", "L"), iou_threshold=0.05)
    return kind(num_classes=CLASSES, matcher=HungarianMatcher(), assigner=assigner, **options)


def model(found=None, queries=None, **decoder):
    torch.manual_seed(0)
    made = without_zeros(tiny_model(num_classes=CLASSES, num_points=STAGES, **decoder), std=0.05)
    if queries is not None:
        made.queries = queries
    made.criterion = found or criterion()
    return made


def images():
    return [random_image(3, seed=1), random_image(1, seed=2)]


def prepared(made, batch):
    found = made.preprocess(batch)
    return found.tensor, found.sizes


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# Losses of scores that know how well a box fits.


def example():
    """Five queries, two of them matched, in one stage; IoUs of 0.72 and 0.67."""
    logits = (torch.arange(15, dtype=torch.float64) * 1.7).sin().reshape(1, 1, 5, 3) * 2
    boxes = [[10, 10, 30, 40], [0, 5, 20, 25], [30, 30, 60, 50], [5, 50, 25, 60], [40, 0, 60, 20]]
    objects = torch.tensor([[[12.0, 8, 33, 38], [28, 33, 61, 55]]], dtype=torch.float64)
    sizes = torch.tensor([[64.0, 64.0]], dtype=torch.float64)
    targets = Targets(objects, torch.tensor([[1, 2]]), (2,), sizes)
    matched = torch.tensor([[[0, -1, 1, -1, -1]]])
    boxes = torch.tensor(boxes, dtype=torch.float64)[None, None]
    return logits.requires_grad_(), boxes, targets, matched


@pytest.mark.parametrize(
    ("class_loss", "options", "loss", "slopes", "of_first"),
    [
        # loss_labels_vfl and loss_labels_mal of DEIM, IA_BCE_loss of detrex's Align-DETR, run on
        # this example.
        (
            "varifocal",
            dict(negative_weight=0.75, gamma=2.0),
            4.476572386799317,
            2.0235128507933346,
            [0.09375, 0.12830533369043803, 0.0395317575034616],
        ),
        (
            "matchability",
            dict(negative_weight=1.0, gamma=1.5),
            7.335420586280018,
            3.4335530007754937,
            [0.1767766952966369, 0.3006188874187141, 0.0860803549992255],
        ),
        (
            "align",
            dict(negative_weight=1.0, alpha=0.25, gamma=2.0),
            5.989559836846019,
            4.733643652873151,
            [0.29828679513998635, 0.14262161500427217, 0.13529137918753736],
        ),
    ],
)
def test_class_losses_are_those_of_public_implementations(
    class_loss, options, loss, slopes, of_first
):
    logits, boxes, targets, matched = example()
    assigner = IoUAssigner(scope=("i",), iou_threshold=0.0)
    found = IoUAwareCriterion(num_classes=3, matcher=None, assigner=assigner,
                              class_loss=class_loss, **options)  # fmt: skip
    labels = assigner(matched, boxes, targets, 3)
    value = found.losses(logits, boxes, targets, matched, labels)[0].sum()
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-6)
    assert logits.grad.abs().sum().item() == pytest.approx(slopes, rel=1e-6)
    assert logits.grad[0, 0, 0].tolist() == pytest.approx(of_first, rel=1e-5)


def test_labels_are_ious_where_the_paper_has_a_label():
    made, batch = model(), images()
    stages = made.train()(batch, with_losses=False)
    boxes = torch.stack([output.boxes.detach() for output in stages])
    logits = torch.stack([output.logits.detach() for output in stages])
    targets = Targets.from_instances([image["instances"] for image in batch], boxes.dtype)
    matched = HungarianMatcher()(logits, boxes, targets)
    options = dict(scope=("i-1", "L"), iou_threshold=0.05)
    expected = CrossStageAssigner(**options)(matched, boxes, targets, CLASSES)
    labels = IoUAssigner(**options)(matched, boxes, targets, CLASSES)
    assert torch.equal(labels > 0, expected) and 0 < expected.sum() < expected.numel() / 4
    for stage, image, query, label in labels.nonzero().tolist():
        in_scope = range(max(stage - 1, 0), len(STAGES))
        matches = [int(matched[j, image, query]) for j in in_scope]
        ious = [
            float(box_iou(boxes[stage, image, query], targets.boxes[image, match]))
            for match in matches
            if match >= 0 and targets.classes[image, match] == label
        ]
        assert float(labels[stage, image, query, label]) == pytest.approx(max(ious))


def test_labels_that_count_by_iou_are_the_papers_for_a_temperature_near_0():
    batch = images()
    soft = criterion(
        IoUAwareCriterion,
        IoUAssigner(iou_threshold=0.05, temperature=1e-7),
        class_loss="focal",
    )
    losses, expected = model(soft).train()(batch), model().train()(batch)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], atol=1e-4, rtol=1e-4)
    assert math.isclose(IoUAssigner(iou_threshold=0.3, temperature=0.1).middle, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(class_loss="giou"), "class_loss must be one of"),
        (dict(class_loss=["focal"]), "class_loss must be one of"),
        (dict(class_loss="varifocal", assigner=CrossStageAssigner()), "to an IoUAssigner"),
        (dict(class_loss="varifocal", assigner=OneToOneAssigner()), "to an IoUAssigner"),
        (dict(class_loss="varifocal", assigner=IoUAssigner(temperature=0.1)), "take IoUs"),
        (dict(class_loss="focal", assigner=IoUAssigner()), "labels with a temperature"),
    ],
)
def test_losses_and_labels_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        criterion(IoUAwareCriterion, **({"assigner": IoUAssigner()} | options))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        IoUAssigner(temperature=0.0)


# Gates of a layer.


def test_gates_of_a_layer_are_the_same_for_all_queries_and_start_at_a_half():
    plain, gated = model(), model(parts={"mixing": LayerGatedMixing})
    gates = [module for module in gated.modules() if isinstance(module, LayerGates)]
    # Stages 2 and 3 reuse: one and two channel filters, and a spatial one with two gates each.
    assert len(gates) == 1 + 2 + 2 * 2
    assert sum(p.numel() for p in gated.parameters()) < sum(p.numel() for p in plain.parameters())
    for gate in gates:
        out = gate(torch.randn(2, 5, 32))
        assert out.shape[:2] == (2, 5) and torch.equal(out, out[:1, :1].expand_as(out))
        assert (LayerGates(4)(torch.randn(1, 1, 8)).sigmoid() == 0.5).all()
    losses = gated.train()(images())
    sum(losses.values()).backward()
    assert all(gate.logits.grad.abs().sum() > 0 for gate in gates)


# Groups of queries.


def grouped(groups, found=None):
    queries = GroupedQueries(num_queries=5, embed_dim=16, num_groups=groups)
    cascade = {"cascade": L(GroupedDecoder)(num_groups=groups)}
    found = found or criterion(GroupedCriterion, num_groups=groups)
    return model(found, queries, parts=cascade)


def test_groups_do_not_see_each_other_and_the_losses_are_their_mean():
    made, batch = grouped(3), images()
    losses = made.train()(batch)
    alone = model()
    alone.load_state_dict(made.state_dict() | alone.queries.state_dict(prefix="queries."))
    totals: dict = {}
    for content in made.queries.content.detach().chunk(3):
        alone.queries.num_queries, alone.queries.content.data = 5, content
        stages = alone.train()(batch, with_losses=False)
        sums, counts = alone.criterion.sums(stages, [image["instances"] for image in batch])
        for name, value in (("sums", sums), ("counts", counts)):
            totals[name] = totals.get(name, 0) + value
    expected = alone.criterion.named(totals["sums"], totals["counts"])
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], atol=1e-5, rtol=1e-4)


def test_the_first_group_detects_at_the_cost_of_one():
    made, alone, batch = grouped(3), model(), images()
    alone.load_state_dict(made.state_dict() | alone.queries.state_dict(prefix="queries."))
    alone.queries.num_queries = alone.max_detections = 5
    alone.queries.content.data = made.queries.content.data[:5]
    made.max_detections = made.queries.num_queries
    calls = []
    for stage in made.decoder.stages:
        stage.register_forward_hook(lambda _, inputs, __: calls.append(inputs[1].shape[1]))
    for found, expected in zip(made.eval()(batch), alone.eval()(batch), strict=True):
        torch.testing.assert_close(found["instances"].scores, expected["instances"].scores)
    assert set(calls) == {5} and len(calls) == len(STAGES)
    # What is evaluated has one group.
    stages = made.decode(*prepared(made, batch))
    objects = [image["instances"] for image in batch]
    close(made.criterion.sums(stages, objects), criterion().sums(stages, objects))


# Queries that are recollected.


def recollecting(found=None):
    cascade = {"cascade": RecollectingDecoder}
    return model(found or criterion(RecollectingCriterion), parts=cascade)


def test_the_sets_of_a_stage_are_those_that_sqr_takes():
    # Of the authors' config for AdaMixer: which of all sets so far, of which the initial queries
    # are the first, each stage starts from.
    starts, ends = [0, 0, 1, 2, 4, 7], [1, 2, 4, 7, 12, 20]
    theirs: list = [()]
    for stage, (start, end) in enumerate(zip(starts, ends)):
        made = [(*path, stage) for path in theirs[start:end]]
        theirs += made
        assert sorted(paths_to(stage)) == sorted(made)
        assert paths_to(stage)[0] == tuple(range(stage + 1))
    assert [len(paths_to(stage)) for stage in range(6)] == [1, 2, 3, 5, 8, 13]


def test_the_first_set_is_the_cascade_and_detection_has_it_alone():
    made, plain, batch = recollecting(), model(), images()
    outputs = made.train()(batch, with_losses=False)
    expected = plain.train()(batch, with_losses=False)
    queries = made.queries.num_queries
    for stage, (output, other) in enumerate(zip(outputs, expected, strict=True)):
        assert output.logits.shape[1] == queries * len(paths_to(stage))
        close([part[:, :queries] for part in output], other)
    # A recollected set is what its stage makes of the queries of two stages before.
    content, xyzr = expected[0].content, expected[0].xyzr.detach()
    pictures, sizes = prepared(made, batch)
    features = Pyramid(made.neck(made.backbone(pictures)))
    skipped = made.decoder.stages[1].mixing.generate(content)
    _, first = made.decoder.stages[0](features, *made.queries(sizes))
    output, _ = made.decoder.stages[2](features, content, xyzr, (first, skipped))
    place = paths_to(2).index((0, 2))
    close([outputs[2].boxes[:, place * queries : (place + 1) * queries]], [output.boxes])
    for found, other in zip(made.eval()(batch), plain.eval()(batch), strict=True):
        torch.testing.assert_close(found["instances"].scores, other["instances"].scores)


def test_the_losses_of_a_stage_are_summed_over_its_sets():
    own = OneToOneAssigner()
    made, batch = recollecting(criterion(RecollectingCriterion, own)), images()
    losses = made.train()(batch)
    outputs = made(batch, with_losses=False)
    queries, plain = made.queries.num_queries, criterion(assigner=own)
    for stage, output in enumerate(outputs):
        total = 0
        for place in range(len(paths_to(stage))):
            of_set = type(output)(
                *(part[:, place * queries : (place + 1) * queries] for part in output)
            )
            total = total + plain([of_set], [image["instances"] for image in batch])["loss_bbox"]
        suffix = "" if stage == len(outputs) - 1 else f"_{stage}"
        torch.testing.assert_close(losses[f"loss_bbox{suffix}"], total, atol=1e-4, rtol=1e-4)


def test_labels_across_stages_come_along_the_path_of_a_set():
    made, batch = recollecting(), images()
    outputs = made.train()(batch, with_losses=False)
    queries = made.queries.num_queries
    seen = {}

    class Watching(CrossStageAssigner):
        def forward(self, matched, boxes, targets, num_classes):
            labels = super().forward(matched, boxes, targets, num_classes)
            seen[tuple((matched >= 0).flatten(1).any(1).tolist())] = matched, boxes, labels
            return labels

    made.criterion.assigner = Watching(scope=(0, "L"), iou_threshold=0.0)
    captured = []
    losses_of = made.criterion.losses
    made.criterion.losses = lambda *given: captured.append(given) or losses_of(*given)
    made.criterion(outputs, [image["instances"] for image in batch])
    # All subsets of four stages with the last one and without two skips in a row.
    assert len(seen) == len(paths_to(3)) == 5
    matched, boxes, labels = seen[True, False, True, True]
    place = paths_to(2).index((0, 2))
    theirs = outputs[2].boxes[:, place * queries : (place + 1) * queries]
    torch.testing.assert_close(boxes[2], theirs.detach())
    torch.testing.assert_close(boxes[0], outputs[0].boxes.detach())
    assert (matched[1] == -1).all()
    given = captured[2][4][0].unflatten(0, (2, 3))[:, place]  # stage 2, labels, (B, S, N, C)
    assert torch.equal(given, labels[2])
    # Of the plain set all stages count.
    plain = captured[1][4][0].unflatten(0, (2, 2))[:, 0]
    assert torch.equal(plain, seen[True, True, True, True][2][1])


# Noised objects.


def denoising(found=None, groups=2, **options):
    parts = options.pop("parts", {"attention": MaskedOverlapAttention})
    plain = model(found, parts=parts)
    names = ("num_classes", "backbone", "neck", "queries", "decoder", "criterion")
    torch.manual_seed(3)
    noise = Denoising(num_classes=CLASSES, embed_dim=16, num_groups=groups, **options)
    kept = {name: getattr(plain, name) for name in names}
    return DenoisingStageInteractor(denoising=noise, **kept)


def test_boxes_get_the_noise_that_detrex_gives_them(monkeypatch):
    # apply_box_noise of detrex with these for random numbers, in shares of the image.
    drawn = (torch.arange(12.0).reshape(1, 3, 4) * 0.37 + 0.05) % 1
    monkeypatch.setattr(torch, "rand_like", lambda tensor: drawn.to(tensor))
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.05, 0.9, 0.1, 0.2], [0.5, 0.5, 0.9, 0.95]])
    expected = [
        [0.428, 0.4936, 0.4928, 0.1456],
        [0.0512, 0.932, 0.0816, 0.2224],
        [0.3236, 0.4544, 1.0, 0.6612],
    ]
    size = torch.tensor([[80.0, 200.0]])
    scale = torch.tensor([200.0, 80, 200, 80])
    pixels = box_convert(boxes, "cxcywh", "xyxy")[None] * scale
    found = Denoising(num_classes=3, embed_dim=16, box_noise=0.4).moved(pixels, size)
    found = box_convert(found / scale, "xyxy", "cxcywh")
    torch.testing.assert_close(found[0], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_who_sees_whom_is_as_in_detrex_but_for_padding():
    # generate_query_masks of detrex for two queries and three groups of two, which come first
    # there; 1 is not to be seen.
    theirs = torch.tensor(
        [
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 1, 0, 0],
        ]
    )
    order = [6, 7, 0, 1, 2, 3, 4, 5]
    objects = torch.tensor([[0, 1, 0, 1, 0, 1], [0, -1, 0, -1, 0, -1]])
    visible = visible_to_each(2, objects, 3)
    assert torch.equal(~visible[0], theirs[order][:, order].bool())
    padding = torch.tensor([False, False] + [False, True] * 3)
    itself = torch.eye(8, dtype=torch.bool)
    assert torch.equal(visible[1], visible[0] & ~padding | itself)


def test_a_mask_hides_what_it_hides_and_nothing_is_masked_without_one():
    torch.manual_seed(0)
    plain, masked = (
        OverlapAttention(embed_dim=16, num_heads=2),
        MaskedOverlapAttention(embed_dim=16, num_heads=2),
    )
    masked.load_state_dict(plain.state_dict())
    content, boxes = torch.randn(2, 6, 16), torch.rand(2, 6, 4) * 20
    xyzr = boxes.sort(-1).values.log2() + 4
    torch.testing.assert_close(masked(content, xyzr), plain(content, xyzr))
    masked.visible = torch.ones(6, 6, dtype=torch.bool)
    masked.visible[:4, 4:] = False
    torch.testing.assert_close(masked(content, xyzr)[:, :4], plain(content[:, :4], xyzr[:, :4]))


def test_what_detects_learns_what_it_learns_without_noised_objects():
    made, plain, batch = denoising(), model(), images()
    losses, expected = made.train()(batch), plain.train()(batch)
    assert set(losses) == set(expected) | {f"dn_{name}" for name in expected}
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, atol=1e-5, rtol=1e-4)
    sum(losses.values()).backward()
    assert made.denoising.labels.weight.grad.abs().sum() > 0
    assert all(stage.attention.visible is None for stage in made.decoder.stages)
    for found, other in zip(made.eval()(batch), plain.eval()(batch), strict=True):
        torch.testing.assert_close(found["instances"].scores, other["instances"].scores)


def test_noised_objects_of_an_image_do_not_depend_on_the_others_of_a_batch():
    made = denoising(label_noise=0.0, box_noise=0.0).train()
    for stage in made.decoder.stages:  # that nothing is there has a price
        stage.head.cls_out.bias.data.zero_()
    many, one = images()
    weights = torch.tensor([3.0, 1.0]) / 4  # objects, which are what divides the losses
    together = made([many, one])
    alone = [made([image]) for image in (many, one)]
    for name, loss in together.items():
        if name.startswith("dn_"):
            expected = sum(w * losses[name] for w, losses in zip(weights, alone))
            torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_without_noise_a_query_starts_on_its_object():
    batch = images()
    made = denoising(label_noise=0.0, box_noise=0.0, groups=3)
    targets = Targets.from_instances([image["instances"] for image in batch], torch.float32)
    noised = made.denoising(targets)
    assert noised.objects.tolist() == [[0, 1, 2] * 3, [0, -1, -1] * 3]
    boxes = xyzr_to_boxes(noised.xyzr)
    torch.testing.assert_close(boxes[0], targets.boxes[0].repeat(3, 1), atol=1e-3, rtol=1e-4)
    assert boxes.isfinite().all()
    noisy = denoising(label_noise=1.0, box_noise=0.9, groups=200).denoising
    drawn = noisy.with_wrong_labels(torch.zeros(1, 2000, dtype=torch.long))
    assert drawn.unique().tolist() == [*range(CLASSES)]
    moved = noisy.moved(targets.boxes[:1].repeat(1, 500, 1), targets.image_sizes[:1])
    size = moved[..., 2:] - moved[..., :2]
    assert (size > 0).all() and size.max() <= 96


def test_of_many_objects_there_are_fewer_groups():
    targets = Targets.from_instances([image["instances"] for image in images()], torch.float32)
    for most, groups in ((9, 3), (8, 2), (6, 2), (5, 1), (1, 1)):
        noised = denoising(groups=3, max_queries=most).denoising(targets)
        assert noised.num_groups == groups and noised.objects.shape == (2, 3 * groups)


def test_a_box_without_a_size_is_a_box():
    flat = random_image(1, seed=1)
    flat["instances"].gt_boxes.tensor[:, 2] = flat["instances"].gt_boxes.tensor[:, 0]
    losses = denoising().train()([flat])
    assert all(loss.isfinite() for loss in losses.values())


def test_a_batch_without_objects_is_a_batch():
    losses = denoising().train()([random_image(0, seed=1), random_image(0, seed=2)])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["dn_loss_bbox"] == 0
    sum(losses.values()).backward()


@pytest.mark.parametrize(
    ("found", "scores"),
    [
        (IoUAssigner(iou_threshold=0.05), dict(class_loss="matchability", gamma=1.5)),
        (IoUAssigner(iou_threshold=0.5, temperature=0.1), dict(class_loss="focal")),
    ],
)
def test_noised_objects_learn_scores_that_know_the_fit(found, scores):
    made = denoising(criterion(IoUAwareCriterion, found, **scores))
    losses = made.train()(images())
    assert all(loss.isfinite() and loss > 0 for name, loss in losses.items())


def test_denoising_needs_a_mask_and_one_set_of_queries():
    with pytest.raises(ValueError, match="attention to MaskedOverlapAttention"):
        denoising(parts={})
    both = {"attention": MaskedOverlapAttention, "cascade": RecollectingDecoder}
    with pytest.raises(ValueError, match="does not go with RecollectingDecoder"):
        denoising(criterion(RecollectingCriterion), parts=both)
    for options in (dict(num_groups=0), dict(label_noise=1.5), dict(box_noise=1.0)):
        with pytest.raises(ValueError, match="|".join(options)):
            Denoising(num_classes=3, embed_dim=16, **options)
    assert "another mask" in DecoderGraph(denoising().decoder, required=True).reason


# Together, and on a run.


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: model(criterion(GroupedCriterion, num_groups=2)), "queries to GroupedQueries"),
        (lambda: model(queries=GroupedQueries(num_groups=2)), "cascade to GroupedDecoder, model.c"),
        (lambda: model(parts={"cascade": RecollectingDecoder}), "criterion to Recollecting"),
        (lambda: model(criterion(RecollectingCriterion)), "cascade to RecollectingDecoder"),
    ],
)
def test_one_part_without_the_others_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        require_parts_that_fit(made())
    require_parts_that_fit(model())
    require_parts_that_fit(grouped(2))
    require_parts_that_fit(recollecting())


@pytest.mark.parametrize(
    ("made", "part"), [(lambda: grouped(2), "queries"), (lambda: grouped(2), "decoder"),
                       (lambda: recollecting(), "decoder")]
)  # fmt: skip
def test_a_part_that_would_do_as_if_it_detected_cannot_be_frozen(made, part):
    model = made()
    freeze(model, [part])
    with pytest.raises(ValueError, match=f"train.freeze: {part} cannot be frozen as a whole"):
        require_parts_that_fit(model)
    inside = made()
    freeze(inside, ["decoder.stages", "queries.content", "backbone"])
    require_parts_that_fit(inside)


@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (1, 3), (3, 2)])
def test_a_training_begins_with_the_queries_that_both_have(theirs, ours, tmp_path, caplog):
    first, second = grouped(theirs), grouped(ours)
    torch.save({"model": first.state_dict()}, tmp_path / "model.pth")
    with torch.no_grad():
        second.queries.content += 1
    own = second.queries.content.detach().clone()
    with caplog.at_level("INFO"):
        Checkpointer(second, strict=False).load(str(tmp_path / "model.pth"))
    both = 5 * min(theirs, ours)
    assert torch.equal(second.queries.content[:both], first.queries.content[:both])
    assert torch.equal(second.queries.content[both:], own[both:])
    assert f"the first {both} are the checkpoint's" in caplog.text


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no 4 groups"):
        model(parts={"cascade": L(GroupedDecoder)(num_groups=4)}).train()(images())
    for kind in (GroupedQueries, lambda **o: criterion(GroupedCriterion, **o)):
        with pytest.raises(ValueError, match="num_groups must be"):
            kind(num_groups=0)
    with pytest.raises(ValueError, match="mixing is a CascadeMixing"):
        model(parts={"cascade": RecollectingDecoder, "mixing": OwnMixing})
    with pytest.raises(ValueError, match="recollects no queries"):
        model(criterion(RecollectingCriterion)).train()(images())
    for made in (recollecting(), grouped(2)):
        assert "several sets" in DecoderGraph(made.decoder, required=True).reason


class OwnMixing(torch.nn.Module):
    def __init__(self, **_):
        super().__init__()

    def forward(self, sampled, content, stored=()):
        return content, None


@pytest.mark.parametrize(
    "made",
    [
        lambda scores: grouped(2, criterion(GroupedIoUAwareCriterion, num_groups=2, **scores)),
        lambda scores: hybrid(3, criterion(HybridIoUAwareCriterion, num_queries=12, **scores)),
        lambda scores: recollecting(criterion(RecollectingIoUAwareCriterion, **scores)),
    ],
)
def test_scores_that_know_the_fit_go_with_more_queries(made):
    scores = dict(assigner=IoUAssigner(iou_threshold=0.05), class_loss="matchability", gamma=1.5)
    detector = made(scores)
    require_parts_that_fit(detector)
    losses = detector.train()(images())
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


# A fixed point.


class ToyStage(torch.nn.Module):
    """Content and positions of a step from those before, without a mixing: float64, 8 channels."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = dict(generator=generator, dtype=torch.float64)
        self.content = torch.nn.Parameter(torch.randn(8, 8, **draw) * 0.25)
        self.move = torch.nn.Parameter(torch.randn(8, 4, **draw) * 0.05)

    def forward(self, pyramid, content, xyzr, stored=()):
        features = pyramid.maps[0][0, :, 0, 0]
        at = 0.01 * xyzr.sum(-1, keepdim=True)
        content = torch.tanh(content @ self.content + features + at)
        delta = content @ self.move
        middle = xyzr[..., :2] + delta[..., :2] * xyzr[..., 2:3].exp2()
        xyzr = torch.cat((middle, xyzr[..., 2:] + delta[..., 2:]), -1)
        return StageOutput(content, xyzr_to_boxes(xyzr), content, xyzr), None


def test_the_path_and_its_gradients_are_those_of_deqdet_s_code():
    # What DEQDetRoIHead.loss supervises and learns, run on these stages with these options, a seed
    # of 5, and the sum of squares of content and 0.001 of that of boxes as the loss of a step.
    decoder = FixedPointDecoder(
        [ToyStage(1), ToyStage(2)],
        steps=6, supervised=(1, 3, 6), noise_probability=0.6, content_noise=0.1, box_noise=3 / 64,
    ).train()  # fmt: skip
    features = torch.linspace(0.5, -0.5, 8, dtype=torch.float64).requires_grad_()
    content = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(1, 3, 8)
    boxes = torch.tensor([[0, 0, 64, 64], [0, 0, 80, 64], [8, 0, 72, 90]], dtype=torch.float64)
    torch.manual_seed(5)
    outputs = decoder([features[None, :, None, None]], content, boxes_to_xyzr(boxes)[None])
    losses = [(o.content**2).sum() + 0.001 * (o.boxes**2).sum() for o in outputs]
    assert [loss.item() for loss in losses] == pytest.approx([
        39.70644228419539, 33.54218298236717, 31.011052443457725, 29.266471362677933,
        27.42725216337108, 30.907736567201503,
    ])  # fmt: skip
    sum(losses).backward()
    slopes = [p.grad.abs().sum().item() for stage in decoder.stages for p in stage.parameters()]
    assert slopes == pytest.approx(
        [31.41798199599596, 389.83498828229295, 210.54441044954825, 1019.4197955878955]
    )
    assert features.grad.tolist()[:3] == pytest.approx(
        [8.434988875638947, 9.226483986479488, 15.603484769760918]
    )


def fixed_point(**options):
    options = dict(steps=5, supervised=(1, 3)) | options
    return without_zeros(
        tiny_model(
            num_classes=CLASSES, num_points=(8, 8), first_reusing_stage=1,
            parts={"cascade": L(FixedPointDecoder)(**options)},
        ),
        std=0.05,
    )  # fmt: skip


def test_a_step_reuses_the_filters_of_the_step_before():
    made = fixed_point().eval()
    pixels, sizes = prepared(made, images())
    with torch.no_grad():
        features = made.neck(made.backbone(pixels))
        outputs = made.decoder(features, *made.queries(sizes))
        assert len(outputs) == depth(made.decoder) == 7
        first, again = made.decoder.stages
        content, xyzr = made.queries(sizes)
        stored = ()
        for stage, expected in zip((first, *[again] * 6), outputs):
            output, filters = stage(Pyramid(features), content, xyzr, stored)
            close(output, expected)
            content, xyzr, stored = output.content, output.xyzr, (filters,)
        made.decoder.exit_stage = 3
        assert len(made.decoder(features, *made.queries(sizes))) == 3 == depth(made.decoder)


@pytest.mark.parametrize("exit_stage", [None, 2])
def test_an_evaluation_has_the_losses_of_the_steps_that_training_has(exit_stage):
    made = fixed_point(noise_probability=0.0)
    made.criterion, batch = criterion(), images()
    trained = made.train()(batch)
    made.eval().decoder.exit_stage = exit_stage
    loss = ValidationLoss(made)
    with torch.no_grad():
        loss(batch)
    found = loss.results()["validation"]
    assert found.keys() - {"total_loss"} == trained.keys()
    # The first stage and the steps behind it are the same; a path without noise is their going on.
    for name in trained:
        assert found[name] == pytest.approx(float(trained[name]), rel=1e-4), name
    assert depth(made.decoder) == (exit_stage or 7)


@pytest.mark.parametrize("half", [False, True])
def test_both_stages_learn_and_the_path_leaves_no_gradient(half):
    made = fixed_point(noise_probability=1.0)
    made.criterion = criterion()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = made.train()(images())
    assert len([name for name in losses if name.startswith("loss_giou")]) == 1 + 2 + 2
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for stage in made.decoder.stages:
        for name, weight in stage.named_parameters():
            reuses = "reuse" in name and stage is made.decoder.stages[0]
            assert reuses or weight.grad.abs().sum() > 0, name
    # Losses of the path alone: what is before it has no gradient but by the features.
    made.zero_grad()
    losses = made(images())
    late = sum(loss for name, loss in losses.items() if name.endswith("_3") or name == "loss_bbox")
    late.backward()
    first, again = made.decoder.stages
    assert all(p.grad is None or not p.grad.any() for p in first.parameters())
    assert sum(p.grad.abs().sum() for p in again.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "must be 1 or more"),
        (dict(supervised=(3, 1)), "in ascending order"),
        (dict(supervised=(1, 9)), "steps 1 to 5"),
        (dict(supervised=()), "steps 1 to 5"),
        (dict(noise_probability=1.5), "between 0 and 1"),
        (dict(box_noise=float("nan")), "between 0 and 1"),
        (dict(exit_stage=8), "exit_stage must be one of 1 to 7"),
    ],
)
def test_a_fixed_point_of_nonsense_is_refused(options, message):
    stages = [*fixed_point().decoder.stages]
    with pytest.raises(ValueError, match=message):
        FixedPointDecoder(stages, **(dict(steps=5, supervised=(1, 3)) | options))
    with pytest.raises(ValueError, match="num_points must be of 2 stages, not of 4"):
        FixedPointDecoder([*model().decoder.stages])


def test_a_box_is_put_before_one_step_of_a_fixed_point_alone():
    made = fixed_point().eval()
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    tracer = Tracer(made, picture, T.AugmentationList([]))
    plain, edited = tracer(), tracer(Edit(3, 2, (10.0, 12.0, 30.0, 40.0)))
    assert len(plain) == len(edited) == 7
    for number, (one, other) in enumerate(zip(plain, edited)):
        assert np.array_equal(one.start, other.start) == (number < 3)
    np.testing.assert_allclose(edited[3].start[2], [10, 12, 30, 40], atol=1e-3)
    with pytest.raises(ValueError, match="stages 0 to 6"):
        tracer(Edit(7, 2, (10.0, 12.0, 30.0, 40.0)))


# A second set of queries, matched with copies.


def hybrid(more, found=None):
    queries = HybridQueries(num_queries=12, embed_dim=16, one_to_many_queries=more)
    found = found or criterion(HybridCriterion, num_queries=12, num_copies=3)
    return model(found, queries, parts={"cascade": L(HybridDecoder)(num_queries=12)})


def test_copies_are_those_that_h_detr_makes():
    objects = [image["instances"] for image in images()]
    targets = Targets.from_instances(objects, torch.float32)
    # train_hybrid: boxes.repeat(k, 1) and labels.repeat(k) of each image.
    expected = Targets.from_instances([Instances.cat([o] * 3) for o in objects], torch.float32)
    found = copied(targets, 3)
    assert found.counts == expected.counts == (9, 3)
    for index, number in enumerate(found.counts):
        assert torch.equal(found.boxes[index, :number], expected.boxes[index, :number])
        assert torch.equal(found.classes[index, :number], expected.classes[index, :number])
    assert copied(Targets.from_instances([objects[0][:0]], torch.float32), 3).counts == (0,)


def test_the_losses_are_those_of_two_detectors_that_do_not_see_each_other():
    made, batch = hybrid(20), images()
    require_parts_that_fit(made)
    losses = made.train()(batch)
    alone = model()
    alone.load_state_dict(
        {k: v for k, v in made.state_dict().items() if k != "queries.content"}, strict=False
    )
    for prefix, copies, part in (("", 1, slice(12)), ("o2m_", 3, slice(12, None))):
        content = made.queries.content.detach()[part]
        alone.queries = InitialQueries(num_queries=len(content), embed_dim=16)
        alone.queries.load_state_dict({"content": content})
        of_copies = [
            image | {"instances": Instances.cat([image["instances"]] * copies)} for image in batch
        ]
        expected = alone.train()(of_copies)
        for name, loss in expected.items():
            torch.testing.assert_close(losses[prefix + name], loss, atol=1e-5, rtol=1e-4)
    assert len(losses) == 2 * len(expected)
    sum(losses.values()).backward()
    assert (made.queries.content.grad.abs().sum(1) > 0).all()
    # What detects is the first set alone.
    content = made.queries.content.detach()[:12]
    alone.queries = InitialQueries(num_queries=12, embed_dim=16)
    alone.queries.load_state_dict({"content": content})
    with torch.no_grad():
        found, expected = made.eval()(batch), alone.eval()(batch)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor
        )


def test_parts_of_two_sets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="HybridDecoder is one part of an extension"):
        require_parts_that_fit(model(parts={"cascade": L(HybridDecoder)(num_queries=12)}))
    lonely = model(
        criterion(HybridCriterion, num_queries=12),
        parts={"cascade": L(HybridDecoder)(num_queries=12)},
    )
    with pytest.raises(ValueError, match="set model.queries to HybridQueries"):
        lonely.train()(images())
    for kind in (HybridQueries, HybridDecoder, HybridCriterion):
        with pytest.raises(ValueError, match="a whole number of 1 or more"):
            stages = {"stages": [*lonely.decoder.stages]} if kind is HybridDecoder else {}
            kind(num_queries=4, one_to_many_queries=0) if kind is HybridQueries else kind(
                **stages, num_queries=0
            )


# A scope that grows.


def test_a_scope_grows_with_the_iterations():
    assigner = ScheduledAssigner(scope=("i-1", "L"), start=0.2, end=0.8, max_iter=100)
    whole = CrossStageAssigner(scope=("i-1", "L")).in_scope(4)
    apart = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    for iteration, reach in ((0, 0), (20, 0), (39, 0), (40, 1), (60, 2), (80, 3), (99, 3)):
        with EventStorage(iteration):
            assert torch.equal(assigner.in_scope(4), whole & (apart <= reach)), iteration
    assert torch.equal(assigner.in_scope(4), whole)  # where nothing is trained
    for wrong in (dict(start=0.5, end=0.5), dict(start=-0.1), dict(max_iter=0)):
        with pytest.raises(ValueError, match="must"):
            ScheduledAssigner(**(dict(max_iter=10) | wrong))


def test_labels_are_those_of_the_scope_at_the_iteration():
    objects = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40]]])
    targets = Targets(objects, torch.tensor([[1, 2]]), (2,), torch.tensor([[64.0, 64.0]]))
    # Query 0 has object 0 on the first and the last of four stages, and query 1 between.
    matched = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1]])[:, None]
    boxes = objects.expand(4, 1, 2, 4)
    scheduled = ScheduledAssigner(start=0.0, end=1.0, max_iter=9)
    own, whole = CrossStageAssigner(scope=("i",)), CrossStageAssigner()
    with EventStorage(0):
        assert torch.equal(scheduled(matched, boxes, targets, 3), own(matched, boxes, targets, 3))
    labels = whole(matched, boxes, targets, 3)
    assert torch.equal(scheduled(matched, boxes, targets, 3), labels)
    assert not torch.equal(own(matched, boxes, targets, 3), labels)
    made, batch = model(criterion(assigner=scheduled)), images()
    with EventStorage(8):  # it trains like any other
        assert all(loss.isfinite() for loss in made.train()(batch).values())


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


def run_of(config, shapes):
    """A config's model, made tiny, on the tiny run."""
    cfg = load_config("tests/tiny_config.py", [f"shapes.root={shapes}"])
    tiny, cfg.model = cfg.model, load_config(str(config)).model
    quick = load_config("quickstart.py").model  # of parts that a checkpoint may name
    cfg.model.update(backbone=quick.backbone, neck=quick.neck)
    cfg.model.neck.norm_groups = 4
    cfg.model.decoder.strides = quick.decoder.strides
    cfg.model.num_classes, cfg.model.queries.num_queries = tiny.num_classes, 8
    if "one_to_many_queries" in cfg.model.queries:
        cfg.model.queries.one_to_many_queries = 12
    sizes = ("embed_dim", "num_groups", "num_heads", "feedforward_dim", "out_points")
    cfg.model.decoder.update({name: tiny.decoder[name] for name in sizes})
    cfg.model.decoder.num_points = tiny.decoder.num_points[: len(cfg.model.decoder.num_points)]
    return cfg


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_it_trains_resumes_and_detects(config, shapes, tmp_path):
    def run(folder, *overrides, **options):
        return train(run_of(config, shapes), overrides, output_dir=tmp_path / folder, **options)

    def losses(folder):
        lines = (tmp_path / folder / "metrics.json").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r["iteration"]: r["total_loss"] for r in records if "total_loss" in r}

    whole = run("whole", "train.max_iter=4")
    run("parts", "train.max_iter=2", "train.accumulation_steps=2")
    if not config.stem.endswith(("denoising", "fixed_point")):  # noise is drawn for each part
        assert losses("parts")[0] == pytest.approx(losses("whole")[0], rel=1e-4)
        assert losses("parts")[1] == pytest.approx(losses("whole")[1], rel=1e-3)  # of gradients
    run("resumed", "train.max_iter=2")
    resumed = run("resumed", "train.max_iter=4", resume=True)
    assert list(losses("resumed")) == [0, 1, 2, 3]
    # The schedule of a run of two iterations is another: that it goes on is what can be told.
    made, _ = load_model(str(resumed.checkpoint))
    last = made.decoder.stages[-1]
    parts = made, made.criterion, made.queries, made.decoder, last.mixing, last.attention
    parts += (made.criterion.assigner,)
    named = {name for name in EXTENSIONS if name in config.read_text()}
    assert named <= {type(part).__name__ for part in parts}
    found = Detector.from_checkpoint(whole.checkpoint, device="cpu")
    picture = next(path for path in (shapes / "val").iterdir())
    assert 0 < len(found(picture, 0.0)) <= 8


@pytest.mark.parametrize(
    "name",
    [
        "groups",
        pytest.param("layer_gates", marks=pytest.mark.soak),
        pytest.param("fixed_point", marks=pytest.mark.soak),
    ],
)
def test_a_trained_detector_is_exported_with_what_it_finds(name, shapes, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs stage-interactor[export]")
    config = next(path for path in CONFIGS if path.stem.endswith(name))
    cfg = run_of(config, shapes)
    if name == "fixed_point":  # a graph has each step: minutes for all of them
        cfg.model.decoder.parts.cascade.update(steps=3, supervised=(1, 3))
    run = train(cfg, ["train.max_iter=2"], output_dir=tmp_path / "run")
    file = tmp_path / "model.onnx"
    assert main(["export", "--checkpoint", str(run.checkpoint), "--output", str(file)]) == 0
    picture = next(path for path in (shapes / "val").iterdir())
    plain = Detector.from_checkpoint(run.checkpoint, device="cpu")(picture, 0.0)
    exported = Detector.from_checkpoint(file)(picture, 0.0)
    np.testing.assert_allclose(exported.scores, plain.scores, atol=1e-4)
    np.testing.assert_allclose(exported.boxes, plain.boxes, atol=0.05)
