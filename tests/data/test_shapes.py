"""The generated data set: deterministic, whole or not there, and a real detection problem."""

import json

import numpy as np
import pytest
from PIL import Image

from stage_interactor.d2 import comm
from stage_interactor.data import count_classes, generate_shapes, load_shapes
from stage_interactor.data.shapes import CLASS_NAMES, draw_scene
from stage_interactor.data.shapes import dataset as shapes

SMALL = {"num_train": 12, "num_val": 5, "image_size": 64}


def _contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _scenes(count, **options):
    arguments = {"image_size": 128, "min_objects": 1, "max_objects": 6}
    arguments |= {"min_size": 10.0, "max_size": 115.0} | options
    return [draw_scene(np.random.default_rng(seed), **arguments) for seed in range(count)]


def test_the_same_parameters_give_the_same_bytes(tmp_path):
    first = _contents(generate_shapes(tmp_path / "a", **SMALL))
    assert _contents(generate_shapes(tmp_path / "b", **SMALL)) == first
    assert set(first) >= {"train.json", "val.json", "train/000012.jpg", "val/000005.jpg"}
    other = _contents(generate_shapes(tmp_path / "c", **SMALL, seed=1))
    assert other["train/000001.jpg"] != first["train/000001.jpg"]
    assert first["train/000001.jpg"] != first["val/000001.jpg"]


def test_a_picture_does_not_depend_on_the_number_of_pictures(tmp_path):
    few = _contents(generate_shapes(tmp_path / "a", **SMALL))
    many = _contents(generate_shapes(tmp_path / "b", **{**SMALL, "num_train": 13}))
    assert few["train/000012.jpg"] == many["train/000012.jpg"]
    assert few["val.json"] == many["val.json"]


def test_it_is_generated_once_and_again_for_other_parameters(tmp_path, monkeypatch):
    written, write = [], shapes._write
    monkeypatch.setattr(shapes, "_write", lambda *args: (written.append(args), write(*args)))
    root = generate_shapes(tmp_path / "data", **SMALL)
    generate_shapes(root, **SMALL)
    assert len(written) == 1
    generate_shapes(root, **{**SMALL, "num_val": 6})
    assert len(written) == 2
    assert len(json.loads((root / "val.json").read_text())["images"]) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interrupted_generation_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate_shapes(tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".data.incomplete-killed" / "train").mkdir(parents=True)  # what SIGKILL leaves
    assert len(load_shapes(root=tmp_path / "data", split="val", name="shapes_a", **SMALL)) == 5


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        generate_shapes(tmp_path, **SMALL)
    assert (tmp_path / "thesis.txt").exists()


def test_only_the_first_process_generates_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_local_rank", lambda: 1)
    monkeypatch.setattr(shapes, "_WAIT_SECONDS", 0.3)
    with pytest.raises(TimeoutError, match="local rank 0"):
        generate_shapes(tmp_path / "data", **SMALL)
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(comm, "get_local_rank", lambda: 0)
    generate_shapes(tmp_path / "data", **SMALL)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 1)
    generate_shapes(tmp_path / "data", **SMALL)


def test_a_second_program_that_was_faster_wins(tmp_path, monkeypatch):
    write, root = shapes._write, tmp_path / "data"

    def write_while_another_program_does(folder, parameters):
        write(folder, parameters)
        monkeypatch.setattr(shapes, "_write", write)
        generate_shapes(root, **SMALL)

    monkeypatch.setattr(shapes, "_write", write_while_another_program_does)
    generate_shapes(root, **SMALL)
    assert len(list((root / "train").iterdir())) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_val": 0}, "num_val must be at least 1"),
        ({"max_objects": 0}, "max_objects=0"),
        ({"image_size": 8}, "image_size must be at least 32, got 8"),
        ({"min_size": 40, "max_size": 30}, "min_size=40, max_size=30"),
    ],
)
def test_parameters_out_of_range_are_named(tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        generate_shapes(tmp_path / "data", **{**SMALL, **parameters})


def test_the_records_load_as_a_coco_data_set(tmp_path):
    records = load_shapes(root=tmp_path / "data", split="train", name="shapes_b", **SMALL)
    assert len(records) == 12 and all(record["annotations"] for record in records)
    assert count_classes(str(tmp_path / "data" / "train.json")) == len(CLASS_NAMES) == 5
    with Image.open(records[0]["file_name"]) as image:
        assert image.size == (64, 64) and image.format == "JPEG"
    with pytest.raises(ValueError, match="'test'"):
        load_shapes(root=tmp_path / "data", split="test", **SMALL)


def test_objects_are_of_all_sizes_and_classes_and_overlap():
    scenes = _scenes(250)
    objects = [item for _, found in scenes for item in found]
    areas = np.array([item["area"] for item in objects])
    assert (areas < 32**2).mean() > 0.3
    assert ((areas >= 32**2) & (areas < 96**2)).mean() > 0.3
    assert (areas >= 96**2).any()
    assert np.bincount([item["class_index"] for item in objects]).min() > 0.1 * len(objects)
    counts = [len(found) for _, found in scenes]
    assert min(counts) >= 1 and max(counts) == 6

    def overlap(a, b):
        return all(a[k] < b[k] + b[k + 2] and b[k] < a[k] + a[k + 2] for k in (0, 1))

    crossing = sum(
        any(overlap(a["bbox"], b["bbox"]) for a in found for b in found if a is not b)
        for _, found in scenes
    )
    assert crossing > 0.3 * len(scenes)


def test_boxes_are_tight_around_the_visible_pixels():
    """A box drawn over one flat-coloured shape must be where the picture differs from its ground:
    the same random numbers draw the same ground, with and without the shape."""
    for seed in range(20):
        options = {"image_size": 96, "min_size": 20.0, "max_size": 40.0}
        generator = np.random.default_rng(seed)
        image, (item,) = draw_scene(generator, min_objects=1, max_objects=1, **options)
        ground, nothing = draw_scene(
            np.random.default_rng(seed), min_objects=0, max_objects=0, **options
        )
        assert nothing == []
        differs = np.abs(image.astype(int) - ground).sum(axis=2) > 0
        ys, xs = np.nonzero(differs)
        x, y, width, height = item["bbox"]
        found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        # The picture also differs where a shape covers less than half of a pixel.
        assert np.abs(np.array([x, y, x + width, y + height]) - found).max() <= 3
        assert item["area"] == width * height
        inside = differs[y : y + height, x : x + width].sum()
        assert inside >= 0.8 * differs.sum()


def test_no_annotated_object_is_nearly_hidden():
    """Twelve shapes of 60 x 60 pixels do not fit; those that stay show a good part of it."""
    for image, found in _scenes(40, min_objects=12, max_objects=12, min_size=60, max_size=60):
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        assert 2 <= len(found) < 12
        for item in found:
            x, y, width, height = item["bbox"]
            assert x >= 0 and y >= 0 and x + width <= 128 and y + height <= 128
            assert item["area"] > 0.4 * 0.25 * 60**2  # a shape fills a quarter of its box or more
