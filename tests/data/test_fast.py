"""decode="fast": the same sizes, boxes and random numbers, and pixels that are nearly the same."""

import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor.d2 import transforms as T
from stage_interactor.d2.structures import BoxMode
from stage_interactor.data import DetrDatasetMapper, ImageReadError, images


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """By name: smooth pictures with some noise, upright sizes of (height, width)."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    files = {}

    def save(name, height, width, tag=None, mode="RGB", **options):
        coarse = rng.integers(0, 256, (height // 64 + 2, width // 64 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), 3)).astype(int)
        picture = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
        exif = Image.Exif()
        if tag:
            exif[0x0112] = tag
        path = str(folder / name)
        Image.fromarray(picture).convert(mode).save(path, exif=exif, **options)
        files[name] = path, ((width, height) if (tag or 1) > 4 else (height, width))

    save("small.jpg", 60, 80, quality=92)
    save("large.jpg", 601, 803, quality=92)
    save("tall.jpg", 900, 301, quality=92)
    save("turned.jpg", 600, 805, tag=6, quality=92)
    save("mirrored.jpg", 601, 800, tag=2, quality=92)
    save("grey.jpg", 640, 640, mode="L", quality=92)
    save("progressive.jpg", 600, 800, quality=92, progressive=True)
    save("cmyk.jpg", 600, 800, mode="CMYK", quality=92)
    save("large.png", 600, 800)
    return files


RESIZE = T.ResizeShortestEdge([64, 80, 96, 112], 160, "choice")
TRAIN = [T.RandomFlip(), RESIZE]
CROP = [
    T.RandomFlip(), T.ResizeShortestEdge([90, 100], sample_style="choice"),
    T.RandomCrop("absolute_range", (40, 90)), RESIZE,
]  # fmt: skip


def mapped(path, size, *, seed=0, decode, **options):
    boxes = [[size[1] * 0.1, size[0] * 0.2, size[1] * 0.5, size[0] * 0.4]]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        for box in boxes
    ]
    record = dict(file_name=path, image_id=1, height=size[0], width=size[1])
    mapper = DetrDatasetMapper(decode=decode, **options)
    np.random.seed(seed)
    result = mapper(record | {"annotations": annotations})
    return result, np.random.rand()


@pytest.mark.parametrize("augmentation", [TRAIN, CROP, [RESIZE], [T.RandomFlip()], []])
def test_all_but_pixels_is_as_in_the_exact_way(photographs, augmentation):
    for name, (path, size) in photographs.items():
        for seed in range(3):
            options = dict(augmentation=augmentation, seed=seed)
            exact, number = mapped(path, size, decode="exact", **options)
            fast, same = mapped(path, size, decode="fast", **options)
            assert number == same, name
            assert fast["image"].shape == exact["image"].shape, name
            assert fast["image"].dtype == torch.uint8 and fast["image"].is_contiguous()
            assert (fast["height"], fast["width"]) == (exact["height"], exact["width"]) == size
            ours, theirs = fast["instances"], exact["instances"]
            assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
            assert ours.image_size == theirs.image_size
            difference = (fast["image"].int() - exact["image"].int()).abs()
            if not any(isinstance(aug, T.ResizeShortestEdge) for aug in augmentation):
                assert difference.max() == 0
            elif name.endswith("png") or name == "small.jpg":
                assert difference.max() <= 1 + (augmentation is CROP)
                assert (difference > 0).float().mean() < 0.05
            else:
                assert difference.float().mean() < 2, name
                assert difference.float().quantile(0.999) < 16, name


def test_a_large_jpeg_is_decoded_to_a_fraction(photographs, monkeypatch):
    decoded = []
    pixels = images._pixels
    monkeypatch.setattr(
        images, "_pixels", lambda image, own: decoded.append(image.size) or pixels(image, own)
    )
    whole = {"small.jpg": (80, 60), "large.png": (800, 600)}
    for name, size in {"large.jpg": (201, 151), "turned.jpg": (202, 150), **whole}.items():
        augmentation = [T.ResizeShortestEdge((90, 90))]
        mapped(*photographs[name], decode="fast", augmentation=augmentation)
        assert decoded.pop() == size, name  # as it is stored
        mapped(*photographs[name], decode="exact", augmentation=augmentation)
        assert decoded.pop() == whole.get(name, (803, 601) if name == "large.jpg" else (805, 600))


def test_a_crop_of_the_picture_itself_needs_all_of_it(photographs):
    path, size = photographs["large.jpg"]
    augmentation = [T.RandomCrop("relative", (0.5, 0.5)), RESIZE]
    exact, _ = mapped(path, size, decode="exact", augmentation=augmentation)
    fast, _ = mapped(path, size, decode="fast", augmentation=augmentation)
    assert (exact["image"].int() - fast["image"].int()).abs().max() <= 1


def test_channels_come_in_the_order_that_is_asked_for(photographs):
    path, size = photographs["large.jpg"]
    rgb, _ = mapped(path, size, decode="fast", augmentation=[RESIZE])
    bgr, _ = mapped(path, size, decode="fast", augmentation=[RESIZE], image_format="BGR")
    assert torch.equal(rgb["image"], bgr["image"].flip(0))


def test_other_augmentations_keep_the_exact_pixels_and_are_told(photographs, caplog):
    class Half(T.Augmentation):
        def get_transform(self, image):
            return T.ResizeShortestEdge(int(image.mean())).get_transform(image)

    path, size = photographs["large.jpg"]
    bicubic = T.ResizeShortestEdge((100, 100), interp=Image.Resampling.BICUBIC)
    for augmentation in ([Half()], [bicubic]):
        exact, _ = mapped(path, size, decode="exact", augmentation=augmentation)
        caplog.clear()
        with caplog.at_level("WARNING"):
            fast, _ = mapped(path, size, decode="fast", augmentation=augmentation)
        assert torch.equal(exact["image"], fast["image"])
        assert type(augmentation[0]).__name__ in caplog.text and "pixels are exact" in caplog.text


def test_what_is_wrong_with_a_file_is_told_as_ever(photographs, tmp_path):
    path, size = photographs["large.jpg"]
    content = open(path, "rb").read()
    broken = tmp_path / "broken.jpg"
    for damaged in (content[: len(content) // 2], content[:100], b"", b"\xff\xd8\xff"):
        broken.write_bytes(damaged)
        told = []
        for decode in ("exact", "fast"):
            with pytest.raises(ImageReadError) as caught:
                mapped(str(broken), size, decode=decode, augmentation=TRAIN)
            told.append(str(caught.value))
        assert told[0].split("(")[0] == told[1].split("(")[0]
    for wrong, told_of in (
        ((size[0] + 1, size[1]), "is 803 x 601 pixels .* annotation says"),
        ((10**9, 1), "is 803 x 601 pixels .* annotation says"),
        ((0, 0), "large.jpg: height must be that of the image in pixels"),
    ):
        with pytest.raises(ValueError, match=told_of):
            mapped(path, wrong, decode="fast", augmentation=TRAIN)
    with pytest.raises(ValueError, match="decode must be 'exact' or 'fast', got 'draft'"):
        DetrDatasetMapper(augmentation=[], decode="draft")
