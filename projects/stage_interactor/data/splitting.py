"""A part to evaluate on where a data set has none."""

from collections import Counter, defaultdict

import numpy as np

from .reading import DataFolder, Split

HELD_OUT = 10  # one image in so many
_LARGEST_SHARE = 3  # one in so many at most, where that is what it takes to have every class


def hold_out(folder: DataFolder, seed: int = 0) -> None:
    """Takes a tenth of the images, at least two, out of "train" for "val".

    Every class that is in two images or more gets into both parts where that is possible: for the
    rarest classes first an image is taken that has the most classes which are still lacking; the
    rest is taken by chance.

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
    order = np.random.default_rng(seed).permutation(len(images))
    shuffled = [images[position] for position in order]
    classes: defaultdict[int, set[int]] = defaultdict(set)  # by image
    for item in split.content["annotations"]:
        if not item["iscrowd"]:
            classes[item["image_id"]].add(item["category_id"])
    left = Counter(label for found in classes.values() for label in found)  # images to train on
    held: set[int] = set()
    lacking = {label for label, count in left.items() if count > 1}

    def take(image: int) -> None:
        held.add(image)
        left.subtract(classes[image])
        lacking.difference_update(classes[image])

    def can_go(image: int) -> bool:
        return image not in held and all(left[label] > 1 for label in classes[image])

    most = len(images) // _LARGEST_SHARE
    for label in sorted(lacking, key=lambda label: (left[label], label)):
        fit = [image for image in shuffled if label in classes[image] and can_go(image)]
        if label in lacking and fit and len(held) < most:
            take(max(fit, key=lambda image: len(classes[image] & lacking)))
    wanted = max(round(len(images) / HELD_OUT), 2)
    for must in (False, True):  # only where nothing else is left, the last image of a class
        for image in shuffled:
            if len(held) < wanted and image not in held and (must or can_go(image)):
                take(image)
    return held
