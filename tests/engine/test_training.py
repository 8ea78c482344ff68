"""stage_interactor.train: a run from Python, in this process."""

import json
import logging
import os
import shutil
import signal
import threading

import pytest
import torch

import stage_interactor
from stage_interactor.config import ConfigError
from stage_interactor.d2 import RUNTIME
from stage_interactor.d2.logger import setup_logger
from stage_interactor.data import ImageReadError
from stage_interactor.engine import CheckpointError
from stage_interactor.modeling import BackboneError

CONFIG = "tests/tiny_config.py"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "shapes"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(str(__file__).split("/tests/")[0])


@pytest.fixture
def small(shapes):
    return [f"shapes.root={shapes}", "train.max_iter=2", "train.device=cpu"]


def test_a_run_returns_its_figures_and_where_its_files_are(small, tmp_path):
    run = stage_interactor.train(CONFIG, small, output_dir=tmp_path)
    assert run.output_dir == str(tmp_path)
    assert run.metrics["bbox"].keys() >= {"AP", "AP50", "AP-ring"}
    assert run.metrics == json.loads((tmp_path / "results.json").read_text())
    assert run.checkpoint == str(tmp_path / "model_final.pth")
    assert run.best_checkpoint == str(tmp_path / "model_best.pth")
    assert run.path("detections.jpg") and run.path("nonsense.txt") is None
    again = stage_interactor.train(CONFIG, small, checkpoint=run.checkpoint, eval_only=True,
                                   output_dir=tmp_path / "evaluated")  # fmt: skip
    assert again.metrics.keys() == run.metrics.keys() and again.checkpoint is None


