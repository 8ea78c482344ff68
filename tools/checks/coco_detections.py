"""Annotations and detections with COCO's numbers, such as an evaluation gets them."""

from typing import Any

import numpy as np


def coco_like(
    images: int, *, classes: int = 80, detections: int = 100, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of an annotation file, and results in COCO's format.

    About seven objects an image, 1 % of them crowds, of all sizes; detections near objects and
    elsewhere, some of them twice or of another class. Scores have two decimals, so many are equal.
    Ids of images and classes have gaps, and some classes and images have no objects.
    """
    rng = np.random.default_rng(seed)
    category_ids = np.sort(rng.choice(np.arange(1, 2 * classes), classes, replace=False))
    image_ids = rng.choice(np.arange(1, 100 * images), images, replace=False)
    content: dict[str, Any] = {
        "info": {},
        "images": [],
        "annotations": [],
        "categories": [{"id": int(i), "name": f"class {i}"} for i in category_ids],
    }
    results = []
    for image_id in map(int, image_ids):
        size = rng.integers(200, 641, 2)
        content["images"].append(
            {"id": image_id, "width": int(size[0]), "height": int(size[1]), "file_name": "x.jpg"}
        )
        objects = min(int(rng.exponential(7.3)), 60)
        sides = np.exp(rng.uniform(1.5, np.log(size), (objects, 2)))
        boxes = np.concatenate((rng.uniform(0, 1, (objects, 2)) * (size - sides), sides), 1).round(
            2
        )
        labels = rng.choice(category_ids[: classes - classes // 20], objects)
        for box, label in zip(boxes, labels):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3] * rng.uniform(0.4, 1)),
                    "iscrowd": int(rng.random() < 0.01),
                }
            )
        near = rng.integers(0, objects, detections) if objects else np.zeros(0, int)
        found = boxes[near] + rng.normal(0, 0.08, (len(near), 4)) * np.tile(boxes[near][:, 2:], 2)
        away = np.exp(rng.uniform(1, 5.5, (detections - len(near), 4)))
        found = np.abs(np.concatenate((found, away))) + 0.5
        found[::10] = found[: len(found[::10])]  # the same box again
        names = np.where(
            rng.random(detections) < 0.6,
            labels[near] if objects else rng.choice(category_ids, detections),
            rng.choice(category_ids, detections),
        )
        scores = rng.beta(0.5, 3, detections).round(2)
        results += [
            {"image_id": image_id, "category_id": int(label), "bbox": box.tolist(), "score": score}
            for box, label, score in zip(found, names, scores.tolist())
        ]
    return content, results
