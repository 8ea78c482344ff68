"""A backbone's normalisation goes with it: into the model, the log and the checkpoint."""

import pytest
import torch

import stage_interactor
from stage_interactor.config import instantiate, load_config
from stage_interactor.inference.blueprint import load_model
from stage_interactor.inference.weights import read_checkpoint
from stage_interactor.modeling import timm_channels

HALF, IMAGENET = [127.5] * 3, [123.675, 116.28, 103.53]
SMALL = ["train.max_iter=1", "train.device=cpu", "shapes.num_train=4", "shapes.num_val=2",
         "shapes.image_size=64", "dataloader.train.total_batch_size=2", "train.log_period=1",
         "train.amp.enabled=false", "model.queries.num_queries=4"]  # fmt: skip


@pytest.fixture
def config():
    config = load_config("quickstart.py", SMALL)
    config.model.backbone = {key: config.model.backbone[key] for key in ("_target_", "pretrained")}
    config.model.backbone.update(
        name="test_resnet", strides=[4, 8, 16], frozen_stages=0, freeze_norm=False
    )
    config.model.neck.in_channels = timm_channels("test_resnet", (4, 8, 16))
    return config


def built(config):
    with torch.device("meta"):
        return instantiate(config.model)


def test_one_override_swaps_the_figures_and_the_user_s_own_win():
    options = ["model.backbone.pretrained=false", "model.num_classes=2"]
    cfg = load_config("custom_data.py", [*options, "model.backbone.name=tf_efficientnet_lite0"])
    mean, std, source = built(cfg).normalisation
    assert mean == std == tuple(HALF) and "tf_efficientnet_lite0" in source
    cfg = load_config(cfg, ["model.pixel_mean=[1,2,3]"])
    mean, std, source = built(cfg).normalisation
    assert (mean, std) == ((1, 2, 3), tuple(HALF)) and source == "model.pixel_mean"
    for name in ("custom_data.py", "custom/nano.py", "custom/small.py", "quickstart.py"):
        assert built(load_config(name, options)).normalisation.mean == tuple(IMAGENET)


def test_a_checkpoint_holds_plain_numbers_that_stay(config, tmp_path, capfd):
    overrides = [f"shapes.root={tmp_path}/shapes"]
    run = stage_interactor.train(config, overrides, output_dir=tmp_path / "run")
    told = "Input: RGB of 0 to 255, mean (127.5, 127.5, 127.5)"
    assert told in capfd.readouterr().out
    held = read_checkpoint(run.checkpoint)["blueprint"]["config"]["model"]
    assert held["pixel_mean"] == held["pixel_std"] == HALF
    # An older checkpoint of the same network, trained with ImageNet's figures, keeps them ...
    older = torch.load(run.checkpoint, weights_only=True)
    older["blueprint"]["config"]["model"]["pixel_mean"] = IMAGENET
    older["blueprint"]["config"]["model"]["pixel_std"] = [58.395, 57.12, 57.375]
    torch.save(older, tmp_path / "older.pth")
    saved = tmp_path / "run/config_resolved.yaml"
    for file in (None, str(saved)):
        model, blueprint = load_model(str(tmp_path / "older.pth"), file)
        assert torch.equal(model.pixel_mean.flatten(), torch.tensor(IMAGENET))
        assert blueprint.config["model"]["pixel_mean"] == IMAGENET
    # ... evaluated, trained on and resumed, unless the user sets others.
    options = dict(checkpoint=tmp_path / "older.pth", output_dir=tmp_path / "again")
    for more, mean, how in (
        ([], "(123.675, 116.28, 103.53)", dict(eval_only=True)),
        (["model.pixel_mean=[9,9,9]"], "(9, 9, 9)", dict(eval_only=True)),
        ([], "(123.675, 116.28, 103.53)", {}),
    ):
        again = stage_interactor.train(saved, more, **options, **how)
        assert f"mean {mean}" in capfd.readouterr().out
    again = stage_interactor.train(
        saved, ["train.max_iter=2"], output_dir=again.output_dir, resume=True
    )
    assert "mean (123.675, 116.28, 103.53)" in capfd.readouterr().out
    held = read_checkpoint(again.checkpoint)["blueprint"]["config"]["model"]
    assert held["pixel_mean"] == IMAGENET
