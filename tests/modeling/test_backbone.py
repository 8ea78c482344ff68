import pytest
import torch

from stage_interactor.modeling import ChannelMapper, TimmBackbone, timm_channels
from stage_interactor.modeling import backbone as backbone_module


def test_maps_have_the_strides_and_channels_that_timm_names():
    backbone = TimmBackbone(name="test_resnet", pretrained=False)
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        (width, 64 // stride, 96 // stride)
        for width, stride in zip(timm_channels("test_resnet"), (4, 8, 16, 32))
    ]
    neck = ChannelMapper(in_channels=timm_channels("test_resnet"), out_channels=32)
    assert all(level.shape[1] == 32 for level in neck(maps))


def test_the_stem_and_the_first_stage_are_frozen_and_statistics_stay():
    backbone = TimmBackbone(name="resnet18", pretrained=False, frozen_stages=1).train()
    frozen = {n.split(".")[1] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    before = norms[-1].running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(norms[-1].running_mean, before)
    assert backbone.network.layer2[0].bn1.weight.requires_grad


def test_from_scratch_everything_trains():
    backbone = TimmBackbone(
        name="resnet18", pretrained=False, frozen_stages=0, freeze_norm=False
    ).train()
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(m.training for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_an_unknown_name_lists_similar_ones():
    with pytest.raises(ValueError, match="timm has no model 'resnet5O'.*resnet"):
        TimmBackbone(name="resnet5O", pretrained=False)


def test_a_network_without_the_four_strides_is_an_error():
    with pytest.raises(ValueError, match=r"strides .*the detector needs \(4, 8, 16, 32\)"):
        TimmBackbone(name="vit_tiny_patch16_224", pretrained=False)


def test_unreachable_pretrained_weights_give_advice(monkeypatch):
    create_model = backbone_module.timm.create_model

    def unreachable(*args, pretrained, **kwargs):
        if pretrained:
            raise OSError("cannot reach the hub")
        return create_model(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(backbone_module.timm, "create_model", unreachable)
    with pytest.raises(RuntimeError, match="cannot reach the hub.*pretrained=False"):
        TimmBackbone(name="resnet50", pretrained=True)


def test_a_neck_of_other_levels_than_the_backbone_is_an_error():
    with pytest.raises(ValueError, match="the neck has 3 levels"):
        ChannelMapper(in_channels=[4, 4, 4])({"a": torch.zeros(1, 4, 2, 2)})


def test_layers_beyond_the_coarsest_map_are_left_out():
    backbone = TimmBackbone(name="resnet18", pretrained=False, strides=(4, 8, 16))
    assert backbone.channels == timm_channels("resnet18", (4, 8, 16)) == [64, 128, 256]
    assert not any("layer4" in name for name, _ in backbone.named_parameters())
