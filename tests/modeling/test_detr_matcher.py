"""A matcher with DETR's interface in the place of ours."""

import pytest
import torch
from checks.small import random_image
from scipy.optimize import linear_sum_assignment

from stage_interactor.modeling import DetrStyleMatcher, HungarianMatcher
from stage_interactor.modeling.matcher import Targets


class NearestMatcher(torch.nn.Module):
    """DETR's interface: boxes cxcywh from 0 to 1."""

    def forward(self, outputs, targets):
        pairs = []
        for boxes, truth in zip(outputs["pred_boxes"], targets):
            assert boxes.min() >= 0 and boxes.max() <= 1
            assert len(truth["labels"]) == len(truth["boxes"])
            distance = torch.cdist(boxes, truth["boxes"])
            queries, objects = linear_sum_assignment(distance.numpy())
            pairs.append((torch.from_numpy(queries), torch.from_numpy(objects)))
        return pairs


def predictions(targets, num_queries=7):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, len(targets.counts), num_queries, 2, generator=generator) * 20
    boxes = torch.cat((corners, corners + 10), -1)
    for image, count in enumerate(targets.counts):  # queries 6, 5, ... lie on objects 0, 1, ...
        boxes[:, image, num_queries - count :] = targets.boxes[image, :count].flip(0)
    return torch.zeros(2, len(targets.counts), num_queries, 3), boxes


def test_queries_get_the_objects_that_the_wrapped_matcher_says():
    images = [random_image(3, seed=1), random_image(0, seed=2), random_image(2, seed=3)]
    targets = Targets.from_instances([image["instances"] for image in images], torch.float32)
    logits, boxes = predictions(targets)
    matched = DetrStyleMatcher(NearestMatcher())(logits, boxes, targets)
    expected = torch.full((2, 3, 7), -1)
    expected[:, 0, 4:] = torch.tensor([2, 1, 0])
    expected[:, 2, 5:] = torch.tensor([1, 0])
    assert torch.equal(matched, expected)


def test_detrexs_matcher_agrees_where_the_best_query_is_plain():
    detrex = pytest.importorskip("detrex.modeling")
    images = [random_image(3, seed=1), random_image(2, seed=3)]
    targets = Targets.from_instances([image["instances"] for image in images], torch.float32)
    logits, boxes = predictions(targets)
    costs = dict(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0)
    wrapped = DetrStyleMatcher(detrex.HungarianMatcher(**costs))
    assert torch.equal(
        wrapped(logits, boxes, targets), HungarianMatcher(**costs)(logits, boxes, targets)
    )
