"""Augmentations: boxes stay on the pixels they mark, and a draw is the same whenever it is made."""

import functools
import itertools
import logging
import operator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import minimum_filter

from stage_interactor.commands import main
from stage_interactor.config import ConfigError, instantiate, load_config, save_config
from stage_interactor.d2 import transforms as T
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.d2.structures import BoxMode
from stage_interactor.data import (
    DetrDatasetMapper,
    ImageReadError,
    Part,
    TrainStream,
    build_train_loader,
    load_coco_dataset,
    set_start_iteration,
)
from stage_interactor.data.augmentations import (
    ColorJitter,
    Combination,
    CopyBoxes,
    GaussianBlur,
    LargeScaleJitter,
    MixUp,
    Mosaic,
    RandomGrayscale,
    RandomRotate,
    RandomRotation90,
    Sample,
)
from stage_interactor.data.augmentations.geometry import areas
from stage_interactor.engine.presets import fit_to_data
from stage_interactor.engine.settings import check_settings

SIZES = [(81, 121), (64, 64), (1, 90), (90, 1), (37, 5)]
PIXELS = [ColorJitter(0.5, 0.5, 0.5, 0.2), RandomGrayscale(1.0), GaussianBlur((1.0, 2.0), 1.0)]


def drawn(size, shape="rectangle", seed=0):
    """A dark picture with up to three objects, each bright in a channel of its own, and boxes."""
    height, width = size
    rng = np.random.default_rng([seed, height, width])
    ends = [np.sort(rng.choice(side + 1, (3, 2)), axis=1) for side in (width, height)]
    ends[0][0, 0], ends[1][1, 1] = 0, height  # at the left and at the bottom
    boxes = np.stack([ends[0][:, 0], ends[1][:, 0], ends[0][:, 1], ends[1][:, 1]], axis=1)
    boxes = boxes.clip(0, [width, height, width, height]).astype(float)
    boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1) < 1] = [0, 0, width, height]
    image = np.zeros((height, width, 3), np.uint8)
    for channel, box in enumerate(boxes):
        mask = Image.new("L", (8 * width, 8 * height))
        draw = getattr(ImageDraw.Draw(mask), shape)
        draw([8 * box[0], 8 * box[1], 8 * box[2] - 1, 8 * box[3] - 1], fill=255)
        image[:, :, channel] = np.asarray(mask.resize((width, height), Image.Resampling.BOX))
    return Sample(image, boxes, np.arange(3))


def recorded(sample, path):
    """A detectron2 record of it, in a file."""
    Image.fromarray(sample.image).save(path)
    height, width = sample.image.shape[:2]
    annotations = [
        {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(label)}
        for box, label in zip(sample.boxes, sample.classes)
    ]
    return dict(
        file_name=str(path), image_id=1, height=height, width=width, annotations=annotations
    )


