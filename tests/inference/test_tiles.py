"""Large pictures in tiles: every object once, in its place, whatever borders run through it."""

import csv
import json
import logging

import av
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.d2 import transforms as T
from stage_interactor.d2.detections import UnusableDetectionsError
from stage_interactor.d2.structures import Boxes, Instances
from stage_interactor.inference.predict import predict_files
from stage_interactor.inference.tiles import Part, Tiling, tiling_of

SMALLEST = 6  # pixels of the model's input, of which something is found
LONG = 2.0  # as long as it is wide and longer, it is of another class


class FindsBright:
    """A model that finds bright rectangles as they are in its input, and surer the smaller."""

    def __init__(self):
        self.sizes = []  # of its inputs, batch by batch

    def __call__(self, inputs):
        self.sizes.append([tuple(item["image"].shape[1:]) for item in inputs])
        return [{"instances": self.find(item)} for item in inputs]

    def find(self, item):
        image = item["image"][0].numpy() > 127
        scales = item["height"] / image.shape[0], item["width"] / image.shape[1]
        boxes, scores, classes = [], [], []
        for rows, columns in ndimage.find_objects(ndimage.label(image)[0]):
            sides = rows.stop - rows.start, columns.stop - columns.start
            if min(sides) < SMALLEST:
                continue
            boxes.append([columns.start * scales[1], rows.start * scales[0],
                          columns.stop * scales[1], rows.stop * scales[0]])  # fmt: skip
            scores.append(1 - 0.4 * max(sides) / max(image.shape))
            classes.append(int(max(sides) >= LONG * min(sides)))
        found = Instances((item["height"], item["width"]))
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        found.scores = torch.tensor(scores, dtype=torch.float32)
        found.pred_classes = torch.tensor(classes, dtype=torch.long)
        return found


def bright(*augmentation):
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "bar"}]
    return Detector(FindsBright(), categories, T.AugmentationList(list(augmentation)))


RESIZED = T.ResizeShortestEdge(800, 1333)  # leaves tiles of 800 as they are


def painted(size, boxes):
    """A picture of bright boxes on black."""
    picture = np.zeros((*size, 3), np.uint8)
    for left, top, right, bottom in np.asarray(boxes, dtype=int):
        picture[top:bottom, left:right] = 255
    return picture


def sorted_boxes(boxes):
    return sorted(map(tuple, np.asarray(boxes).tolist()))


@pytest.fixture(scope="module")
def large():
    """8,000 pixels of small squares, many of them on borders of tiles, and a few large things."""
    tiling = tiling_of(800, 0.2, 1)
    starts = tiling.starts(8000)
    borders = sorted({*starts.tolist(), *(starts + 800).tolist()} - {0, 8000})
    random = np.random.default_rng(0)
    taken = np.zeros((8000, 8000), bool)
    # Longer than the overlap; larger than a tile; too thin for the picture as a whole.
    large = [(700, 700, 1010, 1000), (2500, 2100, 4600, 4000), (100, 5000, 6100, 5120)]
    thin = [(6500, 300, 6540, 1500)]
    for left, top, right, bottom in large + thin:
        taken[top - 3 : bottom + 3, left - 3 : right + 3] = True
    small = []

    def put(left, top, side):
        left, top = (int(np.clip(value, 0, 8000 - side)) for value in (left, top))
        around = taken[max(top - 2, 0) : top + side + 2, max(left - 2, 0) : left + side + 2]
        if not around.any():
            around[:] = True
            small.append((left, top, left + side, top + side))

    for x in (0, *borders, 8000):  # at each crossing of borders one, ending or beginning anywhere
        for y in (0, *borders, 8000):
            side = int(random.integers(10, 60))
            put(x - random.integers(0, side + 1), y - random.integers(0, side + 1), side)
    while len(small) < 1500:
        put(*random.integers(0, 8000, 2), int(random.integers(10, 60)))
    return painted((8000, 8000), [*small, *large, *thin]), small, large, thin


