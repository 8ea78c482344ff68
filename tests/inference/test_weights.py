"""Which weights a file gives, and which files give none."""

import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.config import instantiate, load_config
from stage_interactor.engine import CheckpointError
from stage_interactor.engine.checkpoint import Checkpointer
from stage_interactor.inference.blueprint import Blueprint, load_model
from stage_interactor.inference.weights import choose_weights, load_weights, read_checkpoint
from stage_interactor.untrusted.tensors import require_finite


def content(**parts):
    state = {"a.weight": torch.ones(2, 3), "norm.running_mean": torch.zeros(2)}
    averages = {f"module.{key}": value + 1 for key, value in state.items()}
    optimizer = {"state": {7: {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0)}}}
    trainer = {"optimizer": optimizer, "best": math.nan}  # a figure, of an evaluation of nothing
    return {
        "model": state,
        "ema": averages,
        "trainer": trainer,
        "counts": [torch.arange(3)],
    } | parts


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "where",
    ["model.a.weight", "model.norm.running_mean", "ema.module.a.weight",
     "trainer.optimizer.state.7.exp_avg"],
)  # fmt: skip
def test_a_value_that_is_not_finite_is_named_by_its_tensor(tmp_path, where, value):
    path = str(tmp_path / "c.pth")
    torch.save(content(), path)
    assert read_checkpoint(path)["model"].keys() == content()["model"].keys()
    damaged = content()
    tensor = {
        "model.a.weight": damaged["model"]["a.weight"],
        "model.norm.running_mean": damaged["model"]["norm.running_mean"],
        "ema.module.a.weight": damaged["ema"]["module.a.weight"],
        "trainer.optimizer.state.7.exp_avg": damaged["trainer"]["optimizer"]["state"][7]["exp_avg"],
    }[where]
    tensor.view(-1)[-1] = value
    torch.save(damaged, path)
    for options in ({}, {"mmap": True}):
        with pytest.raises(
            CheckpointError, match=f"c.pth: 1 tensors hold NaN .*: {where}\\. .*earl"
        ):
            read_checkpoint(path, **options)