def bounds(mask):
    """xyxy of a mask (H, W), or None."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(xs) else None


def mapped(record, augmentation, seed=0, **options):
    mapper = DetrDatasetMapper(augmentation=augmentation, **options)
    np.random.seed(seed)
    result = mapper(record)
    pixels = result["image"].permute(1, 2, 0).numpy()
    return pixels, result["instances"].gt_boxes.tensor.numpy(), result["instances"].gt_classes


JITTER = LargeScaleJitter([50, 70], 140, "choice", min_visible=0.2)
QUARTERS = RandomRotation90(1.0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "augmentation",
    [
        [JITTER],
        [QUARTERS],
        [T.RandomFlip(), QUARTERS, T.RandomFlip(vertical=True, horizontal=False), JITTER],
        [T.ResizeShortestEdge([40, 60], 100), T.RandomCrop("relative", (0.9, 0.9)), JITTER],
        [JITTER, QUARTERS, T.ResizeShortestEdge([60], 100, "choice"), *PIXELS[:1]],
        [RandomRotate(0.0, 1.0)],
    ],
    ids=lambda listed: "+".join(type(aug).__name__ for aug in listed),
)
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_boxes_stay_on_their_pixels(tmp_path, size, augmentation, order):
    record = recorded(drawn(size), tmp_path / "drawn.png")
    changed_colours = any(isinstance(aug, ColorJitter) for aug in augmentation)
    shapes, counts = set(), set()
    for seed in range(15):
        pixels, boxes, classes = mapped(record, augmentation, seed, image_format=order)
        pixels = pixels[:, :, :: 1 if order == "RGB" else -1]
        height, width = pixels.shape[:2]
        shapes.add((height, width))
        counts.add(len(boxes))
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        if changed_colours:
            continue
        for label in range(3):
            visible = bounds(pixels[:, :, label] > 127)
            here = boxes[classes.numpy() == label]
            if not len(here):
                continue
            thin = (here[0, 2:] - here[0, :2]).min() < 2  # grey at its edges, bright nowhere
            assert thin or visible is not None
            if visible is not None:
                off = (visible - here[0]) * ([-1, -1, 1, 1] if thin else 1)
                assert (off if thin else np.abs(off)).max() <= 1.01, (seed, label)
    assert 0 < max(counts) <= 3
    if augmentation[-1] is JITTER:
        assert len(shapes) > 1 or min(size) < 40


def test_quarter_turns_are_exact_to_the_pixel_and_undone(tmp_path):
    sample = drawn((37, 52))
    for turns in (1, 2, 3):
        turn = RandomRotation90(1.0, [turns]).get_transform(sample.image)
        image, boxes = turn.apply_image(sample.image), turn.apply_box(sample.boxes)
        assert np.array_equal(image, np.rot90(sample.image, turns))
        for channel, box in enumerate(boxes):
            assert np.array_equal(bounds(image[:, :, channel] > 127), box)
        assert np.array_equal(turn.inverse().apply_image(image), sample.image)
        assert np.array_equal(turn.inverse().apply_box(boxes), sample.boxes)


@pytest.mark.parametrize("expand", [True, False])
def test_a_small_turn_has_the_boxes_of_turned_ellipses(tmp_path, expand):
    """The bound that is documented; of all corners the boxes would be larger."""
    sample = drawn((81, 121), "ellipse", seed=3)
    larger = []
    for seed in range(30):
        np.random.seed(seed)
        turn = RandomRotate(20.0, 1.0, expand, min_visible=0.0).get_transform(sample.image)
        image = turn.apply_image(sample.image)
        assert image.shape[:2] == turn.out_size
        boxes, _ = turn.cut_boxes(sample.boxes)
        outside = turn.apply_image(np.full_like(sample.image, 255))[:, :, 0] < 200
        for channel, box in enumerate(boxes):
            mask = (image[:, :, channel] > 60) & ~outside  # tips are thin
            if expand:
                assert np.abs(bounds(mask) - box).max() <= 1.5
            else:  # the part within the picture is smaller than the box's
                assert (bounds(mask)[:2] >= box[:2] - 1.5).all()
                assert (bounds(mask)[2:] <= box[2:] + 1.5).all()
        corners = super(type(turn), turn).apply_box(sample.boxes)
        larger.append((areas(corners) - areas(boxes)).min())
    assert (expand and image.shape[0] > 81) or image.shape[:2] == (81, 121)
    assert min(larger) > 0


def test_what_a_turn_uncovers_is_grey():
    white = np.full((40, 60, 3), 255, np.uint8)
    np.random.seed(1)
    for fill in (114, 20):
        image = RandomRotate(30.0, 1.0, True, fill).get_transform(white).apply_image(white)
        assert image[0, 0].tolist() == image[-1, -1].tolist() == [fill] * 3
        assert image[image.shape[0] // 2, image.shape[1] // 2].tolist() == [255] * 3


def test_a_crop_drops_what_it_leaves_too_little_of(tmp_path):
    sample = drawn((81, 121), seed=5)
    seen = set()
    for seed in range(300):
        np.random.seed(seed)
        crop = LargeScaleJitter(60, min_scale=1.5, max_scale=3, min_visible=0.3).get_transform(
            sample.image
        )
        image, (cut, left) = crop.apply_image(sample.image), crop.cut_boxes(sample.boxes)
        whole = crop.apply_box(sample.boxes)
        for channel in range(3):
            share = (image[:, :, channel] > 127).sum() / areas(whole)[channel]
            sides = cut[channel, 2:] - cut[channel, :2]
            assert left[channel] == (share >= 0.3 and sides.min() >= 2) or abs(share - 0.3) < 0.02
            seen.add((bool(left[channel]), share > 0.9, share > 0.05))
    assert {(True, True, True), (False, False, True), (False, False, False)} <= seen
    # A box of a pixel that nothing cuts off stays.
    small = sample._replace(boxes=np.array([[60.0, 40, 61, 41]]), classes=np.array([0]))
    grown = LargeScaleJitter(81, min_scale=1, max_scale=1).get_transform(small.image)
    assert grown.cut_boxes(small.boxes)[1].tolist() == [True]


def test_of_a_box_that_leaves_its_picture_the_part_within_counts():
    crop = LargeScaleJitter(80, min_scale=1, max_scale=1, min_visible=0.9).get_transform(
        np.zeros((80, 80, 3), np.uint8)
    )
    boxes = np.array([[-100.0, 10, 20, 30], [70, 70, 900, 900]])
    cut, left = crop.cut_boxes(boxes)
    assert left.all() and cut.tolist() == [[0, 10, 20, 30], [70, 70, 80, 80]]


def test_detrs_own_crop_keeps_slivers_as_ever(tmp_path):
    record = recorded(drawn((81, 121), seed=5), tmp_path / "drawn.png")
    crop = [T.RandomCrop("relative", (0.4, 0.4))]
    smallest = [mapped(record, crop, seed)[1] for seed in range(60)]
    assert min((box[:, 2:] - box[:, :2]).min(initial=99) for box in smallest) <= 1


@pytest.mark.parametrize("augmentation", [JITTER, QUARTERS, RandomRotate(10, 1.0), *PIXELS])
def test_a_picture_without_objects_has_none(tmp_path, augmentation):
    record = recorded(drawn((81, 121)), tmp_path / "drawn.png") | {"annotations": []}
    _, boxes, classes = mapped(record, [augmentation])
    assert boxes.shape == (0, 4) and len(classes) == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("augmentation", PIXELS, ids=lambda aug: type(aug).__name__)
def test_pixels_change_and_boxes_do_not(tmp_path, augmentation, size):
    sample = drawn(size)
    noise = np.random.default_rng(0).integers(0, 256, sample.image.shape, dtype=np.uint8)
    record = recorded(sample._replace(image=noise), tmp_path / "noise.png")
    pixels, boxes, classes = mapped(record, [augmentation])
    assert pixels.shape == noise.shape and pixels.dtype == np.uint8
    assert np.array_equal(boxes, sample.boxes) and classes.tolist() == [0, 1, 2]
    assert np.abs(pixels.astype(int) - noise).mean() > 5
    if isinstance(augmentation, RandomGrayscale):
        assert (pixels == pixels[:, :, :1]).all()
    bgr, *_ = mapped(record, [augmentation], image_format="BGR")
    assert np.array_equal(bgr[:, :, ::-1], pixels)
    assert augmentation.image_format == "RGB"  # what was given is another's, too


@pytest.mark.parametrize(
    "augmentation",
    [ColorJitter(prob=0), ColorJitter(0, 0, 0, 0), RandomGrayscale(0), GaussianBlur(prob=0),
     RandomRotation90(0), RandomRotate(prob=0)],
)  # fmt: skip
def test_what_is_not_drawn_changes_nothing(augmentation):
    image = drawn((30, 40)).image
    for _ in range(10):
        assert np.array_equal(augmentation.get_transform(image).apply_image(image), image)


def test_wrapped_augmentations_know_the_order_of_channels_too(tmp_path):
    class Wrapped(T.Augmentation):
        def __init__(self, aug):
            self.aug = aug

        def get_transform(self, image):
            return self.aug.get_transform(image)

    record = recorded(drawn((30, 40)), tmp_path / "drawn.png")
    listed = [T.AugmentationList([Wrapped(RandomGrayscale(1.0))])]
    rgb, bgr = (mapped(record, listed, image_format=order)[0] for order in ("RGB", "BGR"))
    assert np.array_equal(rgb, bgr)  # red counts less than green, whichever comes first


COMBINATIONS = [
    Mosaic(1.0, min_visible=0.0),
    MixUp(1.0, alpha=5000.0, min_visible=0.0),
    CopyBoxes(1.0, max_hidden=0.0),
]


@pytest.mark.parametrize("sizes", [[(80, 120), (61, 47), (200, 90)], [(37, 5), (1, 40), (40, 1)],
                                   [(50, 20), (70, 90)], [(1, 60), (80, 80)]])  # fmt: skip
@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda item: type(item).__name__)
def test_objects_of_combined_pictures_lie_in_their_boxes(combination, sizes):
    pictures = [drawn(size, seed=seed) for size in sizes for seed in range(4)]
    several = 0
    for seed in range(25):
        np.random.seed(seed)
        order = itertools.cycle(np.random.permutation(len(pictures)))
        first = pictures[next(order)]
        before = [array.copy() for array in first]
        combined = combination(first, lambda: pictures[next(order)])  # noqa: B023
        assert all(np.array_equal(a, b) for a, b in zip(first, before))
        image, boxes, classes = combined
        assert image.shape == first.image.shape and image.dtype == np.uint8
        assert boxes.shape == (len(classes), 4) and classes.dtype == np.int64
        height, width = image.shape[:2]
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        several += len(boxes) > 3
        if isinstance(combination, CopyBoxes) and min(height, width) > 1:
            copied = boxes[3:]
            assert np.array_equal(boxes[:3], first.boxes)
            for box in copied:  # nothing that was there is hidden
                shared = np.minimum(box[2:], boxes[:3, 2:]) - np.maximum(box[:2], boxes[:3, :2])
                assert (shared.min(axis=1) <= 0).all()
        for channel in range(3):
            bright = image[:, :, channel] > (60 if isinstance(combination, MixUp) else 127)
            outside = bright.copy()
            for box in boxes[classes == channel]:
                inner = np.round(box).astype(int)
                inside = bright[inner[1] + 1 : inner[3] - 1, inner[0] + 1 : inner[2] - 1]
                if inside.size and not isinstance(combination, CopyBoxes):
                    assert inside.all()
                elif inside.size:  # with pixels of others that it overlaps
                    assert inside.mean() > 0.99
                left, top = (inner[:2] - 1).clip(0)
                outside[top : inner[3] + 1, left : inner[2] + 1] = False
            if not isinstance(combination, CopyBoxes):  # but for slivers, all have boxes
                assert not minimum_filter(outside, 3, mode="constant").any()
    if min(map(min, sizes)) > 40:
        assert several > 10


def test_a_mosaic_is_of_four_pictures_and_leaves_nothing_empty():
    flat = [
        Sample(np.full((40, 60, 3), 50 * n, np.uint8), np.empty((0, 4)), np.empty(0, int))
        for n in range(1, 5)
    ]
    others = iter(flat[1:])
    image = Mosaic(1.0)(flat[0], lambda: next(others)).image
    assert sorted(np.unique(image)) == [50, 100, 150, 200]
    corners = [int(image[y, x, 0]) for y in (0, -1) for x in (0, -1)]
    assert sorted(corners) == [50, 100, 150, 200]


def test_mixup_shows_both(tmp_path):
    plain = [Sample(np.full((20, 30, 3), n, np.uint8), np.empty((0, 4)), np.empty(0, int))
             for n in (40, 200)]  # fmt: skip
    mixed = MixUp(1.0)(plain[0], lambda: plain[1]).image
    assert 70 < mixed.min() == mixed.max() < 170


def test_copied_boxes_are_added(tmp_path):
    first = Sample(np.zeros((80, 80, 3), np.uint8), np.empty((0, 4)), np.empty(0, np.int64))
    np.random.seed(0)
    found = CopyBoxes(1.0)(first, lambda: drawn((60, 60), seed=1))
    assert 0 < len(found.boxes) <= 3 and set(found.classes) <= {0, 1, 2}
    assert found.image.max() == 255
    for box, channel in zip(found.boxes[-1:], found.classes[-1:]):  # which nothing hides
        inner = box.astype(int) + [1, 1, -1, -1]
        assert (found.image[inner[1] : inner[3], inner[0] : inner[2], channel] > 127).all()


# Draws


@pytest.fixture
def dataset(coco):
    return load_coco_dataset("test_augmentations_pets", *coco.files)


STRONG = dict(
    augmentation=[
        T.RandomFlip(),
        LargeScaleJitter([24, 32], 60, "choice"),
        *PIXELS,
        RandomRotate(),
    ],
    combinations=[Mosaic(0.5), MixUp(0.5), CopyBoxes(0.5)],
    closing_augmentation=[T.ResizeShortestEdge([30], sample_style="choice")],
)


def loader(dataset, mapper=None, **options):
    mapper = mapper or DetrDatasetMapper(**STRONG)
    options = {"total_batch_size": 2, "num_workers": 0, "seed": 3, "max_iter": 12} | options
    return build_train_loader(dataset, mapper=mapper, **{"closing": 0.25} | options)


def plain(batches):
    return [
        (item["file_name"], item["image"].tolist(), item["instances"].gt_boxes.tensor.tolist(),
         item["instances"].gt_classes.tolist()) for batch in batches for item in batch
    ]  # fmt: skip


def take(iterable, count):
    return list(itertools.islice(iterable, count))


def test_draws_are_the_same_with_any_number_of_workers_and_after_resuming(dataset):
    whole = plain(take(loader(dataset), 12))
    assert plain(take(loader(dataset), 12)) == whole
    assert plain(take(loader(dataset, num_workers=2), 12)) == whole
    for start in (5, 10):
        resumed = loader(dataset)
        set_start_iteration(resumed, start)
        assert plain(take(resumed, 12 - start)) == whole[2 * start :]
    assert plain(take(loader(dataset, seed=4), 12)) != whole


def test_a_picture_that_is_combined_keeps_the_name_and_the_size_of_the_first(dataset):
    stream = loader(dataset).dataset.dataset
    plain_stream = TrainStream(dataset, lambda record: record, seed=3)
    counts = []
    for draw in range(10):
        one, record = stream[draw], plain_stream[draw]
        assert one["file_name"] == record["file_name"] and one["image_id"] == record["image_id"]
        assert (one["height"], one["width"]) == (record["height"], record["width"])
        assert max(one["image"].shape) <= 60
        counts.append(len(one["instances"]))
    assert max(counts) > 3  # of one picture


def test_companions_that_cannot_be_read_are_replaced_alike(dataset, caplog):
    broken = {dataset[2]["file_name"], dataset[7]["file_name"]}
    for name in broken:
        open(name, "w").close()
    with caplog.at_level(logging.WARNING, logger="stage_interactor"):
        whole = plain(take(loader(dataset), 12))
    assert {name for name, *_ in whole}.isdisjoint(broken)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("takes its place" in message for message in messages)
    assert plain(take(loader(dataset, num_workers=2), 12)) == whole
    resumed = loader(dataset)
    set_start_iteration(resumed, 5)
    assert plain(take(resumed, 7)) == whole[10:]


def test_a_storage_that_fails_for_companions_alone_stops_the_training(dataset):
    names = [record["file_name"] for record in dataset]
    mapped = []

    def mapper(record, draw):
        mapped.append(record)

        def read(other):
            raise ImageReadError(other["file_name"], "gone")

        return draw.other(read)

    with pytest.raises(ImageReadError, match=f"{min(10, len(names))} images in a row .*gone"):
        TrainStream(dataset, mapper, seed=0)[0]
    assert len(mapped) == 1  # which could be read: no other takes its place


def test_a_companion_that_cannot_be_read_is_not_tried_twice(dataset):
    def mapper(record, draw):
        return {"other": draw.other(read)}

    def read(record):
        if record["file_name"] != dataset[1]["file_name"]:
            raise ImageReadError(record["file_name"], "gone")
        return record["image_id"]

    stream = TrainStream(dataset[:3], mapper, seed=0)
    assert {stream[draw]["other"] for draw in range(40)} == {dataset[1]["image_id"]}


def test_others_are_drawn_from_all_of_the_data_and_one_picture_is_enough(dataset):
    def mapper(record, draw):
        return {"other": draw.other(operator.itemgetter("file_name")), "draw": draw.number}

    stream = TrainStream(dataset, mapper, seed=0)
    found = {stream[draw]["other"] for draw in range(100)}
    assert found == {record["file_name"] for record in dataset} and stream[7]["draw"] == 7
    alone = TrainStream(dataset[:1], DetrDatasetMapper(**STRONG), seed=0)
    assert len([alone[draw] for draw in range(6)]) == 6


def test_a_mapper_of_ones_own_is_given_the_record_alone(dataset):
    stream = TrainStream(dataset, lambda record: {"got": record["image_id"]}, seed=0)
    assert sorted(stream[draw]["got"] for draw in range(len(dataset))) == sorted(
        record["image_id"] for record in dataset
    )
    partial = functools.partial(lambda record, other, draw: {"closing": draw.closing}, other=1)
    assert TrainStream(dataset, partial, seed=0)[3] == {"closing": False}


def test_without_a_draw_nothing_is_left_out_silently(dataset):
    with pytest.raises(ValueError, match="needs a loader of build_train_loader"):
        DetrDatasetMapper(**STRONG)(dataset[0])

    class Own(DetrDatasetMapper):
        def __call__(self, record):
            return super().__call__(record)

    with pytest.raises(ValueError, match="needs a loader of build_train_loader"):
        next(iter(loader(dataset, Own(**STRONG))))


# The last part


def closed(batches):
    """For each iteration whether its pictures are as closing_augmentation leaves them."""
    return [all(min(item["image"].shape[1:]) == 30 for item in batch) for batch in batches]


def marked(record, draw):
    return {"closing": draw.closing, "draw": draw.number, **record}


@dataclass
class Flipped(Combination):
    """Of one's own, as a dataclass."""

    prob: float = 1.0


