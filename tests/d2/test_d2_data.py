"""Catalogues, annotations, augmentations and loaders, on whichever runtime is there."""

import itertools
import json

import numpy as np
import pytest
import torch
from fvcore.transforms.transform import NoOpTransform
from PIL import Image

from stage_interactor.d2 import transforms as T
from stage_interactor.d2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    detection_utils,
    get_detection_dataset_dicts,
    register_coco_instances,
)
from stage_interactor.d2.structures import BoxMode


@pytest.fixture
def dataset(coco_files, request):
    name = f"shapes_{request.node.name}"
    register_coco_instances(name, {"note": "test"}, *coco_files)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def take_ids(loader, batches):
    return [[r["image_id"] for r in batch] for batch in itertools.islice(loader, batches)]


def test_coco_2017_is_registered_with_its_eighty_classes():
    for split in ("train", "val", "test-dev", "val_100"):
        metadata = MetadataCatalog.get(f"coco_2017_{split}")
        assert f"coco_2017_{split}" in DatasetCatalog
        assert len(metadata.thing_classes) == 80 and metadata.evaluator_type == "coco"
        assert metadata.thing_classes[79] == "toothbrush"
        assert metadata.thing_dataset_id_to_contiguous_id[90] == 79
    metadata = MetadataCatalog.get("coco_2017_train")
    assert metadata.json_file.endswith("coco/annotations/instances_train2017.json")
    assert metadata.image_root.endswith("coco/train2017")


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(KeyError, match="coco_2017_val"):
        DatasetCatalog.get("coco_2071_val")


def test_a_name_is_registered_once(dataset):
    with pytest.raises((ValueError, AssertionError), match=dataset):
        DatasetCatalog.register(dataset, list)


def test_metadata_are_attributes_that_cannot_change(dataset):
    metadata = MetadataCatalog.get(dataset)
    assert metadata.note == "test" and metadata.get("absent", 3) == 3
    assert metadata.set(colour="red") is metadata and metadata.colour == "red"
    with pytest.raises((ValueError, AssertionError), match="colour"):
        metadata.colour = "blue"
    with pytest.raises(AttributeError, match="absent"):
        _ = metadata.absent


def test_annotations_are_read_with_contiguous_classes(dataset, coco_files):
    records = DatasetCatalog.get(dataset)
    content = json.loads(open(coco_files[0]).read())
    assert [r["image_id"] for r in records] == list(range(1, 13))
    assert MetadataCatalog.get(dataset).thing_classes == ["disc", "square", "ring"]
    assert MetadataCatalog.get(dataset).thing_dataset_id_to_contiguous_id == {2: 0, 5: 1, 9: 2}
    read = [a for r in records for a in r["annotations"]]
    assert [a["bbox"] for a in read] == [a["bbox"] for a in content["annotations"]]
    assert {a["category_id"] for a in read} == {0, 1, 2}
    assert all(a["bbox_mode"] == BoxMode.XYWH_ABS for a in read)
    assert sum("segmentation" in a for a in read) == 2


@pytest.mark.parametrize(
    "change, error",
    [
        ({"category_id": 77}, "77"),
        ({"bbox": []}, "bbox"),
        ({"id": 2}, "unique"),
        ({"ignore": 1}, "ignore"),
    ],
)
def test_a_wrong_annotation_is_refused(coco_files, tmp_path, change, error):
    content = json.loads(open(coco_files[0]).read())
    content["annotations"][0].update(change)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    name = f"wrong_{error}"
    register_coco_instances(name, {}, str(path), "images")
    with pytest.raises((KeyError, ValueError, AssertionError), match=error):
        DatasetCatalog.get(name)


def test_images_without_objects_are_left_out_for_training(dataset):
    kept = get_detection_dataset_dicts(dataset)
    assert sorted({*range(1, 13)} - {r["image_id"] for r in kept}) == [4, 7]
    assert len(get_detection_dataset_dicts([dataset], filter_empty=False)) == 12


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_of_training_has_every_image_once(dataset, num_workers):
    records = get_detection_dataset_dicts(dataset)  # 10 images
    loader = build_detection_train_loader(
        records, mapper=None, total_batch_size=2, aspect_ratio_grouping=False,
        num_workers=num_workers,
    )  # fmt: skip
    ids = sum(take_ids(loader, 10), [])
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(r["image_id"] for r in records)
    assert loader.dataset.sampler is not None


def test_grouped_batches_are_all_wide_or_all_high(dataset):
    loader = build_detection_train_loader(
        get_detection_dataset_dicts(dataset), mapper=None, total_batch_size=3
    )
    for batch in itertools.islice(loader, 12):
        assert len({record["width"] > record["height"] for record in batch}) == 1


def test_a_sampler_of_our_own_decides_the_order(dataset):
    class Backwards(torch.utils.data.Sampler):
        def __iter__(self):
            return iter(range(11, -1, -1))

        def __len__(self):
            return 12

    loader = build_detection_train_loader(
        get_detection_dataset_dicts(dataset, filter_empty=False), mapper=None, sampler=Backwards(),
        total_batch_size=4, aspect_ratio_grouping=False,
    )  # fmt: skip
    assert take_ids(loader, 5) == [[12, 11, 10, 9], [8, 7, 6, 5], [4, 3, 2, 1]]
    assert isinstance(loader.dataset.sampler, Backwards)


