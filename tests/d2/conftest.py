"""A small data set in COCO's format, images and all, for the tests of both runtimes."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

CLASSES = {2: "disc", 5: "square", 9: "ring"}  # ids with gaps, as COCO's


def write_dataset(folder, num_images=12, seed=0, scale=1):
    """Write ``num_images`` wide and high noise images and their annotations; return the paths."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for image_id in range(1, num_images + 1):
        height, width = (48 * scale, 64 * scale) if image_id % 3 else (72 * scale, 40 * scale)
        name = f"{image_id:04d}.png"
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for _ in range(0 if image_id == 4 else rng.integers(1, 6)):  # image 4 is empty
            x, y = rng.uniform(0, width - 12), rng.uniform(0, height - 12)
            w, h = rng.uniform(6, width - x), rng.uniform(6, height - y)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(list(CLASSES))),
                    "bbox": [round(float(v), 2) for v in (x, y, w, h)],
                    "area": round(float(w * h), 2),
                    "iscrowd": int(image_id == 7),  # image 7 has crowds only
                }
            )
    for annotation in annotations[:2]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    json_file = folder / "annotations.json"
    json_file.write_text(json.dumps(content))
    return str(json_file), str(folder / "images")


@pytest.fixture(scope="session")
def coco_files(tmp_path_factory):
    """(annotation file, image folder) of a data set of 12 images."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "shapes")


@pytest.fixture(scope="session")
def large_coco_files(tmp_path_factory):
    """The same with images four times as large, whose objects are small, medium and large."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "large", num_images=24, scale=4)


def random_detections(json_file, structures, seed=0, per_image=30):
    """Inputs and outputs for an evaluator: boxes near the annotated ones and boxes anywhere."""
    import torch

    content = json.loads(open(json_file).read())
    classes = sorted(CLASSES)
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = [], []
    for image in content["images"]:
        size = torch.tensor([image["width"], image["height"]])
        corner = torch.rand(per_image, 2, generator=generator) * size * 0.7
        extent = torch.rand(per_image, 2, generator=generator) * size * 0.3 + 2
        boxes = torch.cat((corner, corner + extent), dim=1)
        labels = torch.randint(0, len(classes), (per_image,), generator=generator)
        known = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        for row, annotation in enumerate(known):
            x, y, w, h = annotation["bbox"]
            noise = torch.randn(4, generator=generator) * size.min() * 0.03
            boxes[row] = torch.tensor([x, y, x + w, y + h]) + noise
            labels[row] = classes.index(annotation["category_id"])
        found = structures.Instances((image["height"], image["width"]))
        found.pred_boxes = structures.Boxes(boxes)
        found.scores = torch.rand(per_image, generator=generator)
        found.pred_classes = labels
        inputs.append({"image_id": image["id"]})
        outputs.append({"instances": found})
    return inputs, outputs


@pytest.fixture
def detections():
    return random_detections


class BoxMapper:
    """Read, flip, resize and crop an image with its boxes, with the modules of one runtime."""

    def __init__(self, utils, transforms):
        self.utils = utils
        self.augmentations = transforms.AugmentationList(
            [
                transforms.RandomFlip(),
                transforms.ResizeShortestEdge((32, 40, 48), max_size=70, sample_style="choice"),
                transforms.RandomCrop("relative_range", (0.6, 0.6)),
            ]
        )
        self.transforms = transforms

    def __call__(self, record):
        image = self.utils.read_image(record["file_name"], format="BGR")
        aug_input = self.transforms.AugInput(image)
        applied = self.augmentations(aug_input)
        size = aug_input.image.shape[:2]
        for annotation in record["annotations"]:
            annotation.pop("segmentation", None)
        annotations = [
            self.utils.transform_instance_annotations(annotation, applied, size)
            for annotation in record.pop("annotations")
            if not annotation["iscrowd"]
        ]
        instances = self.utils.annotations_to_instances(annotations, size)
        instances = self.utils.filter_empty_instances(instances)
        record["image"] = np.ascontiguousarray(aug_input.image)
        record["boxes"] = instances.gt_boxes.tensor.numpy()
        record["classes"] = instances.gt_classes.numpy()
        return record


@pytest.fixture
def box_mapper():
    return BoxMapper


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def logged():
    """The messages of this test's log, of both runtimes, whatever their loggers propagate."""
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in ("stage_interactor", "detectron2", "fvcore")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(collector)
        logger.setLevel(logging.DEBUG)
    yield collector.messages
    for logger, level in zip(loggers, levels):
        logger.removeHandler(collector)
        logger.setLevel(level)