def test_combinations_of_a_config_are_those_of_python(dataset):
    """A list of a config makes configs of dataclasses that it is given."""
    flip = L(T.RandomFlip)()
    of_config = instantiate(
        L(DetrDatasetMapper)(
            augmentation=[flip],
            combinations=[L(Mosaic)(prob=1.0), L(MixUp)(prob=0.5), L(CopyBoxes)(max_objects=2)],
        )
    )
    combinations = [Mosaic(prob=1.0), MixUp(prob=0.5), CopyBoxes(max_objects=2)]
    assert [*map(repr, of_config.combinations)] == [*map(repr, combinations)]
    of_python = DetrDatasetMapper(augmentation=[T.RandomFlip()], combinations=combinations)
    streams = [loader(dataset, mapper).dataset.dataset for mapper in (of_config, of_python)]
    for draw in range(12):
        image, other = (stream[draw] for stream in streams)
        assert torch.equal(image["image"], other["image"])
    own = DetrDatasetMapper(augmentation=[], combinations=[Flipped()])
    assert [*own.combinations] == [Flipped()]
    with pytest.raises(ValueError, match="cannot be called; .* of classes that are no dataclasses"):
        instantiate(L(DetrDatasetMapper)(augmentation=[], combinations=[L(Flipped)()]))


