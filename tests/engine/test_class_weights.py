"""Rare classes: weights of the loss, and images that come more often."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from stage_interactor import train
from stage_interactor.config import ConfigError
from stage_interactor.data.loader import EpochOrder, StreamSampler, repeat_factors
from stage_interactor.engine.class_weights import class_weights
from stage_interactor.ops import focal_loss, use_ops


def record(*classes, crowd=(), **more):
    objects = [{"category_id": index, "iscrowd": int(index in crowd)} for index in classes]
    return {"annotations": objects, "width": 2, "height": 1, **more}


RECORDS = [record(0)] * 7 + [record(0, 1)] * 2 + [record()]


def test_balanced_weights_are_the_larger_the_rarer_a_class_is():
    records = [record(0, 0, 0, 0), record(0, 0, 1, 2), record(0, 0, 2, 2, crowd=(2,))]
    counts = [8, 1, 1]  # crowds apart
    found = class_weights("balanced", ["a", "b", "c", "none"], records)
    assert found == pytest.approx([math.sqrt(10 / 3 / n) for n in counts] + [1.0])
    assert class_weights("balanced", ["a", "b"], [record(*[0] * 1000, 1)])[1] == 5.0
    assert class_weights(None, ["a"], records) is None


def test_weights_by_name_are_those_of_their_classes_and_unknown_names_are_told():
    assert class_weights({"b": 3}, ["a", "b", "c"], []) == [1.0, 3.0, 1.0]
    assert class_weights({7: 0.5}, ["6", "7"], []) == [1.0, 0.5]
    with pytest.raises(ConfigError, match="no class 'Platelet'; is Platelets meant"):
        class_weights({"Platelet": 3}, ["RBC", "Platelets"], [])
    with pytest.raises(ConfigError, match="is RBC meant"):
        class_weights({"rbc ": 3}, ["RBC", "Platelets"], [])
    with pytest.raises(ConfigError, match="are all 0"):
        class_weights({"a": 0, "b": 0}, ["a", "b"], [])


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_a_weight_multiplies_the_loss_of_its_class_and_its_gradient(which):
    torch.manual_seed(0)
    logits = torch.randn(2, 40, 3000, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(logits.shape) < 0.1
    weights = torch.tensor([1.0, 0.0, 2.5])
    with use_ops(which):
        loss = focal_loss(logits, labels, 0.25, 2.0, weights)
        each = [focal_loss(logits[..., i], labels[..., i], 0.25, 2.0) for i in range(3)]
    expected = each[0] + 2.5 * each[2]
    assert torch.allclose(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (of_expected,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(gradient, of_expected)
    assert not gradient[..., 1].any()


def test_rare_classes_come_as_often_as_detectron2_has_it():
    threshold = 0.8
    found = repeat_factors(RECORDS, threshold)
    assert found == pytest.approx([1] * 7 + [math.sqrt(0.8 / 0.2)] * 2 + [1])
    samplers = pytest.importorskip("detectron2.data.samplers")
    sampler = samplers.RepeatFactorTrainingSampler
    theirs = sampler.repeat_factors_from_category_frequency(RECORDS, threshold)
    assert found == pytest.approx(theirs.numpy())


def test_nothing_is_repeated_where_nothing_is_rare():
    assert repeat_factors(RECORDS, None) is None
    assert repeat_factors(RECORDS, 0.0) is None
    assert repeat_factors(RECORDS, 0.2) is None
    with pytest.raises(ValueError, match="0 to 1, got 3"):
        repeat_factors(RECORDS, 3)
    with pytest.raises(ValueError, match="more than 0, got -1"):
        repeat_factors([record(sampling_weight=-1)], None)


@pytest.mark.parametrize("shuffle", [True, False])
def test_records_come_as_often_as_their_factors_say(shuffle):
    repeats = np.array([1.0, 2.5, 0.25, 1.3, 7.0, 0.5])
    order = EpochOrder(6, seed=3, shuffle=shuffle, repeats=repeats)
    assert order.size == 13  # 12.55, rounded
    epochs = 4000
    counts = Counter()
    for epoch in range(epochs):
        found = order.epoch(epoch)
        assert len(found) == 13
        of_epoch = Counter(found.tolist())
        counts.update(of_epoch)
        for index, factor in enumerate(repeats * 13 / 12.55):
            assert math.floor(factor) <= of_epoch[index] <= math.ceil(factor)
        if not shuffle:
            assert sorted(found) == found.tolist()
    for index, factor in enumerate(repeats * 13 / 12.55):
        assert counts[index] / epochs == pytest.approx(factor, abs=0.03)


def test_an_epoch_is_a_function_of_the_seed_alone():
    repeats = np.array([1.0, 2.5, 0.25, 1.3])
    first, other = (EpochOrder(4, 3, repeats=repeats) for _ in range(2))
    last = [first.epoch(epoch).tolist() for epoch in range(9)]
    assert [other.epoch(epoch).tolist() for epoch in reversed(range(9))] == last[::-1]
    assert len(set(map(tuple, last))) > 1
    assert EpochOrder(4, 4, repeats=repeats).epoch(0).tolist() != last[0]


def test_batches_of_repeated_images_go_on_where_they_stopped():
    repeats = repeat_factors(RECORDS, 0.8)

    def batches(start, number, rank=0, world_size=1):
        sampler = StreamSampler(
            RECORDS, 3, aspect_ratio_grouping=True, seed=0, rank=rank, world_size=world_size,
            start_iteration=start, repeats=repeats,
        )  # fmt: skip
        draws = iter(sampler)
        return [[next(draws) for _ in range(3)] for _ in range(number)]

    whole = batches(0, 20)
    assert batches(11, 9) == whole[11:]
    assert sorted(sum(whole, [])) == list(range(60))
    shared = batches(0, 10, 0, 2) + batches(0, 10, 1, 2)
    assert sorted(sum(shared, [])) == list(range(60))


def test_a_run_has_the_weights_and_the_repeats_that_it_is_told(tmp_path, caplog):
    options = [
        f"shapes.root={tmp_path / 'shapes'}", "train.device=cpu", "train.amp.enabled=false",
        "train.max_iter=2", "train.class_weights={ring: 0.0, cross: 4}",
    ]  # fmt: skip
    plain, weighted = (
        train("tests/tiny_config.py", chosen, output_dir=tmp_path / str(number))
        for number, chosen in enumerate((options[:-1], options))
    )
    losses = []
    for run in (plain, weighted):
        lines = (tmp_path / run.output_dir / "metrics.json").read_text().splitlines()
        losses.append([float(line.split('"loss_class": ')[1].split(",")[0]) for line in lines])
    assert losses[0][0] != losses[1][0]
    train(
        "tests/tiny_config.py",
        [*options[:-1], "dataloader.train.repeat_threshold=1.0"],
        output_dir=tmp_path / "repeated",
    )
    log = (tmp_path / "repeated" / "log.txt").read_text()
    assert "Images come 1" in log and "draws from 24 images" in log
    log = (tmp_path / "1" / "log.txt").read_text()
    assert "cross 4" in log and "ring 0" in log
    with pytest.raises(ConfigError, match="no class 'rings'; is ring meant"):
        train(
            "tests/tiny_config.py",
            [*options[:-1], "train.class_weights={rings: 2}"],
            output_dir=tmp_path / "wrong",
        )
