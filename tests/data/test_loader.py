"""The training stream: a pure function of the seed, resumable at any batch."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch

from stage_interactor.d2 import comm
from stage_interactor.d2 import transforms as T
from stage_interactor.data import (
    DetrDatasetMapper,
    ImageReadError,
    StreamSampler,
    TrainStream,
    build_train_loader,
    load_coco_dataset,
    set_start_iteration,
)


def _records(size, tall_every=3):
    return [
        {
            "file_name": f"{index}.jpg",
            "image_id": index,
            "height": 40 if index % tall_every == 0 else 30,
            "width": 35,
        }
        for index in range(size)
    ]


def _random_mapper(record):
    numbers = (random.random(), float(np.random.rand()), torch.rand(()).item())
    return {"image_id": record["image_id"], "numbers": numbers, **record}


def _take(iterable, count):
    return list(itertools.islice(iterable, count))


def _sampler(size=11, batch_size=2, *, rank=0, world_size=1, grouped=True, **options):
    return StreamSampler(
        _records(size),
        batch_size,
        aspect_ratio_grouping=grouped,
        seed=5,
        rank=rank,
        world_size=world_size,
        **options,
    )


def test_every_epoch_has_every_record_once_in_an_order_of_its_own():
    stream = TrainStream(_records(11), _random_mapper, seed=5)
    epochs = [[stream[11 * epoch + i]["image_id"] for i in range(11)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = TrainStream(_records(11), _random_mapper, seed=6)
    assert [other[i]["image_id"] for i in range(11)] != epochs[0]
    ordered = TrainStream(_records(11), _random_mapper, seed=5, shuffle=False)
    assert [ordered[i]["image_id"] for i in range(22)] == list(range(11)) * 2


def test_an_augmented_image_depends_on_seed_and_draw_alone():
    stream = TrainStream(_records(11), _random_mapper, seed=5)
    expected = [stream[draw]["numbers"] for draw in range(30)]
    assert len({number for numbers in expected for number in numbers}) == 90
    np.random.seed(1)
    torch.manual_seed(1)
    fresh = TrainStream(_records(11), _random_mapper, seed=5)
    assert [fresh[draw]["numbers"] for draw in reversed(range(30))] == expected[::-1]
    assert TrainStream(_records(11), _random_mapper, seed=6)[0]["numbers"] != expected[0]


def test_the_global_random_numbers_go_on_as_if_nothing_had_been_drawn():
    def numbers():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seed()
    expected = numbers()
    seed()
    TrainStream(_records(4), _random_mapper, seed=5)[0]
    assert numbers() == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_sampler_gives_what_grouping_draw_by_draw_gives(grouped, world_size):
    """Against the plain loop that it replaces, with buckets that fill up one draw at a time."""
    records, batch_size = _records(11), 4
    stream = TrainStream(records, lambda record: record, seed=5)
    for rank in range(world_size):
        expected, buckets = [], ([], [])
        for draw in range(rank, 300, world_size):
            record = stream[draw]
            bucket = buckets[grouped and record["width"] > record["height"]]
            bucket.append(draw)
            if len(bucket) == batch_size:
                expected += bucket
                bucket.clear()
        sampler = _sampler(batch_size=batch_size, rank=rank, world_size=world_size, grouped=grouped)
        assert len(expected) >= 90 and _take(sampler, len(expected)) == expected


def test_processes_share_the_stream_without_overlap():
    draws = [_take(_sampler(rank=rank, world_size=2, grouped=False), 40) for rank in (0, 1)]
    assert sorted(draws[0] + draws[1]) == list(range(80))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 11])
@pytest.mark.parametrize("grouped", [True, False])
def test_starting_at_a_batch_gives_the_tail_of_the_whole(grouped, size, world_size):
    for rank in range(world_size):
        options = {"size": size, "rank": rank, "world_size": world_size, "grouped": grouped}
        whole = _take(_sampler(**options), 200)
        for start in (1, 2, 7, 40):
            sampler = _sampler(**options, start_iteration=start)
            assert _take(sampler, 200 - 2 * start) == whole[2 * start :]
            assert _take(sampler, 10) == whole[2 * start : 2 * start + 10]  # again from there


def test_resuming_far_into_a_training_on_coco_takes_no_time():
    wide = np.random.default_rng(0).random(117_266) < 0.7
    records = [{"height": 480, "width": 640 if is_wide else 360} for is_wide in wide]
    sampler = StreamSampler(
        records, 2, aspect_ratio_grouping=True, seed=0, rank=3, world_size=8, start_iteration=88_000
    )
    assert 11.9 < next(iter(sampler)) / len(records) < 12.1  # epoch 12 at 7,330 an epoch


@pytest.fixture
def dataset(coco):
    return load_coco_dataset("test_loader_pets", *coco.files)


def _loader(dataset, **options):
    mapper = DetrDatasetMapper(
        augmentation=[T.RandomFlip(), T.ResizeShortestEdge([24, 28, 32], sample_style="choice")],
        augmentation_with_crop=[T.RandomFlip(), T.RandomCrop("absolute_range", (12, 24))],
    )
    options = {"total_batch_size": 2, "num_workers": 0, "seed": 3} | options
    return build_train_loader(dataset, mapper=mapper, **options)


def _same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert [item["file_name"] for item in batch] == [item["file_name"] for item in other]
        for a, b in zip(batch, other):
            assert torch.equal(a["image"], b["image"])
            boxes = a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor
            assert torch.equal(*boxes)
    return True


def test_batches_do_not_depend_on_the_number_of_workers_and_resume_exactly(dataset):
    whole = _take(_loader(dataset), 14)
    assert all(len(batch) == 2 for batch in whole)
    assert all(len({item["width"] > item["height"] for item in batch}) == 1 for batch in whole)
    resumed = _loader(dataset)
    set_start_iteration(resumed, 5)
    assert _same(_take(resumed, 9), whole[5:])
    with_workers = _loader(dataset, num_workers=2)
    assert _same(_take(with_workers, 14), whole)
    set_start_iteration(with_workers, 5)
    assert _same(_take(with_workers, 9), whole[5:])


def test_the_processes_load_what_one_process_with_the_whole_batch_draws(dataset, monkeypatch):
    def names(batches):
        return sorted(item["file_name"] for batch in batches for item in batch)

    options = {"total_batch_size": 4, "aspect_ratio_grouping": False}
    whole = _take(_loader(dataset, **options), 6)
    halves = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = _loader(dataset, **options)
        sampler = loader.dataset.sampler
        assert (sampler.rank, sampler.world_size, sampler.batch_size) == (rank, 2, 2)
        stream = loader.dataset.dataset
        halves.append([[stream[draw] for draw in _take(sampler, 12)]])
    for step in range(6):
        parts = [half[0][2 * step : 2 * step + 2] for half in halves]
        assert names(parts) == names([whole[step]])


def test_a_batch_that_cannot_be_shared_is_an_error(dataset, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="total_batch_size=4 .* processes, 3"):
        _loader(dataset, total_batch_size=4)


def test_errors_of_the_parameters(dataset):
    with pytest.raises(ValueError, match="no images"):
        _loader([])
    with pytest.raises(ValueError, match="seed must be 0 or larger, got -1"):
        _loader(dataset, seed=-1)
    with pytest.raises(TypeError, match="only a loader of build_train_loader"):
        set_start_iteration(torch.utils.data.DataLoader([1]), 3)
    with pytest.raises(ValueError, match="iteration must be 0 or larger"):
        set_start_iteration(_loader(dataset), -3)


def _mapper_that_cannot_read(broken):
    def mapper(record):
        if record["image_id"] in broken:
            raise ImageReadError(record["file_name"], "image file is truncated")
        return _random_mapper(record)

    return mapper


def test_an_unreadable_image_is_replaced_deterministically_with_one_warning(caplog):
    stream = TrainStream(_records(11), _mapper_that_cannot_read({4, 6}), seed=5)
    clean = TrainStream(_records(11), _random_mapper, seed=5)
    with caplog.at_level(logging.WARNING, logger="stage_interactor"):
        drawn = [stream[draw] for draw in range(44)]
    for draw, item in enumerate(drawn):
        wanted = clean[draw]
        assert item["image_id"] not in (4, 6)
        assert (item["width"] > item["height"]) == (wanted["width"] > wanted["height"])
        if wanted["image_id"] not in (4, 6):
            assert item == wanted
    again = TrainStream(_records(11), _mapper_that_cannot_read({4, 6}), seed=5)
    assert [again[draw] for draw in range(44)] == drawn
    messages = [record.getMessage() for record in caplog.records][:2]
    assert len(caplog.records) == 4  # two files in each of the two streams
    assert sorted(message.split(":")[0].split()[-1] for message in messages) == ["4.jpg", "6.jpg"]
    assert "process: 1" in messages[0] and "process: 2" in messages[1]


def test_a_storage_that_fails_stops_the_training():
    stream = TrainStream(_records(50), _mapper_that_cannot_read(set(range(50))), seed=5)
    with pytest.raises(RuntimeError, match="10 images in a row cannot be read.*truncated"):
        stream[0]
    stream = TrainStream(_records(2), _mapper_that_cannot_read({0, 1}), seed=5)
    with pytest.raises(RuntimeError, match="1 images in a row"):
        stream[0]


def test_another_error_of_the_mapper_is_not_hidden():
    def mapper(record):
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        TrainStream(_records(3), mapper, seed=5)[0]
