"""Vision transformers of one stride, and ViTDet's pyramid of their last map."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

from stage_interactor.modeling import BackboneError, PlainBackbone
from stage_interactor.modeling.backbone import OnMeta, normalisation_of

DINO = "vit_small_patch16_dinov3"
SMALL = dict(embed_dim=32, depth=2, num_heads=2)


def small(name=DINO, **options):
    torch.manual_seed(0)
    options = dict(pretrained=False, out_channels=16, **SMALL) | options
    return PlainBackbone(name=name, **options).eval()


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (224, 160), (32, 608)])
def test_one_map_becomes_four_of_the_detector_s_strides_for_any_size(size):
    backbone = small()
    maps = backbone(torch.randn(2, 3, *size))
    assert {name: tuple(level.shape) for name, level in maps.items()} == {
        f"stride{stride}": (2, 16, size[0] // stride, size[1] // stride)
        for stride in backbone.strides
    }
    assert backbone.channels == [16] * 4
    # Nothing of it is a constant, and every place has its own.
    assert all(
        level.flatten(2).std(2).min() > 1e-3 for level in maps.values() if level.numel() > 99
    )


def channel_norm(level, norm):
    normed = F.layer_norm(level.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, 1e-6)
    return normed.movedim(-1, 1)


def test_the_pyramid_is_vitdet_s():
    backbone = small()
    for parameter in backbone.pyramid.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        (last,) = backbone.network(images)
        maps = backbone(images)
        finest, fine, same, coarse = backbone.pyramid
        twice = F.conv_transpose2d(last, finest[0].weight, finest[0].bias, stride=2)
        twice = F.gelu(channel_norm(twice, finest[1]))
        resampled = [
            F.conv_transpose2d(twice, finest[3].weight, finest[3].bias, stride=2),
            F.conv_transpose2d(last, fine[0].weight, fine[0].bias, stride=2),
            last,
            F.max_pool2d(last, 2),
        ]
        widths = [level.shape[1] for level in resampled]
        assert widths == [8, 16, 32, 32] and finest[0].out_channels == 16
        for level, layers, found in zip(resampled, backbone.pyramid, maps.values(), strict=True):
            first, norm, second, last_norm = list(layers)[-4:]
            level = channel_norm(F.conv2d(level, first.weight), norm)
            level = channel_norm(F.conv2d(level, second.weight, padding=1), last_norm)
            torch.testing.assert_close(found, level, rtol=1e-4, atol=1e-5)
    assert len(same) == 4 and len(coarse) == 5


@pytest.mark.parametrize("name", [DINO, "vit_base_patch16_siglip_224"])
def test_the_map_is_the_network_s_last_behind_its_own_norm(name):
    backbone = small(name)
    for key, parameter in backbone.network.named_parameters():
        if "norm" in key:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    network = timm.create_model(name, dynamic_img_size=True, num_classes=0, **SMALL).eval()
    network.load_state_dict(backbone.network.model.state_dict(), strict=False)
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        (expected,) = network.forward_intermediates(
            images, indices=1, norm=True, intermediates_only=True
        )
        (found,) = backbone.network(images)
    assert torch.equal(found, expected)


def test_rotary_positions_are_timm_s_to_the_bit():
    rope = small().network.model.rope
    assert type(rope) is not RotaryEmbeddingDinoV3
    for shape in ((14, 14), (5, 7), (50, 84), (1, 3)):
        expected = RotaryEmbeddingDinoV3.get_embed(rope, shape)
        assert torch.equal(rope.get_embed(shape), expected) and len(expected) == shape[0] * shape[1]


def test_a_graph_of_it_takes_images_of_any_size():
    backbone = small(depth=1)
    sides = {axis: 32 * torch.export.Dim(f"side{axis}", max=64) for axis in (2, 3)}
    shapes = ({0: torch.export.Dim("batch"), **sides},)
    with torch.no_grad():
        images = torch.randn(2, 3, 128, 160)
        graph = torch.export.export(backbone, (images,), dynamic_shapes=shapes).module()
        for size in ((1, 3, 96, 64), (3, 3, 64, 288)):
            images = torch.randn(size)
            for ours, theirs in zip(graph(images).values(), backbone(images).values(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# A small network of many families, all with maps of stride 16.
FAMILIES = """deit3_small_patch16_224 deit_small_distilled_patch16_224 eva02_base_patch16_clip_224
    vit_base_patch16_224.mae vit_base_patch16_clip_224
    vit_base_patch16_siglip_224 vit_pe_core_tiny_patch16_384
    vit_small_patch16_dinov3_qkvb""".split()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_other_transformers_is_trained_too(name):
    backbone = small(name).train()
    maps = backbone(torch.randn(2, 3, 96, 64))
    assert [tuple(level.shape[2:]) for level in maps.values()] == [
        (24, 16),
        (12, 8),
        (6, 4),
        (3, 2),
    ]
    sum(level.square().sum() for level in maps.values()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(name="vit_small_patch14_dinov2"), r"strides \[14\].*needs \(16,\).*vit_\*_patch16"),
        (dict(name="vit_small_patch32_224"), r"strides \[32\]"),
        (dict(name="resnet18"), r"strides \[32\].*model.backbone.name"),
        (dict(name="beit_base_patch16_224"), "cannot take images of any size.*doesn't match"),
        (dict(name="vit_small_patch16_dinov4"), "timm has no model"),
        (dict(frozen_stages=1), "unexpected keyword argument 'frozen_stages'"),
        (dict(out_indices=[5]), "takes the last map .*leave out model.backbone.out_indices"),
        (dict(embed_dim=18, num_heads=1), "cannot take images of any size"),
        (dict(name="deit_small_patch16_224", embed_dim=18, num_heads=1), "18 channels .*multiple"),
    ],
)
def test_what_does_not_serve_is_refused_in_a_line(options, told):
    with pytest.raises(BackboneError, match=told) as error:
        small(**options) if "embed_dim" in options else PlainBackbone(pretrained=False, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        (f"{DINO}.lvd1689m", (123.675, 116.28, 103.53)),
        ("vit_large_patch16_dinov3.sat493m", (109.65, 104.805, 75.48)),
        ("vit_base_patch16_siglip_224", (127.5,) * 3),
    ],
)
def test_the_input_is_normalised_as_its_weights_were_trained(name, mean):
    with OnMeta():
        found = normalisation_of(PlainBackbone(name=name, pretrained=False))
    assert found.mean == mean and name.split(".")[0] in found.source


def test_a_file_brings_the_weights_also_by_the_names_that_dinov3_gives_them(tmp_path):
    trained = {
        key: torch.rand_like(value)
        for key, value in timm.create_model(DINO, num_classes=0, **SMALL).state_dict().items()
    }
    renamed = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    theirs = {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.rand(4)}
    for key, value in trained.items():
        *path, last = key.split(".")
        theirs[".".join([*path, renamed.get(last, last)])] = value
    for name, state in (("timm.pth", trained), ("theirs.pth", theirs)):
        torch.save(state, tmp_path / name)
        ours = small(weights=str(tmp_path / name)).network.model.state_dict()
        assert ours.keys() == trained.keys()
        assert all(torch.equal(value, trained[key]) for key, value in ours.items())
    torch.save({k: v for k, v in trained.items() if k != "norm.bias"}, tmp_path / "less.pth")
    with pytest.raises(BackboneError, match="does not fit .*norm.bias"):
        small(weights=str(tmp_path / "less.pth"))


def test_layout_and_half_precision_change_no_more_than_digits():
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = small()(images)
        for layout in (True, False):
            backbone = small(channels_last=layout)
            weights = [p for p in backbone.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
            formats = {p.is_contiguous(memory_format=torch.channels_last) for p in weights}
            assert formats == {layout} and len(weights) > 6
            for name, level in backbone(images).items():
                torch.testing.assert_close(level, expected[name], rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            for name, level in small()(images).items():
                assert (level.float() - expected[name]).abs().mean() < 0.03