def test_files_of_every_kind_are_read_with_the_same_care(tmp_path):
    bad = {f"layer{index}": torch.full((2,), math.nan) for index in range(5)}
    torch.save(bad, tmp_path / "bare.pth")
    torch.save(bad, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(bad, tmp_path / "s.safetensors")
    for name in ("bare.pth", "legacy.pth", "s.safetensors"):
        with pytest.raises(CheckpointError, match=r"5 tensors.*layer0, .*layer2, \.\.\.\."):
            read_checkpoint(str(tmp_path / name))
    arrays = {"model": {"conv": np.array([1.0, np.inf], np.float32), "ids": np.arange(2)}}
    with pytest.raises(CheckpointError, match=r"R-50.pkl: 1 tensors .*model.conv"):
        require_finite(arrays, "R-50.pkl")  # of detectron2's model zoo
    half = {"w": torch.tensor([1, math.inf], dtype=torch.float16), "n": torch.tensor(5)}
    with pytest.raises(CheckpointError, match="1 tensors"):
        require_finite(half, "h.pth")


def other_shape(averages):
    averages["module.a.weight"] = torch.ones(2, 4)


def one_less(averages):
    del averages["module.a.weight"]


def other_keys(averages):
    averages["module.b.weight"] = averages.pop("module.a.weight")


@pytest.mark.parametrize(
    ("change", "told"),
    [(other_shape, r"of another shape \(averaged, trained\)"), (one_less, "1 keys missing"),
     (other_keys, "1 keys unexpected: .'b.weight'")],
)  # fmt: skip
def test_averages_that_do_not_fit_are_refused(tmp_path, change, told):
    damaged = content()
    change(damaged["ema"])
    torch.save(damaged, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=f"c.pth: its averaged weights do not fit .*{told}"):
        read_checkpoint(str(tmp_path / "c.pth"))


@pytest.mark.parametrize(
    "what",
    [[torch.ones(1)], {}, {"state_dict": {}, "meta": {}}, {"model": {}, "ema": {}}, {"ema": {}}],
)
def test_a_file_without_weights_is_told(tmp_path, what):
    torch.save(what, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="c.pth holds .*no weights|c.pth holds no weights"):
        read_checkpoint(str(tmp_path / "c.pth"))


def test_averages_are_taken_where_there_are_any_and_said(caplog):
    caplog.set_level(logging.INFO, "stage_interactor")
    for averaged, mean, told in (
        (None, 2, "averaged weights of c.pth"),
        (True, 2, "averaged weights of c.pth"),
        (False, 1, "trained weights, not their averages, of c.pth"),
    ):
        weights = choose_weights(content(), "c.pth", averaged)
        assert weights.keys() == content()["model"].keys()
        assert weights["a.weight"].mean() == mean and told in caplog.messages[-1]
    for averaged in (None, False):
        weights = choose_weights(content(ema={}), "c.pth", averaged)
        assert weights["a.weight"].mean() == 1 and "holds no averages" in caplog.messages[-1]
    with pytest.raises(CheckpointError, match="c.pth holds no averaged weights"):
        choose_weights(content(ema={}), "c.pth", True)
    wrapped = {f"module.{key}": value for key, value in content()["model"].items()}
    assert choose_weights({"model": wrapped}, "c.pth", None).keys() == content()["model"].keys()


OVERRIDES = ["model.queries.num_queries=8", "model.num_classes=2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights from scratch, and averages with a bias of the classes that is larger by 3."""
    cfg = load_config("configs/quickstart.py", OVERRIDES)
    model = instantiate(cfg.model)
    averages = {f"module.{key}": value.clone() for key, value in model.state_dict().items()}
    for key, value in averages.items():
        if "cls_out.bias" in key:
            value += 3
    blueprint = Blueprint.of_run(cfg, [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict(), "ema": averages, **blueprint.as_extra()}, path)
    return path


def damaged(checkpoint, path, **parts):
    torch.save(torch.load(checkpoint, weights_only=True) | parts, path)
    return str(path)


KEY = "decoder.stages.2.head.cls_out.bias"


def bias(model):
    return model.state_dict()[KEY].mean().item()


def test_a_detector_takes_what_it_is_asked_for(checkpoint, tmp_path):
    trained = bias(load_model(str(checkpoint), averaged=False)[0])
    for averaged in (None, True):
        detector = Detector.from_checkpoint(checkpoint, averaged=averaged, device="cpu")
        assert bias(detector.model.model) == pytest.approx(trained + 3)
    plain = damaged(checkpoint, tmp_path / "plain.pth", ema={})
    assert bias(load_model(plain)[0]) == pytest.approx(trained)
    with pytest.raises(CheckpointError, match="plain.pth holds no averaged weights"):
        Detector.from_checkpoint(plain, averaged=True)


def test_commands_say_which_weights_they_take(checkpoint, tmp_path, capsys, caplog):
    picture = "tests/files/picture.png"
    commands = {
        "predict": ["--device", "cpu", "--output-dir", str(tmp_path), picture],
        "stages": ["--output", str(tmp_path / "stages.png"), picture],
        "export": ["--format", "safetensors", "--output", str(tmp_path / "m.safetensors")],
    }
    cards = []
    for name, arguments in commands.items():
        given = [name, "--checkpoint", str(checkpoint), *arguments]
        assert main(given) == 0
        cards += [path.read_text() for path in tmp_path.glob("m.md")]
        assert "Loading the averaged weights of" in caplog.messages[-1]
        assert main([*given, "--trained-weights"]) == 0
        assert "Loading the trained weights, not their averages, of" in caplog.messages[-1]
    exported = load_model(str(tmp_path / "m.safetensors"))[0]
    assert bias(exported) == pytest.approx(bias(load_model(str(checkpoint), averaged=False)[0]))
    assert "averaged weights" in cards[0]
    assert "averaged weights" not in (tmp_path / "m.md").read_text()  # of the file that is there


def test_nothing_uses_weights_that_are_not_finite(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["model"][KEY][0] = math.nan
    path = str(tmp_path / "nan.pth")
    torch.save(content, path)
    told = f"nan.pth: 1 tensors hold NaN or infinite values: model.{KEY}"
    for command in (
        ["predict", "tests/files/picture.png"],
        ["stages", "tests/files/picture.png"],
        ["export"],
    ):
        assert main([command[0], "--checkpoint", path, *command[1:]]) == 2
        assert told in capsys.readouterr().err
    model = load_model(str(checkpoint))[0]
    for load in (
        lambda: load_weights(model, path),
        lambda: Checkpointer(model).load(path),
        lambda: Checkpointer(model, strict=False).load(path),
    ):
        with pytest.raises(CheckpointError, match=told):
            load()


def test_resuming_refuses_averages_that_do_not_fit(checkpoint, tmp_path):
    averages = torch.load(checkpoint, weights_only=True)["ema"]
    averages["module.other"] = averages.pop(f"module.{KEY}")
    path = damaged(checkpoint, tmp_path / "c.pth", ema=averages)
    with pytest.raises(CheckpointError, match="averaged weights do not fit.*'other'"):
        Checkpointer(load_model(str(checkpoint))[0]).load(path)
