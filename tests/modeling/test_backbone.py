import re

import pytest
import torch
import torchvision

from stage_interactor.modeling import BackboneError, ChannelMapper, TimmBackbone, timm_channels
from stage_interactor.modeling import backbone as backbone_module
from stage_interactor.modeling.backbone import normalisation_of


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
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224"):
        with pytest.raises(
            BackboneError, match=r"strides .*needs \(4, 8, 16, 32\).*resnet, resnext.*PlainBackbone"
        ):
            TimmBackbone(name=name, pretrained=False)
    with pytest.raises(BackboneError, match=r"strides \[14\b") as error:
        TimmBackbone(name="vit_small_patch14_dinov2", pretrained=False)
    assert "PlainBackbone" not in str(error.value)


def test_an_argument_that_the_network_does_not_take_is_told():
    with pytest.raises(BackboneError, match="cannot build 'resnet18' .*'drop_paths'"):
        TimmBackbone(name="resnet18", pretrained=False, drop_paths=0.1)


def test_networks_whose_numbers_come_from_a_tensor_are_looked_at_without_memory(monkeypatch):
    create_model = backbone_module.timm.create_model
    rates = []

    def of_an_older_timm(*args, **kwargs):
        rates.append(torch.linspace(0, 0.5, 3).tolist())
        network = create_model(*args, **kwargs)
        network.register_buffer("periods", torch.ones(3, device="cpu"))
        return network

    monkeypatch.setattr(backbone_module.timm, "create_model", of_an_older_timm)
    assert timm_channels("resnet18") == [64, 128, 256, 512] and rates == [[0, 0.25, 0.5]]
    *_, network = backbone_module.find_levels("resnet18", (4, 8, 16, 32))
    tensors = [*network.parameters(), *network.buffers()]
    assert len(tensors) > 60 and all(tensor.is_meta for tensor in tensors)


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


# A small network of many families.
WORKING = """convnext_atto convnextv2_atto cspresnet50 davit_tiny densenet121 dla34 dm_nfnet_f0
    edgenext_xx_small efficientnet_b0 efficientvit_b0 fastvit_t8 focalnet_tiny_srf hrnet_w18_small
    inception_next_atto mobilenetv3_small_050 mobilevit_xxs mvitv2_tiny pvt_v2_b0 regnety_002
    repvit_m0_9 resnext26ts sam2_hiera_tiny swinv2_tiny_window8_256 tf_efficientnet_lite0
    twins_svt_small vgg11""".split()
# What each does with an image of another size than it was trained on.
REFUSED = {
    "inception_v4": "gives maps",
    "inception_v3": "gives maps",
    "mobilevitv2_050": "gives maps",
    "maxvit_nano_rw_256": "must be divisible by window",
    "coatnet_nano_rw_224": "raises",
    "coat_tiny": "doesn't match model",
    "hiera_tiny_224": "raises",
    "efficientformer_l1": "raises",
    "efficientformerv2_s0": "raises",
    "gcvit_xxtiny": "raises",
    "halonet26t": "raises",
}


@pytest.mark.parametrize("name", WORKING)
def test_a_network_of_this_family_can_be_the_backbone(name):
    with torch.device("meta"):
        backbone = TimmBackbone(name=name, pretrained=False, frozen_stages=0)
        maps = backbone(torch.zeros(2, 3, 96, 224)).values()
    assert [tuple(level.shape) for level in maps] == [
        (2, width, 96 // stride, 224 // stride)
        for width, stride in zip(backbone.channels, backbone.strides)
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_for_images_of_one_size_is_refused_with_what_would_do(name):
    with pytest.raises(BackboneError, match=f"{REFUSED[name]}.*What can: resnet") as told:
        TimmBackbone(name=name, pretrained=False, frozen_stages=0)
    assert "\n" not in str(told.value) and f"{name!r} (model.backbone.name)" in str(told.value)


def test_swin_v2_takes_images_of_any_size():
    small = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    backbone = TimmBackbone(
        name="swinv2_tiny_window8_256", pretrained=False, frozen_stages=0, **small
    )
    levels = backbone(torch.randn(1, 3, 96, 160)).values()
    assert [tuple(level.shape[2:]) for level in levels] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert all(level.isfinite().all() for level in levels)


PAPER = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
HALF = ((127.5,) * 3, (127.5,) * 3)
CLIP = ((122.770938, 116.746013, 104.093736), (68.500533, 66.632158, 70.323163))


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("resnet50.tv_in1k", PAPER),
        ("resnet101.tv_in1k", PAPER),
        ("resnext101_32x4d.gluon_in1k", PAPER),
        ("swin_small_patch4_window7_224.ms_in1k", PAPER),
        ("resnet10t", PAPER),
        ("tf_efficientnet_lite0", HALF),
        ("tf_efficientnetv2_b0.in1k", PAPER),
        ("tf_efficientnetv2_s.in21k", HALF),
        ("convnext_base.clip_laion2b", CLIP),
        ("convnext_base.fb_in22k", PAPER),
        ("mobilevit_xxs", ((0.0,) * 3, (255.0,) * 3)),
        ("dpn68", ((124.0, 117.0, 104.0), (59.88024,) * 3)),
    ],
)
def test_a_backbone_brings_what_its_weights_were_trained_with(name, figures):
    with torch.device("meta"):
        backbone = TimmBackbone(name=name, pretrained=False, frozen_stages=0)
    found = normalisation_of(backbone)
    assert (found.mean, found.std) == figures and name.split(".")[0] in found.source


def test_a_network_inside_a_module_of_one_s_own_counts_and_others_are_imagenet_s():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = backbone_module.timm.create_model("tf_efficientnet_lite0")

    with torch.device("meta"):
        assert normalisation_of(Wrapper())[:2] == HALF
    nobody = normalisation_of(torch.nn.Conv2d(3, 4, 3))
    assert nobody[:2] == PAPER and "the backbone has none" in nobody.source


def test_of_a_network_in_one_sequence_of_blocks_the_first_can_be_frozen():
    backbone = TimmBackbone(name="tf_efficientnet_lite0", pretrained=False, frozen_stages=1)
    frozen = {
        ".".join(name.split(".")[1:3]) if "blocks" in name else name.split(".")[1]
        for name, parameter in backbone.named_parameters()
        if not parameter.requires_grad
    }
    assert frozen == {"conv_stem", "bn1", "blocks.0", "blocks.1"}
    assert backbone.train().network.blocks[2].training and not backbone.network.blocks[0].training