@pytest.mark.parametrize("augmentation", [(RESIZED,), ()])
def test_in_8000_pixels_each_object_is_found_once_and_in_its_place(large, augmentation, caplog):
    picture, small, larger, thin = large
    detector = bright(*augmentation)
    found = detector(picture, tiles=800, batch_size=8)
    assert found.image_size == (8000, 8000)
    sides = (found.boxes[:, 2:] - found.boxes[:, :2]).max(1)
    assert sorted_boxes(found.boxes[sides <= 60]) == sorted_boxes(small)
    others = found.boxes[sides > 60].tolist()
    assert len(others) == len(larger + thin)
    for box in larger + thin:
        (match,) = (other for other in others if np.abs(np.subtract(other, box)).max() <= 10)
        if not augmentation or box in thin:  # joined of pieces, to the pixel
            assert match == list(box)
    labels = {name: names for name, names in zip(map(tuple, found.boxes.tolist()), found.names)}
    assert {labels[box] for box in map(tuple, np.array(small, float).tolist())} == {"square"}
    # Without its resizing the picture as a whole is too large for the model, which is said.
    assert ("Only tiles are looked at" in caplog.text) == (not augmentation)


def test_the_same_picture_without_tiles_has_lost_what_is_small(large):
    picture, small, larger, _ = large
    found = bright(RESIZED)(picture)
    assert len(found) < 0.1 * len(small)


def test_tiles_go_through_in_batches_and_small_pictures_as_a_whole():
    detector = bright(RESIZED)
    picture = painted((1500, 2000), [(10, 10, 40, 40)])
    assert len(detector(picture, tiles=800, batch_size=4)) == 1
    whole, *tiles = detector.model.sizes
    assert whole == [(800, 1067)]
    assert [len(batch) for batch in tiles] == [4, 4, 1]
    assert {size for batch in tiles for size in batch} == {(800, 800)}
    detector.model.sizes.clear()
    one = painted((640, 800), [(10, 10, 40, 40)])
    assert np.array_equal(detector(one, tiles=800).boxes, detector(one).boxes)
    assert detector.model.sizes == [[(800, 1000)]] * 2
    detector.model.sizes.clear()
    strip = painted((100, 2000), [(790, 10, 820, 40)])  # tiles are as high as it
    assert bright()(strip, tiles=800).boxes.tolist() == [[790, 10, 820, 40]]


def test_tiles_cover_all_and_what_fits_the_overlap_lies_in_one():
    random = np.random.default_rng(0)
    for _ in range(300):
        side = int(random.integers(32, 400))
        tiling = tiling_of(side, float(random.choice([0, 0.2, 0.5, 0.9])), 1)
        length = int(random.integers(1, 3000))
        starts = tiling.starts(length)
        stops = np.minimum(starts + side, length)
        assert starts[0] == 0 and stops[-1] == length and (np.diff(starts) > 0).all()
        assert (stops[:-1] - starts[1:] >= tiling.overlap).all()
        assert len(starts) == 1 or (stops - starts == side).all()
        most = tiling.overlap - 2 * tiling.margin - 1
        if most > 0 and length > most:
            low = random.uniform(0, length - most, 50)
            assert tiling._inside(np.stack((low, low + most), 1), length).all()
    places = Tiling(100, 20).places(150, 260)
    assert len(places) == 6 and places[0] == (0, 0, 100, 100) and places[-1] == (160, 50, 260, 150)


def merged(tiling, size, *parts):
    """Boxes, scores and classes of parts (place, (box, score, class)...), boxes in the picture."""
    made = []
    for place, *found in parts:
        boxes = np.array([box for box, _, _ in found], np.float32).reshape(-1, 4)
        boxes -= np.array(place[:2] * 2)
        scores = np.array([score for _, score, _ in found], np.float32)
        made.append(Part(place, boxes, scores, np.array([label for *_, label in found], int)))
    boxes, scores, classes = tiling.merged(made, *size)
    rows = zip(boxes.tolist(), scores.round(2).tolist(), classes.tolist())
    return sorted((box, round(score, 2), label) for box, score, label in rows)


ONE, TWO = (0, 0, 100, 100), (80, 0, 180, 100)