def test_a_mapper_that_returns_none_gets_another_image(dataset):
    records = get_detection_dataset_dicts(dataset)
    loader = build_detection_train_loader(
        records, mapper=lambda r: None if r["image_id"] % 2 else r, total_batch_size=2,
        aspect_ratio_grouping=False,
    )  # fmt: skip
    ids = sum(take_ids(loader, 10), [])
    assert len(ids) == 20 and all(i % 2 == 0 for i in ids)


def test_the_test_loader_has_every_image_once_in_order(dataset):
    records = get_detection_dataset_dicts(dataset, filter_empty=False)
    loader = build_detection_test_loader(records, mapper=None, batch_size=5)
    assert len(loader) == 3
    assert sum(take_ids(loader, 99), []) == list(range(1, 13))


def test_records_may_be_changed_by_a_mapper_without_harm(dataset):
    records = get_detection_dataset_dicts(dataset, filter_empty=False)
    loader = build_detection_test_loader(records, mapper=lambda r: r["annotations"].clear() or r)
    assert all(not batch[0]["annotations"] for batch in loader)
    again = build_detection_test_loader(records, mapper=None)
    assert any(batch[0]["annotations"] for batch in again)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises((ValueError, AssertionError), match="0"):
        build_detection_train_loader([{}], mapper=None, total_batch_size=0)


def test_images_are_turned_upright_and_read_in_the_asked_order(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    rgb = detection_utils.read_image(str(tmp_path / "turned.png"), format="RGB")
    bgr = detection_utils.read_image(str(tmp_path / "turned.png"), format="BGR")
    assert np.array_equal(rgb, np.rot90(pixels, -1)) and np.array_equal(bgr, rgb[:, :, ::-1])
    with pytest.raises((ValueError, KeyError)):
        detection_utils.read_image(str(tmp_path / "turned.png"), format="RBG")


def test_transformed_boxes_stay_inside_the_image(dataset, box_mapper):
    mapper = box_mapper(detection_utils, T)
    for record in DatasetCatalog.get(dataset):
        mapped = mapper(record)
        height, width = mapped["image"].shape[:2]
        assert (mapped["boxes"] >= 0).all()
        assert (mapped["boxes"][:, 2:] <= [width, height]).all()
        assert mapped["boxes"].shape == (len(mapped["classes"]), 4)


def test_a_flip_moves_image_and_boxes_together():
    aug_input = T.AugInput(np.arange(8.0).reshape(2, 4, 1))
    applied = T.AugmentationList([T.RandomFlip(prob=1.0)])(aug_input)
    assert aug_input.image[0, :, 0].tolist() == [3, 2, 1, 0]
    assert applied.apply_box(np.array([[0.0, 0.0, 1.0, 2.0]])).tolist() == [[3, 0, 4, 2]]
    assert isinstance(applied, T.TransformList)


@pytest.mark.parametrize(
    "size, short, longest, expected",
    [((480, 640), 800, 1333, (800, 1067)), ((480, 960), 800, 1333, (667, 1333)),
     ((640, 480), 480, 1333, (640, 480))],
)  # fmt: skip
def test_the_shortest_edge_sets_the_size_until_the_longest_is_too_long(
    size, short, longest, expected
):
    assert T.ResizeShortestEdge.get_output_shape(*size, short, longest) == expected


THIN = {
    "resize": lambda: T.ResizeShortestEdge((800,), 1333, "choice"),
    "resize in a range": lambda: T.ResizeShortestEdge((20, 60), 77),
    "crop a share": lambda: T.RandomCrop("relative", (0.3, 0.3)),
    "crop a range of shares": lambda: T.RandomCrop("relative_range", (0.1, 0.1)),
    "crop absolute": lambda: T.RandomCrop("absolute_range", (384, 600)),
}


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 9000), (1, 1), (40, 60)])
@pytest.mark.parametrize("kind", THIN)
def test_a_thin_image_keeps_at_least_a_pixel(size, kind):
    augmentation = THIN[kind]()
    image = np.full((*size, 3), 200, np.uint8)
    for augmentations in ([augmentation], [T.AugmentationList([augmentation])]):
        np.random.seed(0)
        aug_input = T.AugInput(image)
        applied = T.AugmentationList(augmentations)(aug_input)
        height, width = aug_input.image.shape[:2]
        assert height >= 1 and width >= 1 and (aug_input.image == 200).all()
        box = applied.apply_box(np.array([[0, 0, *size[::-1]]], dtype=float))[0]
        assert np.isfinite(box).all() and (box[2:] > box[:2]).all()
        if "resize" in kind:
            assert box.tolist() == pytest.approx([0, 0, width, height])
    assert type(augmentation) in (T.ResizeShortestEdge, T.RandomCrop)  # which others may use


def test_augmentations_refuse_what_they_do_not_know():
    with pytest.raises((ValueError, AssertionError)):
        T.RandomCrop("wide", (1, 1))
    with pytest.raises((ValueError, AssertionError)):
        T.ResizeShortestEdge((1, 2, 3), sample_style="range")
    with pytest.raises(ValueError):
        T.RandomFlip(horizontal=True, vertical=True)


def test_an_augmentation_of_our_own_sees_the_image_that_the_last_one_left():
    class Keep(T.Augmentation):
        def get_transform(self, image):
            self.seen = image.shape
            return NoOpTransform()

    keep = Keep()
    T.AugmentationList([T.RandomCrop("absolute", (2, 3)), keep])(T.AugInput(np.zeros((4, 5, 3))))
    assert keep.seen == (2, 3, 3)


def test_category_ids_with_gaps_are_mentioned_in_the_log(dataset, logged):
    DatasetCatalog.get(dataset)
    assert "ategory ids" in "".join(logged)
