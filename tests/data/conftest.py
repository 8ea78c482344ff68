"""A few small images with COCO annotations, which the tests damage."""

import json

import numpy as np
import pytest
from PIL import Image

NUM_IMAGES = 10


class CocoFolder:
    """Images 1..10 (wide, except every third) of 3 boxes each; category ids 3 and 7."""

    def __init__(self, folder):
        self.image_root = folder / "images"
        self.json_file = folder / "train.json"
        self.image_root.mkdir(parents=True)
        rng = np.random.default_rng(0)
        images, annotations = [], []
        for image_id in range(1, NUM_IMAGES + 1):
            height, width = (40, 30) if image_id % 3 == 0 else (30, 40)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.image_root / f"{image_id}.jpg")
            images.append(
                {"id": image_id, "file_name": f"{image_id}.jpg", "height": height, "width": width}
            )
            for index in range(3):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": (3, 7)[index % 2],
                        "bbox": [2 + 5 * index, 3, 8, 9 + index],
                        "area": 8 * (9 + index),
                        "iscrowd": 0,
                    }
                )
        self.content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        self.write()

    def write(self):
        self.json_file.write_text(json.dumps(self.content))

    @property
    def files(self):
        return str(self.json_file), str(self.image_root)


@pytest.fixture
def coco(tmp_path):
    return CocoFolder(tmp_path / "pets")
