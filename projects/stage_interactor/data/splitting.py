"""A part to evaluate on where a data set has none."""

from collections import Counter, defaultdict

import numpy as np

from .reading import DataFolder, Split

HELD_OUT = 10  # one image in so many


def hold_out(folder: DataFolder, seed: int = 0) -> None:
    """Takes a tenth of the images, at least two, out of "train" for "val".

    Every class that is in two images or more gets into both parts where that is possible: images
    are taken class by class, the rarest first, until each has its share.

    Args:
        folder: is changed.
        seed: of the order in which images are considered.

    Raises:
        ValueError: there are fewer than four images.
    """
    whole = folder.splits["train"]
    images = sorted(whole.content["images"], key=lambda image: str(image["file_name"]))
    if len(images) < 4:
        raise ValueError(
            f"{folder.path}: {len(images)} images are not enough to train on and to evaluate on"
        )
    held = _chosen(whole, [image["id"] for image in images], seed)

    def part(is_held: bool) -> Split:
        content = {
            key: [item for item in whole.content[key] if (item[name] in held) == is_held]
            for key, name in (("images", "id"), ("annotations", "image_id"))
        }
        content["categories"] = whole.content["categories"]
        return Split(content, whole.image_root, {} if is_held else whole.left_out)

    splits = folder.splits
    splits["val"], splits["train"] = part(True), part(False)


def _chosen(split: Split, images: list[int], seed: int) -> set[int]:
    """Ids of the images that are held out."""
    wanted = max(round(len(images) / HELD_OUT), 2)
    order = np.random.default_rng(seed).permutation(len(images))
    shuffled = [images[position] for position in order]
    classes: defaultdict[int, set[int]] = defaultdict(set)
    for item in split.content["annotations"]:
        if not item["iscrowd"]:
            classes[item["image_id"]].add(item["category_id"])
    total = Counter(label for found in classes.values() for label in found)
    left, held = Counter(total), set[int]()
    in_val: Counter[int] = Counter()

    def can_go(image: int) -> bool:
        return all(left[label] > 1 or total[label] == 1 for label in classes[image])

    def take(image: int) -> None:
        held.add(image)
        for label in classes[image]:
            left[label] -= 1
            in_val[label] += 1

    for label, count in sorted(total.items(), key=lambda item: (item[1], item[0])):
        share = max(round(count / HELD_OUT), 1) if count > 1 else 0
        for image in shuffled:
            if in_val[label] >= share or len(held) >= max(wanted, len(total)):
                break
            alone = any(total[other] == 1 for other in classes[image])
            if label in classes[image] and image not in held and not alone and can_go(image):
                take(image)
    # The rest by chance: images of classes that would have none left stay where they are.
    for must in (False, True):
        for image in shuffled:
            if len(held) >= wanted:
                return held
            alone = any(total[other] == 1 for other in classes[image])
            if image not in held and (must or (not alone and can_go(image))):
                take(image)
    return held