def test_what_a_border_cuts_is_left_to_the_tile_that_sees_it_whole():
    tiling, size = Tiling(100, 20), (100, 180)
    whole = ([85, 40, 95, 50], 0.5, 0)
    # Surer, and of another class: it is the same object, seen in part.
    assert merged(tiling, size, (ONE, ([94, 10, 100, 20], 0.9, 1)), (TWO,)) == []
    assert (
        merged(tiling, size, (ONE, whole), (TWO, whole))
        == [(list(map(float, whole[0])), 0.5, 0)] * 2
    )
    # Boxes of what is cut end within two pixels of the border, which is a hundredth of large tiles.
    assert merged(tiling, size, (ONE, ([94, 10, 98.5, 20], 0.9, 1)), (TWO,)) == []
    assert len(merged(tiling, size, (ONE, ([90, 10, 97, 20], 0.9, 1)), (TWO,))) == 1
    assert Tiling(100, 20).margin == 2 and Tiling(800, 160).margin == 8
    at_the_end = ([170, 40, 180, 50], 0.5, 0)  # that of the picture cuts nothing
    assert len(merged(tiling, size, (ONE,), (TWO, at_the_end))) == 1


def test_pieces_of_what_no_tile_sees_whole_become_one_box():
    tiling, size = Tiling(100, 20), (100, 180)
    left, right = ([30, 40, 100, 60], 0.6, 0), ([80, 41, 150, 60], 0.8, 0)
    assert merged(tiling, size, (ONE, left), (TWO, right)) == [([30, 40, 150, 60], 0.8, 0)]
    # Of another class too if they agree as well as that: of that which is seen more of.
    assert merged(tiling, size, (ONE, left), (TWO, (right[0], 0.8, 1))) == [
        ([30, 40, 150, 60], 0.6, 0)
    ]
    # Others are other objects: of another class, or elsewhere, where both tiles look.
    assert len(merged(tiling, size, (ONE, left), (TWO, ([80, 46, 150, 60], 0.8, 0)))) == 1
    assert len(merged(tiling, size, (ONE, left), (TWO, ([80, 46, 150, 60], 0.8, 1)))) == 2
    assert len(merged(tiling, size, (ONE, left), (TWO, ([80, 55, 150, 75], 0.8, 0)))) == 2
    # Two of one tile are two, even if they look like one.
    assert len(merged(tiling, size, (ONE, left, ([31, 40, 100, 60], 0.5, 0)), (TWO,))) == 2


def test_the_whole_picture_is_for_what_is_larger_than_the_overlap():
    tiling, size = Tiling(100, 20), (100, 180)
    picture, everything = (0, 0, 180, 100), ([30, 40, 150, 60], 0.4, 0)
    small = ([10, 10, 20, 20], 0.9, 0)
    left, right = ([30, 40, 100, 60], 0.6, 0), ([80, 41, 150, 60], 0.8, 0)
    parts = (picture, everything, small), (ONE, left), (TWO, right)
    assert merged(tiling, size, *parts) == [([30, 40, 150, 60], 0.4, 0)]
    # Of another class it takes what is the same, and leaves what only lies in it.
    other = picture, (everything[0], 0.4, 1)
    assert len(merged(tiling, size, other, (ONE, left), (TWO, right))) == 1
    inside = ([60, 42, 100, 50], 0.6, 0)
    assert len(merged(tiling, size, other, (ONE, inside), (TWO,))) == 2
    assert len(merged(tiling, size, (picture, everything), (ONE, inside), (TWO,))) == 1
    assert merged(tiling, size, (picture,), (ONE,), (TWO,)) == []
    for length, count in ((16, 0), (17, 1)):  # which a tile may see as cut if it is longer
        found = picture, ([50, 50, 50 + length, 60], 0.9, 0)
        assert len(merged(tiling, size, found, (ONE,), (TWO,))) == count


