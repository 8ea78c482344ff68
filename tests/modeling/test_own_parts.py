"""A stage's parts can be one's own: attention, sampler, mixing, feed-forward, head."""

from pathlib import Path

import pytest
import torch
from checks.small import random_image, tiny_model
from torch import nn

from stage_interactor.config import instantiate, load_config, save_resolved
from stage_interactor.d2.config import LazyCall as L
from stage_interactor.modeling import (
    CascadeMixing,
    FeedForward,
    OverlapAttention,
    PointSampler,
    PredictionHead,
    TwoStageSampler,
    VanillaSampler,
    build_decoder,
)
from stage_interactor.modeling.geometry import box_size, boxes_to_xyzr

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = dict(embed_dim=16, num_groups=2, num_heads=2, feedforward_dim=32, out_points=8)
STAGES = dict(SMALL, num_points=(16, 8, 8), num_classes=3)
SIZES = dict(
    attention=dict(embed_dim=16, num_heads=2),
    sampler=dict(embed_dim=16, num_groups=2, strides=(4, 8, 16, 32), level_shift=1.0),
    mixing=dict(
        embed_dim=16,
        num_groups=2,
        out_points=8,
        static_mixing="channel_spatial",
        dynamic_reuse=True,
        residual="current",
        bias=True,
        zero_output=True,
    ),
    feedforward=dict(embed_dim=16, hidden_dim=32),
    head=dict(embed_dim=16, num_classes=3, refinement="box_size"),
)
READY = dict(
    attention=OverlapAttention,
    sampler=TwoStageSampler,
    mixing=CascadeMixing,
    feedforward=FeedForward,
    head=PredictionHead,
)
OF_EACH_STAGE = dict(
    sampler=[dict(num_points=points) for points in (16, 8, 8)],
    mixing=[dict(num_points=p, num_reused=r) for p, r in ((16, 0), (8, 0), (8, 1))],
)


def own(name):
    """A part as the ready-made one, that keeps what it was built with."""

    class Own(READY[name]):
        def __init__(self, *, option=None, **sizes):
            super().__init__(**sizes)
            self.option, self.sizes = option, sizes

    return Own


class Still(nn.Module):
    """Attention that leaves the content as it is; it has no constructor."""

    def forward(self, content, xyzr):
        return content


class FewSizes(nn.Module):
    def __init__(self, hidden_dim, option=1):
        super().__init__()
        self.built = hidden_dim, option
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, content):
        return self.scale * content


def trains(model):
    losses = model.train()([random_image(2), random_image(1, seed=1)])
    sum(losses.values()).backward()
    return [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("form", ["class", "lazy_call"])
@pytest.mark.parametrize("name", list(READY))
def test_a_part_of_ones_own_reaches_every_stage_with_the_stages_sizes(name, form):
    part = own(name)
    model = tiny_model(parts={name: part if form == "class" else L(part)(option=7)})
    for index, stage in enumerate(model.decoder.stages):
        made = getattr(stage, name)
        assert type(made) is part and made.option == (7 if form == "lazy_call" else None)
        assert made.sizes == SIZES[name] | OF_EACH_STAGE.get(name, [{}] * 3)[index]
        others = set(READY) - {name}
        assert all(type(getattr(stage, other)) is READY[other] for other in others)
    assert trains(model)


def test_a_part_gets_the_sizes_that_it_names_and_its_own_options_come_first():
    parts = dict(feedforward=L(FewSizes)(option=2), attention=Still)
    model = tiny_model(parts=parts)
    assert [stage.feedforward.built for stage in model.decoder.stages] == [(32, 2)] * 3
    assert trains(model)
    parts["feedforward"] = L(FewSizes)(hidden_dim=5)
    stages = build_decoder(**STAGES, parts=parts).stages
    assert [stage.feedforward.built for stage in stages] == [(5, 1)] * 3


def test_every_stage_has_parts_of_its_own_also_those_that_are_described_inside_of_a_part():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    parts = dict(feedforward=L(Around)(inner=L(nn.Linear)(in_features=16, out_features=16)))
    inner = {stage.feedforward.inner for stage in build_decoder(**STAGES, parts=parts).stages}
    assert len(inner) == 3 and all(isinstance(layer, nn.Linear) for layer in inner)


def test_none_is_the_ready_made_part_and_a_function_can_make_one():
    def factory(num_points, **sizes):
        return VanillaSampler(num_points=num_points, init="grouped", **sizes)

    stages = build_decoder(**STAGES, parts=dict(sampler=factory, head=None)).stages
    assert [type(stage.sampler) for stage in stages] == [VanillaSampler] * 3
    assert [type(stage.head) for stage in stages] == [PredictionHead] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(parts=dict(smapler=VanillaSampler)), r"must map some of .*'sampler'.*'smapler'"),
        (dict(parts=VanillaSampler), r"model.decoder.parts must map some of .* got <class"),
        (dict(parts=dict(sampler=3)), r"model.decoder.parts.sampler must be L\(.*got 3"),
        (dict(parts=dict(head="my.Head")), r"parts.head._target_=my_module.MyPart; got 'my.Head'"),
        (dict(parts=dict(sampler=dict(init="grouped"))), r"must be L\(.*got {'init': 'grouped'}"),
        (dict(parts=dict(head=PredictionHead())), r"must be L\(.*got PredictionHead"),
        (
            dict(sampler=VanillaSampler),
            r"got <class .*VanillaSampler'>.*model.decoder.parts.sampler",
        ),
        (dict(sampler=VanillaSampler()), r"(?s)got VanillaSampler\(.*model.decoder.parts.sampler"),
    ],
)
def test_what_is_no_part_is_an_error_that_says_what_would_be(options, message):
    with pytest.raises(ValueError, match=message):
        build_decoder(**STAGES | options)