def test_the_last_share_of_the_iterations_closes(dataset):
    options = {"aspect_ratio_grouping": False}
    batches = take(loader(dataset, marked, **options), 14)
    assert [item["closing"] for batch in batches for item in batch] == [False] * 18 + [True] * 10
    assert closed(take(loader(dataset, **options), 12))[9:] == [True] * 3
    assert not all(closed(take(loader(dataset, **options), 9)))
    for closing, first in ((0.0, 99), (1.0, 0), (0.5, 6)):
        batches = take(loader(dataset, marked, closing=closing, **options), 12)
        assert [batch[0]["closing"] for batch in batches] == [n >= first for n in range(12)]


def test_the_last_part_combines_nothing(dataset):
    lists = dict(augmentation=STRONG["augmentation"][:1])
    combined = loader(dataset, DetrDatasetMapper(combinations=[Mosaic(1.0)], **lists), closing=0.5)
    alone = loader(dataset, DetrDatasetMapper(**lists), aspect_ratio_grouping=False)
    streams = combined.dataset.dataset, alone.dataset.dataset
    for draw in (0, 5, 11):
        assert not torch.equal(*(stream[draw]["image"] for stream in streams))
    for draw in (12, 13, 40):
        assert torch.equal(*(stream[draw]["image"] for stream in streams))