def test_options_are_of_all_tiles_together():
    boxes = [(10, 10, 40, 40), (1000, 900, 1020, 920), (700, 500, 740, 540)]
    detector, picture = bright(RESIZED), painted((1200, 1600), boxes)
    found = detector(picture, tiles=800)
    assert len(found) == 3 and (np.diff(found.scores) <= 0).all()
    best = detector(picture, tiles=800, max_detections=1)
    assert best.boxes.tolist() == [[1000, 900, 1020, 920]]
    assert len(detector(picture, tiles=800, classes=["bar"])) == 0
    assert len(detector(picture, {"square": 0.985}, tiles=800)) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(tiles=31), "32 or more, got 31"),
        (dict(tiles=True), "got True"),
        (dict(tiles=800, overlap=0.95), "0 to 0.9, got 0.95"),
        (dict(tiles=800, overlap=-0.1), "got -0.1"),
        (dict(tiles=800, overlap=float("nan")), "got nan"),
        (dict(overlap=0.2), "give tiles"),
        (dict(batch_size=0), "batch_size .* must be a whole number of 1 or more, got 0"),
        (dict(tiles=8.5), "got 8.5"),
        (dict(tiles=800, overlap="0.2"), "got '0.2'"),
        (dict(tiles=800, batch_size=0), "batch_size .* must be a whole number of 1 or more, got 0"),
    ],
)
def test_a_tiling_out_of_its_range_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        bright()(np.zeros((9, 9, 3), np.uint8), **options)
    with pytest.raises(ValueError, match=told):
        predict_files(bright(), "tests/files/picture.png", **options)


def test_a_tile_whose_detections_are_nan_is_named():
    detector = bright(RESIZED)

    def broken(inputs):
        outputs = FindsBright()(inputs)
        for item, output in zip(inputs, outputs):
            if (item["height"], item["width"]) == (800, 800):
                output["instances"].scores[:] = float("nan")
        return outputs

    detector.model = broken
    picture = painted((800, 1440), [(1400, 10, 1440, 50)])
    with pytest.raises(UnusableDetectionsError, match=r"tile \(640, 0, 1440, 800\), 1 detections"):
        detector(picture, tiles=800)


def test_pictures_and_videos_on_the_command_line(small_run, tmp_path, capsys, monkeypatch):
    """A real detector, whose tiles are of the size of its pictures."""
    checkpoint = small_run / "model_final.pth"
    tiles = [np.array(Image.open(path).convert("RGB"))
             for path in sorted((small_run / "shapes/val").iterdir())[:6]]  # fmt: skip
    picture = np.concatenate([np.concatenate(tiles[i : i + 3], 1) for i in (0, 3)], 0)
    root = tmp_path / "in"
    root.mkdir()
    Image.fromarray(picture).save(root / "large.png")
    Image.fromarray(tiles[0]).save(root / "small.png")
    with av.open(str(root / "clip.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=5)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "bgr0"
        for _ in range(2):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())
    out = tmp_path / "out"
    options = ["--checkpoint", str(checkpoint), "--output-dir", str(out), "--device", "cpu"]
    options += ["--threshold", "0.02", "--tiles", "64", "--batch-size", "4"]
    assert main(["predict", *options, str(root)]) == 0
    content = json.loads((out / "predictions.json").read_text())
    assert [i["file_name"] for i in content["images"]] == ["large.png", "small.png"] + [
        "clip.mkv"
    ] * 2
    found = {}
    for row in csv.DictReader((out / "predictions.csv").open()):
        place = row["file"], row["frame"]
        found.setdefault(place, []).append(
            [float(row[key]) for key in ("left", "top", "right", "bottom")]
        )
    # The same in a picture, in a frame, and from Python; of the small one as without tiles.
    assert found["large.png", ""] == found["clip.mkv", "0"] == found["clip.mkv", "1"]
    assert Image.open(out / "large.png").size == (192, 128)
    detector = Detector.from_checkpoint(checkpoint, device="cpu")
    ours = detector(picture, 0.02, tiles=64)
    np.testing.assert_allclose(ours.boxes, found["large.png", ""], atol=0.1)
    assert (ours.boxes[:, 2] > 128).any() and (ours.boxes >= 0).all()
    assert (ours.boxes <= [192, 128, 192, 128]).all()
    np.testing.assert_allclose(detector(tiles[0], 0.02).boxes, found["small.png", ""], atol=0.1)


def test_a_tile_that_is_too_large_for_the_model_is_told(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    Image.fromarray(painted((900, 900), [(10, 10, 40, 40)])).save(tmp_path / "0.png")
    monkeypatch.setattr("stage_interactor.untrusted.pictures._MAX_PIXELS_OF_MODEL", 800 * 800)
    results = predict_files(bright(), tmp_path, tiles=800, progress=False)
    assert results.num_objects == 1 and "Only tiles are looked at" in caplog.text
    results = predict_files(bright(), tmp_path, tiles=850, progress=False)
    assert not len(results) and "0.png: it is 850 x 850 pixels large" in results.unreadable[0]
