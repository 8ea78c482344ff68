import copy

import pytest
import torch
from checks.small import random_image, tiny_model

from stage_interactor.d2.detections import split_output
from stage_interactor.modeling import StageInteractor, StageOutput
from stage_interactor.modeling.detector import Predictions

SIZES = [(64, 96), (96, 64), (50, 70)]


def batch(counts, **kwargs):
    return [
        random_image(count, SIZES[index % 3], seed=index, **kwargs)
        for index, count in enumerate(counts)
    ]


def train_once(model, images):
    losses = model.train()(images)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("counts", [(2, 0, 4), (0, 0), (9, 7)])
def test_trains_on_mixed_sizes_empty_images_and_more_objects_than_queries(counts):
    model = tiny_model(num_queries=6)
    losses = train_once(model, batch(counts))
    assert all(loss.isfinite() for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_boxes_stay_in_full_precision_and_losses_stay_close(dtype):
    torch.manual_seed(0)
    model, images = tiny_model(), batch((3, 2))
    exact = model.train()(images)
    seen = {}
    for name, part in [("head", model.decoder.stages[1].head), ("mixing", model.decoder.stages[1])]:
        part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    model.decoder.stages[1].sampler.register_forward_hook(
        lambda _, __, out: seen.update(sampled=out)
    )
    with torch.autocast("cpu", dtype):
        losses = model(images)
    logits, xyzr = seen["head"]
    assert xyzr.dtype == logits.dtype == seen["sampled"].dtype == torch.float32
    _, filters = seen["mixing"]
    assert filters.channel.dtype == dtype  # the heavy part does run in half precision
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.05, atol=0.05)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_padding_of_a_smaller_image_does_not_change_its_detections():
    """A larger neighbour in the batch pads it; sampling positions must not move."""
    torch.manual_seed(0)
    model = tiny_model().eval()
    small, large = random_image(1, (32, 32), seed=1), random_image(1, (64, 96), seed=2)
    alone = model([small])[0]["instances"]
    padded = model([small, large])[0]["instances"]
    # Zeros beyond the border are the same in both: the backbone has no padding of its own.
    torch.testing.assert_close(alone.pred_boxes.tensor, padded.pred_boxes.tensor)
    torch.testing.assert_close(alone.scores, padded.scores, rtol=1e-3, atol=1e-4)


def test_detections_are_the_best_pairs_in_pixels_of_the_original_image():
    model = tiny_model(num_queries=6, num_classes=3).eval()
    image = random_image(0, (64, 96))
    image |= {"height": 128, "width": 192}
    instances = model([image])[0]["instances"]
    assert instances.image_size == (128, 192)
    assert len(instances) == 6  # as many as queries
    boxes = instances.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 192 and boxes[:, 3].max() <= 128
    assert instances.scores.diff().max() <= 0
    small = copy.copy(image)
    del small["height"], small["width"]
    torch.testing.assert_close(model([small])[0]["instances"].pred_boxes.tensor * 2, boxes)


def test_every_query_can_be_detected_with_several_classes():
    model = tiny_model(num_queries=2, num_classes=3).eval()
    model.max_detections = 100
    assert len(model([random_image(0)])[0]["instances"]) == 6


def test_a_class_that_the_model_does_not_have_is_an_error_naming_the_image():
    with pytest.raises(
        ValueError, match=r"image0.jpg has objects of the classes \[4\].*classes 0 to 2"
    ):
        image = random_image(2)
        image["instances"].gt_classes[:] = 4
        tiny_model(num_classes=3).train()([image])


def test_training_without_ground_truth_is_an_error():
    image = random_image(1)
    del image["instances"]
    with pytest.raises(ValueError, match="image0.jpg has no 'instances'"):
        tiny_model().train()([image])


def test_a_detector_without_a_criterion_detects_and_says_why_it_cannot_be_trained():
    model = tiny_model()
    model.criterion = None
    assert len(model.eval()([random_image(1)])) == 1
    with pytest.raises(ValueError, match="built without a criterion"):
        model.train()([random_image(1)])


