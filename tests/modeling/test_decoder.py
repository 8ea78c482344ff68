import math

import pytest
import torch
from checks.small import tiny_model

from stage_interactor.modeling import CascadeMixing, StaticMixing, VanillaSampler, build_decoder
from stage_interactor.modeling.geometry import boxes_to_xyzr, position_embedding, xyzr_to_boxes

SMALL = dict(embed_dim=16, num_groups=2, num_heads=2, feedforward_dim=32, out_points=8)


def test_every_stage_from_the_third_reuses_all_earlier_filters_but_the_first():
    decoder = build_decoder(**SMALL, num_points=(16, 8, 8, 8, 8, 8))
    reused = [len(stage.mixing.channel_reuse) for stage in decoder.stages]
    assert reused == [0, 0, 1, 2, 3, 4]
    assert [stage.mixing.spatial_reuse is not None for stage in decoder.stages] == [
        reuse > 0 for reuse in reused
    ]


def test_at_most_so_many_filters_are_reused_and_they_are_the_latest():
    torch.manual_seed(0)
    mixing = CascadeMixing(embed_dim=16, num_groups=2, num_points=8, out_points=8, num_reused=1)
    torch.nn.init.normal_(mixing.out.weight)
    sampled, content = torch.randn(1, 2, 2, 8, 8), torch.randn(1, 2, 16)
    old, new = (mixing.generate(torch.randn(1, 2, 16)) for _ in range(2))
    old, new = (type(f)(*(torch.randn_like(part) for part in f)) for f in (old, new))
    latest, _ = mixing(sampled, content, [new])
    both, _ = mixing(sampled, content, [old, new])
    other, _ = mixing(sampled, content, [old])
    torch.testing.assert_close(both, latest)
    assert not torch.allclose(both, other)
    decoder = build_decoder(**SMALL, num_points=(16, 8, 8, 8, 8), max_reused_filters=2)
    assert [len(stage.mixing.channel_reuse) for stage in decoder.stages] == [0, 0, 1, 2, 2]


def test_full_size_stages_have_the_parameters_of_the_release():
    decoder = build_decoder(variant="release")
    millions = [sum(p.numel() for p in stage.parameters()) / 1e6 for stage in decoder.stages]
    # The release has in each reuse step also a layer that does nothing: D -> G * P outputs.
    idle = [max(index - 1, 0) * 257 * 4 * 32 / 1e6 for index in range(6)]
    expected = [22.72, 18.50, 17.05, 17.61, 18.17, 18.72]
    assert [round(a + b, 2) for a, b in zip(millions, idle)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(embed_dim=20), "embed_dim 20 must be divisible by num_groups 2"),
        (dict(embed_dim=12, num_heads=2), "divisible by .* 8"),
        (dict(num_points=(16, 12, 12)), "power of two, got 12"),
        (dict(num_points=()), "at least one stage"),
        (dict(first_reusing_stage=0), "stage 0 has no earlier stage"),
        (dict(first_reusing_stage=1), "must be equal from stage 0 on"),
        (dict(num_points=(16, 8, 8, 16)), "must be equal from stage 1 on"),
        (dict(max_reused_filters=0), "max_reused_filters must be at least 1"),
        (dict(out_points=7), "out_points must be even"),
        (dict(sampler="grid"), "sampler must be .* got 'grid'"),
        (dict(static_mixing="all"), "static_mixing must be one of .* got 'all'"),
        (dict(variant="paper"), "variant must be .* got 'paper'"),
        (dict(static_mixing="none", dynamic_reuse=False), "set first_reusing_stage=None"),
        (dict(static_mixing="none", variant="release"), "use variant='supplement'"),
        (dict(refinement="pixels"), "refinement must be .* got 'pixels'"),
    ],
)
def test_sizes_that_do_not_fit_together_fail_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        build_decoder(**SMALL | dict(num_points=(16, 8, 8)) | options)


