"""How a preset is fitted to a data set, and what is refused before a run begins."""

import json
from pathlib import Path

import pytest
from PIL import Image

import stage_interactor
from stage_interactor.commands import main
from stage_interactor.config import load_config
from stage_interactor.data import load_coco_dataset
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
