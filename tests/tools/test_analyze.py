"""Counts of tools/analyze.py against the formulas of the supplement's sections A and F."""

import json
import math
from pathlib import Path

import analyze
import pytest
import torch
from checks.small import tiny_model

from stage_interactor.inference.released import DROPPED
from stage_interactor.modeling import ChannelMapper, TimmBackbone, build_decoder
from stage_interactor.modeling.mixing import StaticMixing

GOLDEN_DIR = Path(__file__).parents[1] / "golden"

N, D, G, P, P_OUT = 6, 32, 2, 8, 16
DC = D // G


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model(num_queries=N, embed_dim=D, num_points=(P, P, P), out_points=P_OUT)


@pytest.fixture(scope="module")
def flops(model):
    return analyze.count_flops(model, (64, 64))


def test_generating_and_mixing_cost_what_the_formulas_say(flops):
    by_module = flops.by_module()
    by_operator = flops.by_module_and_operator()
    for stage, rows in ((0, P_OUT), (2, P_OUT // 2)):
        mixing = f"model.decoder.stages.{stage}.mixing"
        # Section F, a multiply-add as one FLOP: N G D (Dc Dc + R P).
        assert by_module[f"{mixing}.generator"] == N * G * D * (DC * DC + rows * P)
        children = sum(
            count
            for name in ("generator", "bias_generator", "channel_reuse", "spatial_reuse", "out")
            for operator, count in by_operator.get(f"{mixing}.{name}", {}).items()
            if operator in ("matmul", "linear")
        )
        products = sum(by_operator[mixing].get(operator, 0) for operator in ("matmul", "linear"))
        assert products - children == N * G * (P * DC * DC + P_OUT * P * DC)


def test_the_ratio_of_equation_1(flops):
    assert analyze.filter_ratio(256, 4, 32) == pytest.approx(8, rel=0.01)
    # Measured: the share of the generator that makes channel filters, over the product with them.
    mixing = "model.decoder.stages.0.mixing"
    generator = flops.by_module()[f"{mixing}.generator"] * DC / (DC + P_OUT * P / DC)
    products = flops.by_module_and_operator()[mixing]["matmul"]
    channel_mixing = products * DC / (DC + P_OUT)
    # In products and sums, as the paper counts, instead of multiply-adds.
    measured = generator * (2 * D - 1) / D / (channel_mixing * (2 * DC - 1) / DC)
    assert measured == pytest.approx(analyze.filter_ratio(D, G, P))


@pytest.mark.parametrize(
    "options",
    [
        dict(name="resnet50", layers=(1, 1, 1, 1)),
        dict(name="resnext101_32x4d", layers=(1, 1, 1, 1), deformable_strides=(8, 16, 32)),
        dict(name="swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), output_norm=True),
    ],
    ids=lambda options: options["name"],
)
def test_nothing_that_computes_is_left_out(options):
    backbone = TimmBackbone(**options, pretrained=False, frozen_stages=0)
    model = tiny_model(num_queries=N, embed_dim=D, num_points=(P, P, P), out_points=P_OUT)
    model.backbone = backbone
    model.neck = ChannelMapper(in_channels=backbone.channels, out_channels=D)
    flops = analyze.count_flops(model, (64, 64))
    assert flops.total() > 0
    skipped = {name.removeprefix("aten::") for name in flops.unsupported_ops()}
    assert skipped <= {
        "unflatten",
        "view_as",
        "movedim",
        "roll",
        "pad",
        "fill_",
        "masked_fill",
        "ne",
        "eq",
    }
    reuse = flops.by_module_and_operator()["model.decoder.stages.2.mixing.channel_reuse"]
    assert reuse["mul"] >= 4 * N * G * DC * DC  # each of two gates blends in two products


def test_static_mixing_has_the_parameters_of_section_a():
    for points in (8, 32, 64):
        static = StaticMixing("channel_spatial", num_points=points, group_dim=DC)
        weights = sum(p.numel() for name, p in static.named_parameters() if "weight" in name)
        assert weights == analyze.static_parameters(points, DC)


def test_full_size_stages_have_the_released_parameters():
    with torch.device("meta"):
        stages = build_decoder(variant="release").stages
    released_keys = json.loads((GOLDEN_DIR / "released_keys.json").read_text())
    shapes = released_keys["stageinteractor_r50_1x_coco"]
    for index, stage in enumerate(stages):
        prefix = f"roi_head.bbox_head.{index}."
        theirs = sum(
            math.prod(shape)
            for key, shape in shapes.items()
            if key.startswith(prefix) and not any(part in key for part in DROPPED)
        )
        assert sum(p.numel() for p in stage.parameters()) == theirs


def test_the_report_has_every_part_once(model):
    text = analyze.report(model, (64, 64))
    lines = text.splitlines()
    assert sum("stage 2" in line for line in lines) == 1
    assert sum("mixing.channel_reuse" in line for line in lines) == 1  # stages 0 and 1 reuse none
    whole = next(line for line in lines if line.startswith("whole model"))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert float(whole.split()[2]) == pytest.approx(parameters, abs=1e-3)
    assert "equation 1" in lines[-1]


def test_deformable_convolutions_count_their_samples():
    options = dict(name="resnet50", pretrained=False, layers=(1, 1, 1, 1), frozen_stages=0)
    plain, deformable = (
        analyze.FlopCountAnalysis(TimmBackbone(**options, **more).eval(), torch.zeros(1, 3, 64, 64))
        for more in ({}, {"deformable_strides": (8,)})
    )
    deformable.set_op_handle("torchvision::deform_conv2d", analyze._deformable_convolution)
    offsets = 8 * 8 * 128 * 18 * 9  # the convolution that predicts them
    samples = 8 * 8 * 4 * 128 * 9
    assert deformable.total() - plain.total() == offsets + samples