def test_the_last_part_begins_at_its_iteration_whatever_batches_were_before(dataset):
    resumed = loader(dataset, marked, aspect_ratio_grouping=False)  # of 2; from iteration 9 of 12
    set_start_iteration(resumed, 6, [Part(6, 5, 1, False)])  # of 5 until 6
    batches = take(resumed, 6)
    assert batches[0][0]["draw"] == 30
    assert [batch[0]["closing"] for batch in batches] == [False] * 3 + [True] * 3
    resumed = loader(dataset, marked, aspect_ratio_grouping=False)
    set_start_iteration(resumed, 11, [Part(11, 5, 1, False)])  # within it
    assert next(iter(resumed))[0]["closing"]


def test_a_last_part_that_never_comes_is_told(dataset, caplog):
    loader(dataset, closing=0.0)
    assert "closing_augmentation is never used" in caplog.text
    with pytest.raises(ValueError, match="closing must be a share from 0 to 1, got 1.5"):
        loader(dataset, closing=1.5)
    with pytest.raises(ValueError, match="closing=0.25 is a share of max_iter, which is not given"):
        loader(dataset, max_iter=None)


# What a config says


def configured(coco, *overrides, name="custom/nano.py"):
    files = dict(zip(("json", "root"), coco.files))
    return load_config(
        name,
        [f"data.train_json={files['json']}", f"data.val_json={files['json']}",
         f"data.image_root={files['root']}", "dataloader.train.num_workers=0",
         "dataloader.train.total_batch_size=2", "train.max_iter=20",
         "data.name=test_augmentations_configured", *overrides],
    )  # fmt: skip


