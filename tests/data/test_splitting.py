"""What is held out where a data set has nothing to evaluate on."""

import itertools
import random

import pytest

from stage_interactor.data.reading import DataFolder, Split
from stage_interactor.data.splitting import hold_out


def folder(labels):
    """Of images with these classes each."""
    names = sorted({label for found in labels for label in found})
    images = [{"id": n, "file_name": f"{n:03}.jpg", "width": 9, "height": 9}
              for n in range(len(labels))]  # fmt: skip
    annotations = [
        {"id": number, "image_id": n, "category_id": names.index(label), "bbox": [1, 1, 5, 5],
         "area": 25, "iscrowd": 0}
        for number, (n, label) in enumerate(
            ((n, label) for n, found in enumerate(labels) for label in found), start=1
        )
    ]  # fmt: skip
    categories = [{"id": n, "name": name} for n, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return DataFolder("somewhere", "COCO", {"train": Split(content, ".")})


def parts(data):
    return {name: data.splits[name] for name in ("train", "val")}


def classes(split):
    return {name for name, count in split.count_objects().items() if count}


@pytest.mark.parametrize("seed", range(20))
def test_every_class_of_two_images_is_in_both_parts(seed):
    rng = random.Random(seed)
    labels = [{rng.choice("aaaaaabbbbcc") for _ in range(rng.randrange(3))} for _ in range(60)]
    labels += [{"rare"}, {"rare", "a"}, {"alone", "b"}]
    data = folder(labels)
    before = data.splits["train"].content
    hold_out(data)
    train, val = parts(data).values()
    assert classes(train) == {"a", "b", "c", "rare", "alone"}
    assert classes(val) == {"a", "b", "c", "rare"}
    assert 6 <= len(val.content["images"]) <= 7
    for key in ("images", "annotations"):
        ids = [item["id"] for split in (train, val) for item in split.content[key]]
        assert sorted(ids) == [item["id"] for item in before[key]]
    for split in (train, val):
        there = {image["id"] for image in split.content["images"]}
        assert {item["image_id"] for item in split.content["annotations"]} <= there


def test_the_same_images_are_held_out_every_time_and_others_by_another_seed():
    labels = [{"ab"[n % 2]} for n in range(50)]
    held = []
    for seed in (0, 0, 1):
        data = folder(labels)
        hold_out(data, seed)
        held.append([image["id"] for image in data.splits["val"].content["images"]])
    assert held[0] == held[1] != held[2] and len(held[0]) == 5


def test_few_images_with_many_classes_keep_most_to_train_on():
    data = folder([{first, second} for first, second in itertools.combinations("abcdef", 2)])
    hold_out(data)
    train, val = parts(data).values()
    assert classes(train) == classes(val) == set("abcdef") and len(val.content["images"]) == 3


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="3 images are not enough to train on and to evaluate on"):
        hold_out(folder([{"a"}] * 3))
