"""How a preset is fitted to a data set, and what is refused before a run begins."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import stage_interactor
from stage_interactor.commands import main
from stage_interactor.config import load_config
from stage_interactor.data import load_coco_dataset
from stage_interactor.engine import presets
from stage_interactor.engine.fitting import StepOnGpu, images_at_a_time, largest_sides
from stage_interactor.engine.presets import fit_to_data


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


def write(root, *, crowd=0, **parts):
    """COCO parts; for each picture how many objects it has, of the classes a, b, a, b ..."""
    for name, counts in parts.items():
        (root / name).mkdir(parents=True)
        images, annotations = [], []
        for n, count in enumerate(counts, start=1):
            Image.new("RGB", (64, 48), (n * 5 % 256, n * 11 % 256, len(name) * 9)).save(
                root / name / f"{n}.png"
            )
            images.append({"id": n, "file_name": f"{n}.png", "width": 64, "height": 48})
            annotations += [
                {"id": len(annotations) + k + 1, "image_id": n, "category_id": k % 2 + 1,
                 "bbox": [k % 50, 3 + k % 30, 9, 8], "area": 72, "iscrowd": crowd}
                for k in range(count)
            ]  # fmt: skip
        categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def fitted(root, *overrides, **options):
    options = {"preset": "nano", "output_dir": root / "out", "dry_run": True} | options
    found = fit_to_data(root, overrides, **options)
    return load_config(found.config, found.overrides), "\n".join(found.notes)


def trained_on(cfg):
    dataset = cfg.dataloader.train.dataset
    return load_coco_dataset(
        "fitted_train", dataset.json_file, dataset.image_root, background=dataset.background
    )


@pytest.mark.parametrize(
    ("background", "count"),
    [(None, 20), ("keep", 20), ("drop", 12), (0.0, 12), (0.2, 15), (0.25, 16), (0.5, 20), (1, 20)],
)
def test_pictures_without_objects_are_kept_dropped_or_a_share(tmp_path, background, count):
    write(tmp_path, train=[2] * 12 + [0] * 8, val=[1, 2])
    cfg, notes = fitted(tmp_path, background=background, epochs=4)
    records = trained_on(cfg)
    assert len(records) == count
    assert f"{count} images, {count - 12} of them without objects: " in notes
    assert cfg.train.max_iter == -(-4 * count // 8)
    names = [Path(record["file_name"]).stem for record in records]
    assert names == sorted(names, key=int)


def test_coco_s_own_recipe_leaves_pictures_without_objects_out():
    assert load_config("stage_interactor_r50_100q_12ep.py").dataloader.train.dataset.filter_empty


@pytest.mark.parametrize("background", ["some", -0.1, 1.5])
def test_a_share_that_is_none_is_an_error(tmp_path, background):
    write(tmp_path, train=[2] * 12, val=[1, 2])
    with pytest.raises(ValueError, match="must be 'keep', 'drop' or a share from 0 to 1"):
        fitted(tmp_path, background=background)


def test_the_command_knows_the_same(tmp_path, capsys):
    write(tmp_path / "data", train=[2] * 8 + [0] * 8, val=[1, 2])
    arguments = ["train", str(tmp_path / "data"), "--preset", "nano", "--dry-run",
                 "--output-dir", str(tmp_path / "out")]  # fmt: skip
    assert main([*arguments, "--background", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "10 images, 2 of them without objects" in out and "data.background=0.2" in out
    with pytest.raises(SystemExit):
        main([*arguments, "--background", "some"])
    with pytest.raises(SystemExit):
        main(["train", "--config-file", "quickstart.py", "--background"])
    assert main(["train", "--config-file", "quickstart.py", "--background", "drop"]) == 2
    assert "--background: for data of your own" in capsys.readouterr().err


@pytest.mark.parametrize(("most", "queries", "counted"), [(60, 60, 100), (61, 100, 100),
                                                          (101, 150, 150)])  # fmt: skip
def test_queries_and_counted_detections_are_raised_to_the_objects(tmp_path, most, queries, counted):
    write(tmp_path, train=[2] * 9 + [most], val=[1, 2])
    cfg, notes = fitted(tmp_path)
    assert cfg.model.queries.num_queries == queries
    assert cfg.dataloader.evaluator.max_dets_per_image == counted
    assert (f"An image has {most} objects, more than 60 queries" in notes) == (most > 60)
    assert ("that AP looks at" in notes) == (most > 100)
    cfg, notes = fitted(tmp_path, "model.queries.num_queries=20")
    assert cfg.model.queries.num_queries == 20
    assert f"{most} objects, more than 20 queries" in notes and "cannot be found" in notes


def test_a_batch_is_no_larger_than_the_data(tmp_path):
    write(tmp_path, train=[1] * 5, val=[1, 2])
    assert fitted(tmp_path)[0].dataloader.train.total_batch_size == 5
    assert fitted(tmp_path, num_gpus=2)[0].dataloader.train.total_batch_size == 4
    with pytest.raises(ValueError, match="has 5 images, fewer than a batch of 6: set "):
        stage_interactor.train(
            tmp_path, ["dataloader.train.total_batch_size=6", "train.device=cpu"],
            preset="nano", output_dir=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"train": [1] * 8, "val": [3]}, "val has a single image"),
        ({"train": [1] * 8, "val": [0, 0]}, "val has no objects"),
        ({"train": [0] * 8, "val": [1, 1]}, "train has no objects"),
        ({"val": [1] * 8}, "no part to train on, only "),
        ({"train": [1] * 3}, "3 images are not enough"),
        ({"train": [1] * 8, "val": [1, 1], "crowd": 1}, "train has no objects; val has no objects"),
    ],
)
def test_what_cannot_be_trained_or_scored_is_an_error_for_check_and_training(
    tmp_path, parts, told, capsys
):
    write(tmp_path, **parts)
    with pytest.raises(ValueError, match=told):
        fitted(tmp_path)
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "Error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("val", "told"), [([3], "has 1 images: an AP of it means nothing"), ([0, 0], "has no objects")]
)
def test_a_config_s_data_are_refused_as_well(tmp_path, val, told):
    write(tmp_path, train=[1] * 8, val=val)
    overrides = [f"data.{part}_json={tmp_path / part}.json" for part in ("train", "val")]
    overrides += [f"data.image_root={tmp_path}/train", f"data.val_image_root={tmp_path}/val",
                  f"train.output_dir={tmp_path / 'run'}", "train.device=cpu", "data.name=refused",
                  "dataloader.train.total_batch_size=4"]  # fmt: skip
    with pytest.raises(ValueError, match=told):
        stage_interactor.train("custom/nano.py", overrides)
    assert not (tmp_path / "run/metrics.json").exists()


def test_what_makes_a_worse_detector_is_told(tmp_path, capsys):
    write(tmp_path, train=[1] * 12, val=[2, 2, 70])
    assert main(["data", "check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in ("Warning in train: no object of the classes ['b']",
                 "Warning in val: objects of ['b'], of which there are none to train"):  # fmt: skip
        assert text in out
    assert "val: objects of ['b'], of which there are none to train on" in fitted(tmp_path)[1]


def test_sizes_of_pictures_are_kept_beside_the_output(tmp_path, monkeypatch):
    write(tmp_path / "data", train=[1] * 8, val=[1, 1])
    fitted(tmp_path / "data", output_dir=tmp_path / "out")
    opened = []
    monkeypatch.setattr("stage_interactor.data.sizes.open_image", opened.append)
    cfg, _ = fitted(tmp_path / "data", output_dir=tmp_path / "out")
    assert not opened and len(trained_on(cfg)) == 8
    for text in ("{", "[]", '{"a": 3}', ""):  # whatever it holds, it is no harm
        (tmp_path / "out/annotations/picture_sizes.json").write_text(text)
        monkeypatch.undo()
        monkeypatch.chdir(Path(__file__).parents[2])
        assert len(trained_on(fitted(tmp_path / "data", output_dir=tmp_path / "out")[0])) == 8


@pytest.mark.parametrize(
    ("budget", "there", "most", "number", "tried"),
    [
        (9.0, 9.0, 16, 16, [16]),  # all of them: nothing else is tried
        (4.0, 9.0, 16, 7, [16, 8, 4, 6, 7]),
        (9.0, 4.0, 16, 7, [16, 8, 4, 6, 7]),  # memory runs out
        (1.0, 9.0, 16, 1, [16, 8, 4, 2, 1]),
        (0.9, 9.0, 16, 0, [16, 8, 4, 2, 1]),
        (4.0, 9.0, 1, 1, [1]),
    ],
)
def test_as_many_images_as_memory_takes_are_found_by_trying(budget, there, most, number, tried):
    asked = []

    def trial(images):
        asked.append(images)
        taken = 0.5 + 0.5 * images
        return taken if taken <= there else None

    taken = 0.5 + 0.5 * max(number, 1)
    assert images_at_a_time(trial, most, budget) == (number, taken)
    assert asked == tried


@pytest.mark.parametrize(
    ("sizes", "grouped", "sides"),
    [
        ([(640, 480)], True, (800, 1067)),
        ([(640, 480), (480, 640)], True, (800, 1067)),
        ([(640, 480), (480, 640)], False, (1067, 1067)),
        ([(4000, 1000), (100, 100)], True, (800, 800)),  # the square one, which is no wide one
        ([(4000, 1000)], True, (333, 1333)),
    ],
)
def test_the_largest_batch_is_that_of_the_pictures_as_they_are_resized(sizes, grouped, sides):
    steps = [{"prob": 0.5}, {"short_edge_length": [480, 800], "max_size": 1333}]
    found = largest_sides(steps, sizes, grouped)
    assert found == sides
    assert largest_sides(steps[:1], sizes, grouped) is None


def test_a_batch_has_the_parts_that_a_measured_step_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "free_memory", lambda: 5.0)  # GiB, of which 4 are used
    write(tmp_path, train=[2, 3] * 10, val=[1, 2])
    seen = []

    def measure(gib_per_image):
        def of(cfg, sides, objects):
            seen.append((sides, objects))
            return lambda images: None if images > 6 else 0.1 + gib_per_image * images

        return of

    cfg, notes = fitted(tmp_path, measure=measure(1.0))  # 3 of the 8 images fit
    assert cfg.train.accumulation_steps == 3 and seen == [((288, 384), 3)]
    assert "About 3.1 of 5.0 GiB of memory, measured with images of 384 x 288 pixels" in notes
    assert "3 at a time, each batch in 3 parts" in notes
    cfg, notes = fitted(tmp_path, measure=measure(9.0))
    assert cfg.train.accumulation_steps == 8 and "it may not be enough" in notes
    cfg, notes = fitted(tmp_path, "train.accumulation_steps=4", measure=measure(1.0))
    assert cfg.train.accumulation_steps == 4 and "measured" not in notes
    cfg, notes = fitted(tmp_path)
    assert cfg.train.accumulation_steps == 1 and "measured" not in notes


def test_on_a_gpu_a_run_tries_and_a_dry_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "free_memory", lambda: 5.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(presets, "StepOnGpu", lambda *_: lambda images: 0.9 * images)
    write(tmp_path, train=[2, 3] * 10, val=[1, 2])
    cfg, notes = fitted(tmp_path, dry_run=False)
    assert cfg.train.accumulation_steps == 2 and "3.6 of 5.0 GiB of memory, measured" in notes
    cfg, notes = fitted(tmp_path)
    assert cfg.train.accumulation_steps == 1
    assert "by the preset's table; a run tries a step" in notes


def test_a_tried_step_is_one_of_the_run_and_memory_that_runs_out_is_an_answer(tmp_path):
    write(tmp_path, train=[2, 3] * 4, val=[1, 2])
    cfg, _ = fitted(tmp_path, "train.device=cpu", "train.amp.enabled=false")
    peaks = iter([0.0, 1.5, 0.0, 0.0, 2.5, 0.0])
    step = StepOnGpu(cfg, (64, 96), 3, peak=lambda: next(peaks))
    assert step(1) == 1.5
    model, optimizer, averages = step._parts
    kept = optimizer.state[next(p for p in model.parameters() if p.requires_grad)]
    assert "exp_avg" in kept and averages is not None
    assert all(p.grad is None for p in model.parameters())
    forward = model.forward

    def full(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = full
    assert step(2) is None
    model.forward = forward
    assert step(1) == 2.5
    model.forward = lambda images: 1 / 0  # which memory has nothing to do with
    with pytest.raises(ZeroDivisionError):
        step(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_what_more_images_take(tmp_path):
    write(tmp_path, train=[2, 3] * 4, val=[1, 2])
    cfg, _ = fitted(tmp_path)
    step = StepOnGpu(cfg, (256, 256), 3)
    one, four = step(1), step(4)
    assert 0 < one < four
