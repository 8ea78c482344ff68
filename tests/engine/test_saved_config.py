"""The config that a run leaves trains as the one it came from, and nobody else's files suffer."""

import json
from pathlib import Path

import pytest

import stage_interactor
from stage_interactor.config import ConfigError, load_config, save_config
from stage_interactor.engine import evaluation
from stage_interactor.engine.training import EVALUATION
from stage_interactor.pages.report import write_report

ROOT = Path(__file__).parents[2]
SAVED = ("config.yaml", "config_resolved.yaml")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A training, with its folder as it was left."""
    folder = tmp_path_factory.mktemp("first")
    overrides = [f"shapes.root={folder}/shapes", "train.max_iter=2", "train.seed=3"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        return stage_interactor.train("tests/tiny_config.py", overrides, output_dir=folder / "run")


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def losses(folder):
    rows = map(json.loads, (Path(folder) / "metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in rows if "total_loss" in row]


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_config_trains_the_same_to_the_bit_in_a_folder_of_its_own(name, first, tmp_path):
    before = contents(first.output_dir)
    again = stage_interactor.train(Path(first.output_dir, name), output_dir=tmp_path)
    assert losses(tmp_path) == losses(first.output_dir) and len(losses(tmp_path)) == 2
    assert again.metrics["bbox"] == pytest.approx(first.metrics["bbox"], abs=0, nan_ok=True)
    assert again.path("coco_instances_results.json") and again.path("detections.jpg")
    assert contents(first.output_dir) == before
    texts = [Path(folder, name).read_text() for folder in (first.output_dir, tmp_path)]
    assert texts[1].replace(str(tmp_path), first.output_dir) == texts[0]


@pytest.mark.parametrize("name", SAVED)
def test_overrides_of_a_saved_config_reach_what_follows_them(name, first):
    overrides = ["train.output_dir=B", "train.max_iter=60", "train.seed=5", "model.num_classes=7",
                 "optimizer.lr=0.5", "model.decoder.embed_dim=24", "shapes.root=C"]  # fmt: skip
    config = load_config(Path(first.output_dir, name), overrides)
    assert config.dataloader.evaluator.output_dir == "B"
    assert config.lr_multiplier.max_iter == 60 and config.dataloader.train.seed == 5
    assert config.model.decoder.num_classes == config.model.criterion.num_classes == 7
    assert config.optimizer.params.base_lr == 0.5
    assert config.model.neck.out_channels == config.model.queries.embed_dim == 24
    assert config.dataloader.test.dataset.root == "C"


def test_the_device_of_this_machine_is_not_saved(first):
    for name in SAVED:
        assert load_config(Path(first.output_dir, name)).train.device == "cuda"


def test_predictions_of_another_run_are_not_written_over(first, tmp_path):
    before = contents(first.output_dir)
    elsewhere = [f"dataloader.evaluator.output_dir={first.output_dir}"]  # as if resolved
    saved = Path(first.output_dir, "config_resolved.yaml")
    with pytest.raises(ConfigError, match="holds another run.*dataloader.evaluator.output_dir="):
        stage_interactor.train(saved, elsewhere, output_dir=tmp_path / "out")
    assert contents(first.output_dir) == before


def test_an_evaluation_has_names_of_its_own(first, tmp_path, capfd):
    before = contents(first.output_dir)
    page = Path(write_report(first.output_dir, tmp_path / "before.html")).read_text()
    saved = Path(first.output_dir, "config_resolved.yaml")
    for more in ([], [f"dataloader.evaluator.output_dir={first.output_dir}"]):
        run = stage_interactor.train(
            saved, ["model.max_detections=1", *more], checkpoint=first.checkpoint, eval_only=True
        )
        assert run.output_dir == str(Path(first.output_dir, EVALUATION))
        found = json.loads(Path(run.path("coco_instances_results.json")).read_text())
        assert len(found) == 8  # one an image
        assert run.metrics == json.loads(Path(run.path("results.json")).read_text())
        assert "holds a training, which stays as it is" in capfd.readouterr().out
    own = {path: data for path, data in contents(first.output_dir).items() if path in before}
    assert own == before
    assert Path(write_report(first.output_dir, tmp_path / "after.html")).read_text() == page
    # Where no training lies it writes where it was told, again and again.
    for _ in range(2):
        run = stage_interactor.train(
            saved, checkpoint=first.checkpoint, output_dir=tmp_path / "own", eval_only=True
        )
        assert run.output_dir == str(tmp_path / "own") and run.metrics


def test_pictures_that_cannot_be_drawn_cost_no_result(first, tmp_path, monkeypatch, capfd):
    def broken(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(evaluation, "save_detection_grid", broken)
    saved = Path(first.output_dir, "config_resolved.yaml")
    run = stage_interactor.train(saved, output_dir=tmp_path)
    assert run.metrics["bbox"].keys() == first.metrics["bbox"].keys()
    assert "bbox/AP50" in (tmp_path / "metrics.json").read_text() and run.checkpoint
    assert "detections.jpg could not be drawn: OSError: no space left" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "model.decoder.parts.sampler = lambda **sizes: None",
            "could not hold model.decoder.parts",
        ),
        ("model._target_ = '__gone__.Model'", "model._target_ is '__gone__.Model'"),
        ("train.max_iter = '${half:8}'", "train.max_iter cannot be resolved"),
        ("train.output_dir = '${trian.folder}'", "train.output_dir cannot be resolved"),
    ],
)
def test_what_a_file_cannot_hold_is_told_in_a_line(lines, message, tmp_path):
    config = tmp_path / "own.py"
    config.write_text(
        f"from stage_interactor.config import load_config\n"
        f"base = load_config('{ROOT}/tests/tiny_config.py')\n"
        "model, train, dataloader, optimizer, lr_multiplier, shapes = (base[name] for name in "
        "('model', 'train', 'dataloader', 'optimizer', 'lr_multiplier', 'shapes'))\n"
        f"del base\n{lines}\n"
    )
    save_config(load_config(config), tmp_path / "saved.yaml")
    with pytest.raises(ConfigError, match=message) as told:
        stage_interactor.train(tmp_path / "saved.yaml")
    assert "\n" not in str(told.value)