@pytest.mark.parametrize("sampler", ["two_stage", "vanilla", "group_init"])
@pytest.mark.parametrize("static_mixing", ["none", "channel", "spatial", "channel_spatial"])
@pytest.mark.parametrize("dynamic_reuse", [True, False])
def test_every_part_can_be_switched(sampler, static_mixing, dynamic_reuse):
    if static_mixing == "none" and not dynamic_reuse:
        pytest.skip("nothing would be left in a reuse step: an error, tested above")
    decoder = build_decoder(
        **SMALL,
        num_points=(16, 8, 8, 8),
        sampler=sampler,
        static_mixing=static_mixing,
        dynamic_reuse=dynamic_reuse,
        num_classes=3,
    )
    features = [torch.randn(2, 16, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    xyzr = boxes_to_xyzr(torch.tensor([[0.0, 0.0, 64.0, 48.0]])).expand(2, 5, 4)
    outputs = decoder(features, torch.randn(2, 5, 16), xyzr)
    assert outputs[-1].logits.shape == (2, 5, 3)
    sum(o.logits.sum() + o.boxes.sum() for o in outputs).backward()
    idle = [n for n, p in decoder.named_parameters() if p.grad is None]
    assert idle == []  # DistributedDataParallel needs no find_unused_parameters
    names = " ".join(name for name, _ in decoder.named_parameters())
    assert ("static" in names) == (static_mixing != "none")
    assert ("gates" in names) == dynamic_reuse


def test_other_levels_than_the_sampler_was_built_for_are_an_error():
    decoder = build_decoder(**SMALL, num_points=(8, 8), strides=(8, 16))
    with pytest.raises(ValueError, match=r"built for levels of strides \(8, 16\) but got 1"):
        decoder([torch.zeros(1, 16, 8, 8)], torch.zeros(1, 1, 16), torch.zeros(1, 1, 4))


def test_any_number_of_levels_and_stages_works():
    decoder = build_decoder(**SMALL, num_points=(8, 8), strides=(8, 16), num_classes=3)
    features = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
    xyzr = boxes_to_xyzr(torch.tensor([[0.0, 0.0, 64.0, 64.0]]))[None]
    assert len(decoder(features, torch.randn(1, 1, 16), xyzr)) == 2


def test_group_init_starts_where_the_two_stage_sampler_can_start():
    """Its offsets are an outer plus an inner one: rank-one differences in every group."""
    sampler = VanillaSampler(embed_dim=16, num_groups=2, num_points=16, init="grouped")
    bias = sampler.offsets.bias.view(2, 4, 4, 3)
    outer = bias - bias[:, :, :1]
    torch.testing.assert_close(outer, outer[:, :1].expand_as(outer))
    assert outer.abs().max() > 0.05


def test_a_finer_level_is_preferred_for_smaller_points():
    sampler = VanillaSampler(embed_dim=16, num_groups=2, num_points=8)
    weights = sampler.level_weights(torch.tensor([3.0, 4.0, 6.0]))
    assert weights.argmax(-1).tolist() == [0, 1, 3]
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))


def test_static_mixing_starts_as_nothing_and_spatial_mixing_treats_channels_alike():
    points, nothing = torch.randn(2, 8, 6), torch.zeros(2, 8, 6)
    for kind in ("channel", "spatial", "channel_spatial"):
        static = StaticMixing(kind, num_points=8, group_dim=6)
        assert static(points, nothing).abs().max() == 0
    spatial = StaticMixing("spatial", num_points=8, group_dim=6)
    for parameter in spatial.parameters():
        torch.nn.init.normal_(parameter)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(
        spatial(points[..., order], nothing), spatial(points, nothing)[..., order]
    )


def test_positions_and_boxes_are_inverse():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 30.0], [0.0, 0.0, 7.0, 70.0]])
    xyzr = boxes_to_xyzr(boxes)
    torch.testing.assert_close(xyzr_to_boxes(xyzr), boxes)
    assert xyzr[0, 2].item() == pytest.approx(math.log2(20))
    assert xyzr[0, 3].item() == pytest.approx(-2)


def test_position_embedding_lets_no_gradient_through():
    xyzr = torch.rand(1, 2, 4, requires_grad=True)
    assert not position_embedding(xyzr, 16).requires_grad


def test_a_stage_refines_the_boxes_of_the_one_before_without_gradient_between_them():
    model = tiny_model()
    features = [torch.randn(1, 16, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    seen = []
    model.decoder.stages[1].register_forward_pre_hook(lambda _, args: seen.append(args))
    content, xyzr = model.queries(torch.tensor([[64, 64]]))
    outputs = model.decoder(features, content, xyzr)
    assert not seen[0][2].requires_grad and seen[0][1].requires_grad
    torch.testing.assert_close(seen[0][2], outputs[0].xyzr.detach())