def test_a_config_names_a_part_in_its_file_and_on_the_command_line(tmp_path):
    small = [
        "model.backbone.pretrained=false",
        *(f"model.decoder.{key}={value}" for key, value in SMALL.items()),
        "model.decoder.num_points=[8,8]",
    ]
    name = "stage_interactor.modeling.VanillaSampler"
    added = f"+model.decoder.parts.sampler._target_={name}"
    cfg = load_config(
        str(CONFIGS / "stage_interactor_r50_100q_12ep.py"),
        [*small, added, "model.decoder.parts.sampler.init=grouped"],
    )
    cfg.model.decoder.parts.feedforward = FeedForward
    cfg.model.decoder.parts.head = L(PredictionHead)(prior="${model.nms_threshold}")
    cfg.model.nms_threshold = 0.25
    save_resolved(cfg, str(tmp_path / "resolved.yaml"))
    for config in (cfg, load_config(str(tmp_path / "resolved.yaml"))):
        for stage in instantiate(config.model.decoder).stages:
            assert type(stage.sampler) is VanillaSampler and type(stage.feedforward) is FeedForward
            assert stage.head.cls_out.bias[0].sigmoid().item() == pytest.approx(0.25)


def test_the_example_samples_a_regular_grid_over_the_box_of_the_query():
    run = str(CONFIGS / "own_parts/stage_interactor_r50_100q_12ep_grid_sampler.py")
    cfg = load_config(run, ["model.decoder.embed_dim=16", "model.decoder.parts.sampler.extent=0.5"])
    stages = instantiate(cfg.model.decoder).stages
    sampler = stages[1].sampler
    assert isinstance(sampler, PointSampler) and len(stages) == 6
    xyzr = boxes_to_xyzr(torch.tensor([[[8.0, 0.0, 24.0, 64.0]]]))
    xy, z = sampler.points(torch.zeros(1, 1, 16), xyzr)
    assert xy.shape == (1, 1, 4, 4, 8, 2) and z.shape == xy.shape[:-1]
    assert (z == xyzr[0, 0, 2]).all()
    torch.testing.assert_close(xy[0, 0, 3, 0, :, 0], 12.5 + torch.arange(8.0))
    torch.testing.assert_close(xy[0, 0, 0, :, 5, 1], 20 + 8 * torch.arange(4.0))
    spread = xy.flatten(2, 4).amax(2) - xy.flatten(2, 4).amin(2)
    assert (spread < 0.5 * box_size(xyzr)).all()
