import re

import pytest
import torch
import torchvision

from stage_interactor.modeling import BackboneError, ChannelMapper, TimmBackbone, timm_channels
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
    with pytest.raises(BackboneError, match="cannot reach the hub.*pretrained=False"):
        TimmBackbone(name="resnet50", pretrained=True)


def test_a_neck_of_other_levels_than_the_backbone_is_an_error():
    with pytest.raises(ValueError, match="the neck has 3 levels"):
        ChannelMapper(in_channels=[4, 4, 4])({"a": torch.zeros(1, 4, 2, 2)})


def test_layers_beyond_the_coarsest_map_are_left_out():
    backbone = TimmBackbone(name="resnet18", pretrained=False, strides=(4, 8, 16))
    assert backbone.channels == timm_channels("resnet18", (4, 8, 16)) == [64, 128, 256]
    assert not any("layer4" in name for name, _ in backbone.named_parameters())


def test_swin_pads_to_whole_windows_before_it_shifts_as_torchvisions_does():
    shape = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
    backbone = TimmBackbone(
        name="swin_small_patch4_window7_224", pretrained=False, frozen_stages=0, **shape
    ).eval()
    reference = torchvision.models.SwinTransformer(
        [4, 4], 24, [2, 2, 2, 2], [1, 2, 4, 8], [7, 7]
    ).eval()
    renamed = {}
    for key in backbone.network.state_dict():
        name = key.replace("patch_embed.proj", "features.0.0")
        name = name.replace("patch_embed.norm", "features.0.2")
        name = re.sub(r"layers_(\d).blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name)
        name = re.sub(r"layers_(\d).downsample", lambda m: f"features.{2 * int(m[1])}", name)
        renamed[key] = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
    weights = reference.state_dict()
    backbone.network.load_state_dict({key: weights[name] for key, name in renamed.items()})
    images = torch.randn(1, 3, 288, 352)  # no map of it is a multiple of the window
    expected, features = [], images
    for index, part in enumerate(reference.features):
        features = part(features)
        if index % 2:
            expected.append(features.permute(0, 3, 1, 2))
    with torch.no_grad():
        maps = backbone(images).values()
    for got, want in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_every_map_of_swin_gets_a_norm_of_its_own():
    backbone = TimmBackbone(
        name="swin_tiny_patch4_window7_224", pretrained=False, frozen_stages=0, output_norm=True
    )
    for level, width in zip(backbone(torch.randn(1, 3, 64, 96)).values(), (96, 192, 384, 768)):
        assert level.shape[1] == width
        torch.testing.assert_close(
            level.mean(1), torch.zeros_like(level.mean(1)), atol=1e-4, rtol=0
        )


def test_deformable_convolutions_start_as_plain_ones_and_learn_to_deform():
    options = dict(
        name="resnet50", pretrained=False, layers=(1, 1, 1, 1), zero_init_last=False,
        frozen_stages=0,
    )  # fmt: skip
    plain = TimmBackbone(**options).eval()
    deformable = TimmBackbone(**options, deformable_strides=(8, 16, 32)).eval()
    state = deformable.state_dict()
    offsets = {key for key in state if "conv_offset" in key}
    assert {key.split(".")[1] for key in offsets} == {"layer2", "layer3", "layer4"}
    deformable.load_state_dict(plain.state_dict() | {key: state[key] for key in offsets})
    images = torch.randn(1, 3, 64, 96)
    for got, want in zip(deformable(images).values(), plain(images).values()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    deformable(images)["stride32"].square().sum().backward()
    convolution = deformable.network.layer4[0].conv2
    assert convolution.stride == (2, 2)
    assert convolution.conv_offset.weight.grad.abs().sum() > 0
    torch.nn.init.constant_(convolution.conv_offset.bias, 0.5)
    assert not torch.allclose(deformable(images)["stride32"], plain(images)["stride32"])


def test_deformable_convolutions_need_bottlenecks():
    with pytest.raises(ValueError, match="deformable_strides"):
        TimmBackbone(name="resnet18", pretrained=False, deformable_strides=(8,))
    with pytest.raises(ValueError, match="deformable_strides has 64"):
        TimmBackbone(name="resnet50", pretrained=False, deformable_strides=(64,))


def test_the_neck_names_what_does_not_fit():
    with pytest.raises(ValueError, match="16 channels.*norm_groups=32"):
        ChannelMapper(in_channels=[4], out_channels=16)
    with pytest.raises(ValueError, match=r"looks for \['p2'\]"):
        ChannelMapper(in_channels=[4], in_features=["p2"])({"res2": torch.zeros(1, 4, 2, 2)})
    neck = ChannelMapper(in_channels=[4], out_channels=16, norm_groups=None)
    assert [name for name, _ in neck.named_parameters()] == ["convs.0.weight", "convs.0.bias"]
