import math

import pytest
import torch
from checks.small import random_image

from stage_interactor.modeling import (
    Criterion,
    CrossStageAssigner,
    HungarianMatcher,
    OneToOneAssigner,
    StageOutput,
    Targets,
)


def targets_of(boxes, classes, size=(100, 100)):
    boxes = torch.tensor(boxes, dtype=torch.float32)[None]
    sizes = torch.tensor([size], dtype=torch.float32)
    return Targets(boxes, torch.tensor([classes]), (len(classes),), sizes)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (("i-1", "L"), [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [2, 3]]),
        (("i",), [[0], [1], [2], [3]]),
        (("i", "L"), [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]),
        ((0, "L"), [[0, 1, 2, 3]] * 4),
        (("i-1", "i+1"), [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]),
        (("L", "L"), [[0, 3], [1, 3], [2, 3], [3]]),
    ],
)
def test_the_scope_names_the_stages_that_labels_are_gathered_from(scope, expected):
    assigner = CrossStageAssigner(scope=scope)
    assert [assigner.stages_in_scope(stage, 4) for stage in range(4)] == expected


@pytest.mark.parametrize(
    "scope", ["[i-1, L]", ("j", "L"), ("i", "i", "L"), ("", "L"), ("i1", "L"), ("i", -1)]
)
def test_a_scope_that_names_no_stages_is_an_error(scope):
    with pytest.raises(ValueError, match="scope"):
        CrossStageAssigner(scope=scope)


def test_labels_come_from_neighbouring_stages_where_the_box_overlaps():
    targets = targets_of([[0, 0, 40, 40], [60, 60, 100, 100]], [0, 1])
    near, far, second = [0, 0, 40, 36], [50, 0, 90, 40], [60, 60, 100, 100]
    boxes = torch.tensor([[near, second, far], [near, second, near], [far, second, near]])
    matched = torch.tensor([[0, 1, -1], [-1, 1, 0], [-1, 1, 0]])  # (L, N)
    arguments = (matched[:, None], boxes[:, None].float(), targets, 2)
    labels = CrossStageAssigner(scope=("i-1", "L"))(*arguments)[:, 0]
    # Query 0 matched at stage 0 only: it keeps the label at stage 1, where it still overlaps, and
    # loses it at stage 2. Query 2 gets it on stages 1 and 2 but not at 0, where it lies elsewhere.
    assert labels[..., 0].tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 1]]
    assert labels[..., 1].tolist() == [[0, 1, 0]] * 3
    own = OneToOneAssigner()(*arguments)[:, 0]
    assert own[..., 0].tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_the_own_match_below_the_threshold_carries_no_label():
    targets = targets_of([[0, 0, 40, 40]], [0])
    arguments = (torch.tensor([[[0]]]), torch.tensor([[[[20.0, 20.0, 60.0, 60.0]]]]), targets, 1)
    assert CrossStageAssigner(scope=("i",))(*arguments).sum() == 0
    assert OneToOneAssigner()(*arguments).sum() == 1


def test_one_query_can_carry_several_classes():
    targets = targets_of([[0, 0, 40, 40], [0, 0, 40, 44]], [0, 2])
    boxes = torch.tensor([[[[0.0, 0.0, 40.0, 42.0]]], [[[0.0, 0.0, 40.0, 42.0]]]])
    labels = CrossStageAssigner()(torch.tensor([[[0]], [[1]]]), boxes, targets, 3)
    assert labels[0, 0, 0].tolist() == [1, 0, 1]


def test_matching_takes_the_cheapest_pairs_and_survives_more_objects_than_queries():
    boxes = [[0, 0, 10, 10], [50, 50, 90, 90], [20, 0, 40, 10]]
    targets = targets_of(boxes, [0, 0, 0])
    predicted = torch.tensor(boxes, dtype=torch.float32)[[1, 2]][None, None]
    matched = HungarianMatcher()(torch.zeros(1, 1, 2, 1), predicted, targets)
    assert matched.tolist() == [[[1, 2]]]


def outputs_of(stages=2, batch=2, queries=5, classes=3, seed=0):
    torch.manual_seed(seed)
    outputs = []
    for _ in range(stages):
        corner = torch.rand(batch, queries, 2) * 50
        boxes = torch.cat((corner, corner + 5 + torch.rand(batch, queries, 2) * 20), -1)
        logits = torch.randn(batch, queries, classes).requires_grad_()
        outputs.append(StageOutput(logits, boxes.requires_grad_(), None, None))
    return outputs


def test_images_without_objects_give_finite_losses_and_gradients():
    criterion = Criterion(num_classes=3, matcher=HungarianMatcher(), assigner=CrossStageAssigner())
    outputs = outputs_of()
    losses = criterion(outputs, [random_image(0)["instances"] for _ in range(2)])
    assert losses["loss_bbox"] == losses["loss_giou_0"] == 0
    assert losses["loss_class"] > 0
    sum(losses.values()).backward()
    assert all(o.boxes.grad.abs().max() == 0 and o.logits.grad.isfinite().all() for o in outputs)


def test_losses_are_named_by_stage_and_the_last_has_the_plain_name():
    criterion = Criterion(num_classes=3, matcher=HungarianMatcher(), assigner=OneToOneAssigner())
    losses = criterion(outputs_of(), [random_image(2)["instances"] for _ in range(2)])
    assert set(losses) == {
        f"loss_{kind}{suffix}" for kind in ("class", "bbox", "giou") for suffix in ("", "_0")
    }


def test_predictions_that_are_not_a_number_reach_the_loss_instead_of_crashing_the_matching():
    criterion = Criterion(num_classes=3, matcher=HungarianMatcher(), assigner=OneToOneAssigner())
    outputs = outputs_of(stages=1)
    outputs[0].logits.data[0, 0, 0] = math.nan
    losses = criterion(outputs, [random_image(2)["instances"] for _ in range(2)])
    assert losses["loss_class"].isnan()