def test_a_config_object_gives_what_its_file_gives_and_stays_as_it_is(small, tmp_path):
    config = stage_interactor.get_config(CONFIG, small)
    before = str(config)
    runs = [
        stage_interactor.train(given, overrides, output_dir=tmp_path / name)
        for name, given, overrides in (("object", config, []), ("file", CONFIG, small))
    ]
    assert str(config) == before
    weights = [torch.load(run.checkpoint, weights_only=True)["model"] for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert runs[0].metrics["bbox"] == pytest.approx(runs[1].metrics["bbox"], nan_ok=True)


def test_two_runs_of_a_process_have_a_log_each_and_leave_the_loggers_as_they_were(
    small, tmp_path, capfd, monkeypatch
):
    names = ("stage_interactor", "fvcore", "detectron2")
    for name in names:  # that other tests of this process have set up
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    if hasattr(setup_logger, "cache_clear"):
        setup_logger.cache_clear()
    before = {name: list(logging.getLogger(name).handlers) for name in names}
    for name in ("a", "b"):
        stage_interactor.train(CONFIG, small, output_dir=tmp_path / name)
        told = capfd.readouterr().out
        assert told.count("Finished. Checkpoint") == 1 and f"/{name}/model_final.pth" in told
    assert {name: list(logging.getLogger(name).handlers) for name in names} == before
    for name, other in (("a", "b"), ("b", "a")):
        log = (tmp_path / name / "log.txt").read_text()
        assert f"/{name}/model_final.pth" in log and f"/{other}/model_final.pth" not in log
    # The log of a run that goes on is appended to.
    stage_interactor.train(CONFIG, small, output_dir=tmp_path / "a", resume=True)
    assert "Nothing to train" in (tmp_path / "a/log.txt").read_text()


def test_signals_are_given_back_and_other_threads_can_train(small, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    done = []
    thread = threading.Thread(
        target=lambda: done.append(
            stage_interactor.train(CONFIG, small, output_dir=tmp_path / "thread")
        )
    )
    thread.start()
    thread.join()
    assert done[0].metrics
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_run_that_fails_gives_back_the_loggers_too(small, tmp_path):
    before = list(logging.getLogger("stage_interactor").handlers)
    with pytest.raises(BackboneError):
        stage_interactor.train(
            "quickstart.py", [*small, "model.backbone.name=nonsense"], output_dir=tmp_path
        )
    assert logging.getLogger("stage_interactor").handlers == before


@pytest.mark.skipif(
    torch.cuda.is_available() or RUNTIME == "detectron2",
    reason="several processes would need as many GPUs",
)
@pytest.mark.parametrize("kind", ["object", "file"])
def test_several_processes_from_python(kind, small, tmp_path):
    config = stage_interactor.get_config("quickstart.py") if kind == "object" else "quickstart.py"
    small = [*small, "shapes.num_train=8", "shapes.num_val=4", "shapes.image_size=64",
             "dataloader.train.total_batch_size=2", "train.amp.enabled=false"]  # fmt: skip
    run = stage_interactor.train(config, small, output_dir=tmp_path / "a, (b)", num_gpus=2)
    assert run.metrics["bbox"] and run.checkpoint
    assert (tmp_path / "a, (b)/log.txt.rank1").exists()


def test_a_preset_is_for_data(tmp_path):
    with pytest.raises(ConfigError, match="a config has its schedule"):
        stage_interactor.train("quickstart.py", preset="nano", output_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        stage_interactor.train("not_there")


def test_mistakes_are_told(small, tmp_path):
    with pytest.raises(ConfigError, match="overrides must be a list"):
        stage_interactor.train(CONFIG, "train.max_iter=2")
    with pytest.raises(ConfigError, match="num_gpus is -1"):
        stage_interactor.train(CONFIG, small, num_gpus=-1)
    with pytest.raises(ConfigError, match="eval_only needs a config"):
        stage_interactor.train(tmp_path, eval_only=True)
    with pytest.raises(CheckpointError, match="nope.pth: there is no such file"):
        stage_interactor.train(CONFIG, small, checkpoint="nope.pth", output_dir=tmp_path)


@pytest.mark.parametrize("damage", ["cut off", "no image", "missing"])
def test_pictures_that_the_evaluation_would_end_at_are_found_at_the_start(
    damage, small, tmp_path, monkeypatch, shapes
):
    began = "stage_interactor.engine.process.Trainer"
    monkeypatch.setattr(began, lambda *_, **options: pytest.fail("began"))
    shutil.copytree(shapes, tmp_path / "shapes")
    picture = sorted((tmp_path / "shapes/val").iterdir())[3]
    if damage == "missing":
        picture.unlink()
    else:
        half = picture.read_bytes()[:900]
        picture.write_bytes(half if damage == "cut off" else b"<html>")
    files = [f"data.train_json={shapes}/train.json", f"data.val_json={tmp_path}/shapes/val.json",
             f"data.image_root={tmp_path}/shapes/val"]  # fmt: skip
    with pytest.raises((ImageReadError, FileNotFoundError), match=picture.name):
        small = ["model.backbone.pretrained=false", "model.backbone.name=resnet18"]
        stage_interactor.train("custom_data.py", [*files, *small], output_dir=tmp_path / "out")


def test_checkpoints_of_any_optimiser_can_be_read(small, tmp_path):
    other = ["optimizer._target_=torch.optim.Adamax", "optimizer.betas=[0.8,0.9]"]
    config = stage_interactor.get_config(CONFIG, [*small, *other])
    del config.optimizer.fused
    run = stage_interactor.train(config, output_dir=tmp_path)
    groups = torch.load(run.checkpoint, weights_only=True)["trainer"]["optimizer"]["param_groups"]
    assert groups[0]["betas"] == (0.8, 0.9)


def test_no_gpus_are_one_process_and_gradients_are_asked_for(small, tmp_path):
    with torch.no_grad():  # of whoever calls it
        assert stage_interactor.train(CONFIG, small, num_gpus=0, output_dir=tmp_path).checkpoint
        assert not torch.is_grad_enabled()


MY_PARTS = """
import functools
from stage_interactor.modeling import VanillaSampler

def factory(*, embed_dim, num_groups, num_points, strides, level_shift):
    return VanillaSampler(embed_dim=embed_dim, num_groups=num_groups, num_points=num_points,
                          strides=strides, level_shift=level_shift)

in_groups = functools.partial(VanillaSampler, init="grouped")
"""


@pytest.mark.parametrize("part", ["factory", "in_groups", "VanillaSampler"])
def test_a_part_of_one_s_own_is_trained_resumed_evaluated_and_used(
    part, small, tmp_path, monkeypatch
):
    (tmp_path / f"my_parts_{part}.py").write_text(MY_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "config.py"
    root = str(__file__).split("/tests/")[0]
    config.write_text(
        f"from stage_interactor.config import load_config\nfrom my_parts_{part} import {part}\n"
        f"base = load_config('{root}/{CONFIG}')\n"
        "dataloader, lr_multiplier, model, optimizer, train, shapes = (base[name] for name in "
        "('dataloader', 'lr_multiplier', 'model', 'optimizer', 'train', 'shapes'))\n"
        f"model.decoder.parts.sampler = {part}\ndel base\n"
    )
    output = tmp_path / "out"
    run = stage_interactor.train(config, small, output_dir=output)
    for saved in ("config.yaml", "config_resolved.yaml"):
        stage_interactor.train(output / saved, [], output_dir=output, resume=True)
    again = stage_interactor.train(config, small, output_dir=output, eval_only=True,
                                   checkpoint=run.checkpoint)  # fmt: skip
    assert again.metrics.keys() == run.metrics.keys()
    detector = stage_interactor.Detector.from_checkpoint(
        run.checkpoint, config_file=str(config), overrides=small, device="cpu"
    )
    assert detector.class_names[-1] == "ring"


def test_the_largest_picture_of_a_run_is_that_of_the_run_alone(tmp_path, monkeypatch):
    variable = "STAGE_INTERACTOR_MAX_PIXELS"
    options = [f"shapes.root={tmp_path / 'shapes'}", "train.device=cpu", "train.max_iter=1"]
    for before in (None, "1234567"):
        if before is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, before)
        stage_interactor.train(
            "tests/tiny_config.py",
            [*options, "train.max_pixels=987654"],
            output_dir=tmp_path / str(before),
        )
        assert os.environ.get(variable) == before
        with pytest.raises(ValueError):  # and of one that fails
            stage_interactor.train(
                "tests/tiny_config.py",
                [*options, "train.max_pixels=10"],
                output_dir=tmp_path / f"{before}_failed",
            )
        assert os.environ.get(variable) == before