def test_a_step_of_the_optimizer_lowers_the_loss():
    torch.manual_seed(0)
    model, images = tiny_model(), batch((3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = sum(train_once(model, images).values()).item()
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        last = sum(train_once(model, images).values()).item()
    assert last < 0.9 * first


def test_nms_removes_what_overlaps_a_better_detection_of_its_class():
    model = tiny_model(num_queries=3, num_classes=2).eval()
    boxes = torch.tensor([[0.0, 0, 20, 20], [1, 0, 21, 20], [40, 40, 60, 60]])
    logits = torch.tensor([[2.0, -1], [1, 0], [0.5, -2]])
    output = StageOutput(logits[None], boxes[None], torch.zeros(1, 3, 16), torch.zeros(1, 3, 4))

    model.decode = lambda images, sizes: [output]

    def kept(threshold):
        predictions = model.predict(torch.zeros(1, 3, 64, 96), torch.tensor([[64, 96]]))
        (found,) = model.postprocess(predictions, [(64, 96)], [{}], threshold)
        found = found["instances"]
        return sorted(zip(found.pred_classes.tolist(), found.pred_boxes.tensor[:, 0].tolist()))

    model.max_detections = 6
    assert kept(None) == [(0, 0), (0, 1), (0, 40), (1, 0), (1, 1), (1, 40)]
    assert kept(0.5) == [(0, 0), (0, 40), (1, 1), (1, 40)]
    assert kept(0.95) == kept(None)
    with pytest.raises(ValueError, match="nms_threshold"):
        StageInteractor(
            backbone=None, neck=None, queries=model.queries, decoder=None, nms_threshold=1.5
        )


NAN, INF = float("nan"), float("inf")


def postprocessed(boxes, scores=None, classes=None, threshold=None, size=(100, 100), image=None):
    boxes = torch.tensor(boxes, dtype=torch.float)
    scores = torch.linspace(0.9, 0.1, len(boxes)) if scores is None else torch.tensor(scores)
    classes = torch.tensor(classes or [0] * len(boxes))
    none = torch.zeros(1, dtype=torch.long)
    found = Predictions(boxes[None], scores[None], classes[None], none)
    (output,) = StageInteractor.postprocess(found, [size], [image or {}], threshold)
    return output["instances"]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_clipping_hides_nothing_that_is_infinite_or_turned_inside_out(threshold):
    bad = [[NAN, 0, 9, 9], [0, 0, INF, 9], [0, -INF, 9, 9], [INF, 0, INF, 9], [-5, 0, -9, 9],
           [-3e38, 0, 3e38, 9]]  # fmt: skip
    good = [[-20, 5, 20, 30], [-9, -9, -5, -5], [90, 90, 300, 400]]
    found = postprocessed(bad + good, threshold=threshold)
    assert found.pred_boxes.tensor[: len(bad)].isnan().all()
    expected = [[0, 5, 20, 30], [0, 0, 0, 0], [90, 90, 100, 100]]
    assert found.pred_boxes.tensor[len(bad) :].tolist() == expected


def predicted(logits, boxes=None, most=None):
    """Detections of a model whose last stage gives these (N, C)."""
    logits = torch.tensor(logits)
    if boxes is None:
        boxes = torch.arange(len(logits))[:, None] + torch.tensor([0.0, 0, 10, 10])
    model = tiny_model(num_queries=len(logits), num_classes=logits.shape[1]).eval()
    output = StageOutput(logits[None], boxes[None], None, None)
    model.decode = lambda images, sizes: [output]
    model.max_detections = most or model.max_detections
    return model([random_image(0)])[0]


def test_undefined_scores_are_seen_and_take_no_place_of_others():
    logits = [[0.5, 0.1, -3.0], [NAN, NAN, NAN], [1.0, INF, -INF], [0.2, 0.3, 0.4]]
    for most, in_place in ((4, 0), (8, 0), (12, 4)):
        output = predicted(logits, most=most)
        kept, count = split_output(output)
        assert count == 4  # NaN and infinity; what is minus infinity has a score of 0
        expected = [1.0, 0.5, 0.4, 0.3, 0.2, 0.1, -3.0, -INF][:most]
        scores = torch.tensor(expected).sigmoid()
        torch.testing.assert_close(kept["instances"].scores, scores)
        assert output["instances"].scores.isnan().sum() == in_place
    assert split_output(predicted([[0.5, 0.1]]))[1] == 0


def test_nms_sees_boxes_as_they_are_clipped():
    # Beyond the border they are far apart, or one; within it they are one, or apart.
    apart = [[0, 0, 10, 10], [0, 0, 10, 500]]
    assert len(postprocessed(apart, threshold=0.5, size=(10, 10))) == 1
    one = [[-900, 0, 10, 10], [-900, 0, 2, 10]]
    assert len(postprocessed(one, threshold=0.5, size=(10, 10))) == 2
    wide = {"height": 10, "width": 20}
    assert len(postprocessed(one, threshold=0.5, size=(10, 10), image=wide)) == 2


def test_nms_keeps_classes_apart_however_far_boxes_reach():
    # An offset of the largest coordinate and 1 for each class would lay one on the other.
    boxes = [[10, 0, 20, 10], [-11, -21, -1, -11]]
    assert len(postprocessed(boxes, classes=[0, 1], threshold=0.1)) == 2


def test_an_undefined_detection_suppresses_nothing():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 10], [NAN] * 4]
    found = postprocessed(boxes, scores=[NAN, 0.5, 0.9], threshold=0.5)
    assert found.scores.isnan().tolist() == [True, False, False]
    assert found.pred_boxes.tensor[1].tolist() == [0, 0, 10, 10]