def names_of(augmentation):
    return [type(aug).__name__ for aug in augmentation.augs]


@pytest.mark.parametrize("preset", ["nano", "small", "base", "large"])
def test_named_choices_keep_the_sizes_of_a_preset(coco, preset):
    def mapper(*overrides):
        cfg = configured(coco, *overrides, name=f"custom/{preset}.py")
        return instantiate(cfg.dataloader.train.mapper)

    own = mapper()
    assert names_of(own.augmentation) == ["RandomFlip", "ResizeShortestEdge"]
    assert not own.combinations
    sides = "dataloader.train.mapper.augmentation.1.short_edge_length=[123]"
    none = mapper("data.augmentation=none", "dataloader.test.mapper.augmentation.0.max_size=321")
    assert names_of(none.augmentation) == ["ResizeShortestEdge"] and not none.combinations
    assert none.augmentation.augs[0].max_size == 321 and none.augmentation_with_crop is None
    light = mapper("data.augmentation=light", sides)
    assert names_of(light.augmentation) == ["RandomFlip", "ResizeShortestEdge", "ColorJitter"]
    assert not light.combinations and list(light.augmentation.augs[1].short_edge_length) == [123]
    strong = mapper("data.augmentation=strong", sides)
    assert names_of(strong.augmentation)[:3] == ["RandomFlip", "LargeScaleJitter", "ColorJitter"]
    jitter = strong.augmentation.augs[1]
    assert list(jitter.short_edge_length) == [123]
    assert jitter.max_size == own.augmentation.augs[1].max_size
    assert [type(item) for item in strong.combinations] == [Mosaic, MixUp]
    crop = own.augmentation_with_crop
    for chosen in (light, strong):
        assert (chosen.augmentation_with_crop is None) == (crop is None)
        assert crop is None or names_of(chosen.augmentation_with_crop)[:4] == names_of(crop)


def test_a_choice_of_none_is_what_the_config_was(coco):
    """Pictures to the bit: nothing draws a random number more."""
    own = configured(coco).dataloader.train
    without = configured(coco).dataloader.train
    for key in ("closing", "max_iter"):
        del without[key]
    for key in ("policy", "plain", "flip"):
        del without.mapper[key]
    assert plain(take(instantiate(own), 8)) == plain(take(instantiate(without), 8))


def orientation(record, mapped):
    """(left and right, top and bottom) of a picture of one object: which have changed places."""
    (box,) = mapped["instances"].gt_boxes.tensor.tolist()
    height, width = mapped["image"].shape[1:]
    assert (height, width) == (record["height"], record["width"])
    left, top, right, bottom = record["annotations"][0]["bbox"]
    mirrored, inverted = box[0] != left, box[1] != top
    if mirrored:
        left, right = width - right, width - left
    if inverted:
        top, bottom = height - bottom, height - top
    assert box == [left, top, right, bottom]
    bright = mapped["image"].float().mean(0) > mapped["image"].float().mean()  # in any colours
    inside = bright[int(top) : int(bottom), int(left) : int(right)]
    assert bool(inside.all()) and int(bright.sum()) == inside.numel()
    return mirrored, inverted


@pytest.mark.parametrize(
    ("flip", "seen"),
    [
        (None, {(False, False), (True, False)}),
        ("none", {(False, False)}),
        ("horizontal", {(False, False), (True, False)}),
        ("vertical", {(False, False), (False, True)}),
        ("both", {(False, False), (True, False), (False, True), (True, True)}),
    ],
)
@pytest.mark.parametrize("policy", [None, "light", "strong"])
def test_flips_are_those_that_were_asked_for(tmp_path, flip, seen, policy):
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[3:9, 5:17] = 255
    Image.fromarray(pixels).save(tmp_path / "one.png")
    box = {"bbox": [5, 3, 17, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "one.png"), "image_id": 1, "height": 30, "width": 40,
              "annotations": [box]}  # fmt: skip
    resize = T.ResizeShortestEdge(30, 100)
    lists = dict(
        augmentation=[T.RandomFlip(), resize], augmentation_with_crop=[resize, T.RandomFlip()]
    )
    mapper = DetrDatasetMapper(**lists, policy=policy, flip=flip)
    if policy == "strong":  # sizes and combinations aside
        opening, names = mapper.augmentation, names_of(mapper.augmentation_with_crop)
        flips = [aug for aug in opening.augs if isinstance(aug, T.RandomFlip)]
        assert len(flips) == names.count("RandomFlip") == {"none": 0, "both": 2}.get(flip, 1)
        mapper = DetrDatasetMapper(augmentation=flips, flip=flip)
    np.random.seed(0)
    assert {orientation(record, mapper(record)) for _ in range(60)} == seen


