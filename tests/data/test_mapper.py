"""The mapper: boxes stay on the pixels they mark, and damaged images are named."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor.d2 import transforms as T
from stage_interactor.d2.data import build_detection_test_loader, detection_utils
from stage_interactor.d2.structures import BoxMode
from stage_interactor.data import DetrDatasetMapper, ImageReadError

HEIGHT, WIDTH = 80, 120
BOXES = [[10, 20, 24, 16], [60, 40, 40, 30], [95, 5, 20, 20]]  # xywh
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
CROP = [
    T.ResizeShortestEdge([60, 80], max_size=1000, sample_style="choice"),
    T.RandomCrop("absolute_range", (30, 60)),
    T.ResizeShortestEdge([64, 96], max_size=200, sample_style="choice"),
]


@pytest.fixture
def record(tmp_path):
    """Three rectangles in pure colours on black, their boxes, and a crowd over everything."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    annotations = []
    for index, ((x, y, w, h), colour) in enumerate(zip(BOXES, COLOURS)):
        image[y : y + h, x : x + w] = colour
        annotations.append(
            {"bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": index}
        )
    annotations.append(
        {
            "bbox": [0, 0, WIDTH, HEIGHT],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "iscrowd": 1,
        }
    )
    file_name = tmp_path / "boxes.png"
    Image.fromarray(image).save(file_name)
    return {
        "file_name": str(file_name),
        "image_id": 17,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": annotations,
    }


def _visible_box(image, index):
    """xyxy around the pixels of one colour, or None."""
    others = [channel for channel in range(3) if channel != index]
    pixels = image.numpy()
    ys, xs = np.nonzero((pixels[index] > 127) & (pixels[others].max(axis=0) < 127))
    if len(xs) == 0:
        return None
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_training_gives_image_boxes_and_the_size_of_the_file(record):
    mapper = DetrDatasetMapper(augmentation=[T.ResizeShortestEdge([160], sample_style="choice")])
    result = mapper(record)
    assert result["image"].shape == (3, 160, 240) and result["image"].dtype == torch.uint8
    assert set(result) == {"image", "instances", "height", "width", "file_name", "image_id"}
    assert (result["height"], result["width"], result["image_id"]) == (HEIGHT, WIDTH, 17)
    expected = [[2 * x, 2 * y, 2 * (x + w), 2 * (y + h)] for x, y, w, h in BOXES]
    assert result["instances"].gt_boxes.tensor.tolist() == expected
    assert result["instances"].gt_classes.tolist() == [0, 1, 2]  # without the crowd
    assert result["instances"].image_size == (160, 240)


def test_evaluation_gives_no_ground_truth_and_never_crops(record):
    mapper = DetrDatasetMapper(augmentation=[], augmentation_with_crop=CROP, is_train=False)
    for _ in range(8):
        result = mapper(record)
        assert result["image"].shape == (3, HEIGHT, WIDTH)
        assert set(result) == {"image", "height", "width", "file_name", "image_id"}


def test_mapping_does_not_change_the_record(record):
    before = pickle.dumps(record)
    mapper = DetrDatasetMapper(augmentation=[T.RandomFlip(prob=1.0)], augmentation_with_crop=CROP)
    first = mapper(record)
    first["image"][:] = 0  # writable, and not shared
    assert pickle.dumps(record) == before


def test_boxes_stay_on_their_pixels_through_flip_resize_and_crop(record):
    mapper = DetrDatasetMapper(
        augmentation=[T.RandomFlip(prob=1.0)], augmentation_with_crop=[T.RandomFlip(), *CROP]
    )
    np.random.seed(0)
    sizes, counts = [], []
    for _ in range(60):
        result = mapper(record)
        sizes.append(tuple(result["image"].shape[1:]))
        instances = result["instances"]
        counts.append(len(instances))
        for box, label in zip(instances.gt_boxes.tensor.numpy(), instances.gt_classes.tolist()):
            visible = _visible_box(result["image"], label)
            if visible is None:  # a sliver of less than a pixel
                assert min(box[2] - box[0], box[3] - box[1]) < 2.5
            else:
                assert np.abs(visible - box).max() < 2.5
        for label in set(range(3)) - set(instances.gt_classes.tolist()):
            assert _visible_box(result["image"], label) is None
        limits = torch.tensor([*instances.image_size[::-1]] * 2)
        assert (instances.gt_boxes.tensor >= 0).all() and (
            instances.gt_boxes.tensor <= limits
        ).all()
    cropped = [size != (HEIGHT, WIDTH) for size in sizes]
    assert 15 < sum(cropped) < 45  # one half of the images
    assert min(counts) < 3 and max(counts) == 3  # a crop loses objects


@pytest.mark.parametrize("kind", ["floats", "integers", "tuples"])
def test_boxes_have_the_bits_of_detectron2_functions_for_one_annotation(record, kind):
    rng = np.random.default_rng(3)
    annotations = []
    for index in range(40):
        box = rng.uniform(-30, 90, 4) if kind != "integers" else rng.integers(-30, 90, 4)
        mode = BoxMode.XYWH_ABS if index % 3 else BoxMode.XYXY_ABS
        box = tuple(box.tolist()) if kind == "tuples" else box.tolist()
        annotations.append({"bbox": box, "bbox_mode": mode, "category_id": index})
    record["annotations"] = annotations
    augmentation = [T.RandomFlip(prob=1.0), T.ResizeShortestEdge([53], sample_style="choice")]
    result = DetrDatasetMapper(augmentation=augmentation)(record)["instances"]

    aug_input = T.AugInput(detection_utils.read_image(record["file_name"], "RGB"))
    transforms = T.AugmentationList(augmentation)(aug_input)
    size = aug_input.image.shape[:2]
    one_by_one = [
        # Integers would stay some when they are resized, cut off.
        {**item, "bbox": [float(value) for value in item["bbox"]]}
        for item in annotations
    ]
    for item in one_by_one:
        detection_utils.transform_instance_annotations(item, transforms, size)
    expected = detection_utils.annotations_to_instances(one_by_one, size)
    expected = detection_utils.filter_empty_instances(expected)
    assert torch.equal(result.gt_boxes.tensor, expected.gt_boxes.tensor)
    assert torch.equal(result.gt_classes, expected.gt_classes)
    assert result.image_size == expected.image_size and 0 < len(result) < 40


def test_an_image_without_objects_gives_empty_instances(record):
    record["annotations"] = []
    instances = DetrDatasetMapper(augmentation=[])(record)["instances"]
    assert instances.gt_boxes.tensor.shape == (0, 4) and len(instances.gt_classes) == 0


def test_the_order_of_channels(record):
    rgb = DetrDatasetMapper(augmentation=[], image_format="RGB")(record)["image"]
    bgr = DetrDatasetMapper(augmentation=[], image_format="BGR")(record)["image"]
    assert torch.equal(rgb, bgr.flip(0))
    assert rgb[:, 25, 15].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match="'CMYK'"):
        DetrDatasetMapper(augmentation=[], image_format="CMYK")


def _truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _empty(path):
    path.write_bytes(b"")


def _text(path):
    path.write_text("<html>404</html>")


@pytest.mark.parametrize("damage", [_truncate, _empty, _text, lambda path: path.unlink()])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_damaged_image_is_named(record, tmp_path, damage, suffix):
    path = tmp_path / f"damaged{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    damage(path)
    with pytest.raises(ImageReadError, match=f"damaged{suffix}: .*replace the file") as caught:
        DetrDatasetMapper(augmentation=[])({**record, "file_name": str(path)})
    assert caught.value.file_name == str(path) and caught.value.reason
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_stops_at_a_damaged_image_and_names_it(record, tmp_path, num_workers):
    _text(tmp_path / "boxes.png")
    mapper = DetrDatasetMapper(augmentation=[], is_train=False)
    loader = build_detection_test_loader([record], mapper=mapper, num_workers=num_workers)
    with pytest.raises(ImageReadError, match="boxes.png"):
        list(loader)


def test_another_size_than_annotated_is_an_error(record):
    record["height"], record["width"] = WIDTH, HEIGHT
    with pytest.raises(ValueError, match="boxes.png is 120 x 80 .* annotation says 80 x 120"):
        DetrDatasetMapper(augmentation=[])(record)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
@pytest.mark.parametrize("is_train", [True, False])
def test_an_image_of_one_pixel_in_height_or_width_is_mapped_with_its_boxes(
    tmp_path, size, is_train
):
    height, width = size
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "strip.png")
    box = [0, 0, width // 2 or 1, height // 2 or 1]
    item = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "strip.png"), "annotations": [item]}
    resize = T.ResizeShortestEdge([256], max_size=256, sample_style="choice")
    mapper = DetrDatasetMapper(
        augmentation=[T.RandomFlip(0.0), resize],
        augmentation_with_crop=[resize, T.RandomCrop("absolute_range", (384, 600)), resize],
        is_train=is_train,
    )
    for _ in range(4):
        result = mapper(record | {"height": height, "width": width})
        assert sorted(result["image"].shape) == [1, 3, 256]
        if is_train:
            assert len(result["instances"]) == 1


@pytest.mark.parametrize("mode", [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS])
@pytest.mark.parametrize("box", [[[1, 2, 30, 40]], [5], [], [1, 2, 3], [1, 2, 3, 4, 5], None])
def test_a_box_of_another_number_of_numbers_is_named(record, mode, box):
    record["annotations"][1] = {"bbox": box, "bbox_mode": mode, "category_id": 0}
    with pytest.raises(ValueError, match=r"boxes\.png, annotation 1: bbox must be 4 numbers, got "):
        DetrDatasetMapper(augmentation=[])(record)