def test_other_flips_change_nothing_else(coco):
    train = configured(coco).dataloader.train
    own = plain(take(instantiate(train), 8))
    train.mapper.flip = "horizontal"
    assert plain(take(instantiate(train), 8)) == own
    large = configured(coco, "data.flip=both", name="custom/large.py").dataloader.train.mapper
    mapper = instantiate(large)
    for augmentation in (mapper.augmentation, mapper.augmentation_with_crop):
        assert names_of(augmentation)[:3] == ["RandomFlip", "RandomFlip", "ResizeShortestEdge"]
    evaluated = configured(coco, "data.flip=both", "data.augmentation=none")
    flips = names_of(instantiate(evaluated.dataloader.train.mapper).augmentation)
    assert flips == ["RandomFlip", "RandomFlip", "ResizeShortestEdge"]
    closing = DetrDatasetMapper(
        augmentation=[], closing_augmentation=[T.RandomFlip()], flip="none", plain=None
    )
    assert closing._closing.augmentation.augs == [] == closing.augmentation.augs
    evaluation = DetrDatasetMapper(augmentation=[], is_train=False, flip="both")
    assert evaluation.augmentation.augs == []


def test_fast_decoding_goes_with_flips(coco, caplog):
    key = "dataloader.train.mapper.decode=fast"
    mapper = instantiate(configured(coco, "data.flip=both", key).dataloader.train.mapper)
    assert mapper.fast and "decode=fast is not for" not in caplog.text


def test_strong_ends_light_and_its_saved_config_trains_alike(coco, tmp_path):
    cfg = configured(coco, "data.augmentation=strong", "data.closing=0.5")
    save_config(cfg, tmp_path / "config.yaml")
    batches = take(instantiate(cfg.dataloader.train), 20)
    again = load_config(tmp_path / "config.yaml")
    assert plain(take(instantiate(again.dataloader.train), 20)) == plain(batches)
    shorter = load_config(tmp_path / "config.yaml", ["train.max_iter=10"])
    assert plain(take(instantiate(shorter.dataloader.train), 3)) == plain(batches[:3])
    of_shorter = take(instantiate(shorter.dataloader.train), 10)[7:]
    assert plain(of_shorter) != plain(batches[7:10])  # it closes at half of its own length
    sides = [min(item["image"].shape[1:]) for batch in batches for item in batch]
    of_preset = {224, 240, 256, 272, 288}
    assert set(sides[24:]) <= of_preset and not set(sides[:16]) <= of_preset
    light = configured(coco, "data.augmentation=light")
    assert plain(take(instantiate(light.dataloader.train), 20))[24:] == plain(batches)[24:]


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_strong_pictures_are_the_same_in_either_order_of_channels(coco, order):
    key = "dataloader.train.mapper.image_format"
    cfg = configured(coco, "data.augmentation=strong", f"{key}={order}")
    rgb = configured(coco, "data.augmentation=strong")
    found, expected = (take(instantiate(c.dataloader.train), 6) for c in (cfg, rgb))
    for batch, other in zip(found, expected):
        for item, of_rgb in zip(batch, other):
            image = item["image"].flip(0) if order == "BGR" else item["image"]
            assert torch.equal(image, of_rgb["image"])


@pytest.mark.parametrize("level", ["light", "strong"])
def test_fast_decoding_gives_way_and_says_so(coco, caplog, level):
    key = "dataloader.train.mapper.decode=fast"
    cfg = configured(coco, f"data.augmentation={level}", key)
    with caplog.at_level(logging.WARNING):
        fast = plain(take(instantiate(cfg.dataloader.train), 3))
    assert "decode=fast is not for " in caplog.text and "ColorJitter" in caplog.text
    assert ("Mosaic" in caplog.text) == (level == "strong")
    exact = configured(coco, f"data.augmentation={level}")
    assert plain(take(instantiate(exact.dataloader.train), 3)) == fast


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.augmentation=strongest", r"^data.augmentation must be one of \['none', 'light', 's"),
        ("data.closing=1.5", "^data.closing must be a number from 0 to 1, got 1.5"),
        ("dataloader.train.mapper.combinations=[1]", "combinations must be a list"),
        ("dataloader.train.mapper.policy=null", "it must say .{data.augmentation}"),
        ("data.flip=upside-down", r"flip must be one of \['none', 'horizontal', 'vertical', 'both"),
        ("data.flip=true", "flip must be one of"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_told(coco, override, told):
    cfg = configured(coco, "data.augmentation=light", override)
    with pytest.raises(ConfigError, match=told):
        check_settings(cfg, 1)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ColorJitter(prob=2), "ColorJitter: prob must be a number from 0 to 1, got 2"),
        (lambda: ColorJitter(10**400), "ColorJitter: brightness must be a number of 0 or more"),
        (lambda: ColorJitter(-1), "ColorJitter: brightness must be a number of 0 or more, got -1"),
        (lambda: ColorJitter(hue=0.6), "ColorJitter: hue must be a number from 0 to 0.5, got 0.6"),
        (lambda: ColorJitter(image_format="HSV"), "image_format must be 'RGB' or 'BGR', got 'HSV'"),
        (lambda: GaussianBlur((2, 1)), r"sigma must be \(min, max\), numbers of 0 or more"),
        (lambda: GaussianBlur(3), r"sigma must be \(min, max\), numbers of 0 or more, got 3"),
        (lambda: LargeScaleJitter(80, min_scale=0), "min_scale must be a number from 0.01 to 100"),
        (lambda: LargeScaleJitter(80, min_scale=2, max_scale=1), "max_scale must be .*got 1"),
        (lambda: LargeScaleJitter(80, min_visible=float("nan")), "min_visible must be .*got nan"),
        (lambda: RandomRotation90(0.5, [4]), r"turns must be some of 1, 2 and 3, got \[4\]"),
        (lambda: RandomRotation90(0.5, []), r"turns must be some of 1, 2 and 3, got \[\]"),
        (lambda: RandomRotate(90), "degrees must be a number from 0 to 45, got 90"),
        (lambda: RandomRotate(fill=-1), "fill must be a number from 0 to 255, got -1"),
        (lambda: Mosaic(zoom=(0.5, 1)), "Mosaic: zoom must be .*numbers from 1 to 10"),
        (lambda: Mosaic(prob="often"), "Mosaic: prob must be a number from 0 to 1, got 'often'"),
        (lambda: MixUp(alpha=0), "MixUp: alpha must be a number of 0.01 or more, got 0"),
        (lambda: CopyBoxes(max_objects=0), "max_objects must be a number of 1 or more, got 0"),
        (lambda: DetrDatasetMapper(augmentation=[], policy="strong"), "ResizeShortestEdge, and"),
        (lambda: DetrDatasetMapper(augmentation=[], policy="none"), "none needs 'plain'"),
        (lambda: DetrDatasetMapper(augmentation=[], policy="more"), "or null, got 'more'"),
        (lambda: DetrDatasetMapper(augmentation=[], flip="up"), "or null, got 'up'"),
        (lambda: DetrDatasetMapper(augmentation=[T.AugmentationList([T.RandomFlip()])],
                                   flip="none"), "one lies in AugmentationList: take it out"),
        (lambda: DetrDatasetMapper(augmentation=[], policy="light", combinations=[MixUp()]),
         "augmentation=light has combinations and a last part of its own"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_a_line(make, told):
    with pytest.raises(ValueError, match=told) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_evaluation_is_never_augmented(tmp_path):
    record = recorded(drawn((30, 40)), tmp_path / "drawn.png")
    mapper = DetrDatasetMapper(augmentation=[], is_train=False, combinations=[Mosaic(1.0)],
                               policy="strong")  # fmt: skip
    assert mapper(record)["image"].shape == (3, 30, 40)


def test_the_commands_take_a_choice(coco, tmp_path, capsys):
    data = str(coco.image_root.parent)
    out = ["--output-dir", str(tmp_path / "out")]
    command = ["train", data, "--preset", "nano", "--dry-run", *out, "--augmentation", "strong"]
    assert main(command) == 0
    assert "data.augmentation=strong" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command[:-1], "strongest"])
    assert main([*command, "--flip", "both"]) == 0
    assert "data.flip=both" in capsys.readouterr().out
    for flag, value in (("--augmentation", "light"), ("--flip", "none")):
        assert main(["train", "--config-file", "quickstart.py", flag, value]) == 2
        assert f"{flag}: for data of your own" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--flip must be one of .*got 'up'"):
        fit_to_data(data, preset="nano", flip="up")


@pytest.mark.parametrize("level", ["none", "light", "strong"])
def test_a_view_shows_the_pictures_of_a_choice(coco, tmp_path, level):
    page = tmp_path / "page.html"
    assert main(["data", "view", str(coco.image_root.parent), "--augmentation", level,
                 "--output", str(page)]) == 0  # fmt: skip
    text = page.read_text()
    assert text.count("<img") >= 10 and ("Mosaic" in text) == (level == "strong")
    assert ("ColorJitter" in text) == (level != "none")
    main(["data", "view", str(coco.image_root.parent), "--augmentation", level, "--flip", "both",
          "--output", str(page)])  # fmt: skip
    assert page.read_text().count("RandomFlip") > text.count("RandomFlip")


def test_a_view_shows_a_choice_of_any_config(coco, tmp_path, capsys):
    command = ["data", "view", str(coco.image_root.parent), "--output", str(tmp_path / "page.html"),
               "--config-file", "stage_interactor_r50_100q_12ep", "--augmentation"]  # fmt: skip
    assert main([*command, "strong"]) == 0
    assert "LargeScaleJitter" in (tmp_path / "page.html").read_text()
    assert main([*command, "none"]) == 2
    assert "augmentation=none needs 'plain'" in capsys.readouterr().err
    command[command.index("--config-file") + 1] = "quickstart.py"
    assert main([*command, "strong"]) == 2
    assert "there is none in the mapper's augmentation" in capsys.readouterr().err
