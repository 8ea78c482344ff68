#!/usr/bin/env python
"""Parameters, FLOPs and activations of a model by part and stage (supplement, sections A and F).

python tools/analyze.py --config-file configs/stage_interactor_r50_100q_12ep.py [--size 800 1344]

As usual for detectors a FLOP is one multiply-add, and activations are the outputs of convolutions
and matrix products. One image; the weights do not matter.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from tabulate import tabulate
from torch import Tensor, nn

from stage_interactor.config import (
    instantiate,
    load_config,
    without_pretrained_weights,
)
from stage_interactor.errors import call
from stage_interactor.modeling import StageInteractor
from stage_interactor.modeling.sampling import group_points
from stage_interactor.ops import use_ops

STAGE_PARTS = (
    "attention", "sampler", "mixing", "mixing.generator", "mixing.bias_generator",
    "mixing.channel_reuse", "mixing.spatial_reuse", "mixing.out", "feedforward", "head",
)  # fmt: skip


class TensorsInAndOut(nn.Module):
    """The detector between normalised images and the predictions of all stages, for tracing."""

    def __init__(self, model: StageInteractor):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.model.neck(self.model.backbone(images))
        sizes = torch.tensor([images.shape[-2:]] * len(images))
        with use_ops("reference"):  # plain operations, which fvcore has rules for
            outputs = self.model.decoder(features, *self.model.queries(sizes))
        return [tensor for output in outputs for tensor in output]


def _shape(value: Any) -> list[int]:
    return value.type().sizes() or []


def _elementwise(inputs: list[Any], outputs: list[Any]) -> int:
    """One FLOP for each element of the result."""
    return math.prod(_shape(outputs[0]))


def _reduction(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(_shape(inputs[0]))


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Two matrix products: queries with keys (..., N, d), the result with values."""
    *batch, queries, width = _shape(inputs[0])
    return 2 * math.prod(batch) * queries * _shape(inputs[1])[-2] * width


def _attention_activations(inputs: list[Any], outputs: list[Any]) -> int:
    """The results of the same two products."""
    *batch, queries, _ = _shape(inputs[0])
    return math.prod(batch) * queries * _shape(inputs[1])[-2] + _elementwise(inputs, outputs)


def _deformable_convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """Products of the kernel (out, in / groups, h, w), and four products a sampled value."""
    kernel = _shape(inputs[1])
    _, channels, *_ = _shape(inputs[0])
    batch, _, height, width = _shape(outputs[0])
    sampled = 4 * channels * math.prod(kernel[2:])
    return batch * height * width * (math.prod(kernel) + sampled)


# What fvcore has no rule for, or leaves out because it is element-wise: mixing has much of it.
ELEMENTWISE = (
    "abs add add_ ceil clamp clamp_min cos div div_ exp exp2 floor floor_divide gelu lerp log log2 "
    "maximum minimum mul mul_ neg pow reciprocal relu relu_ remainder rsub sigmoid sign silu sin "
    "softmax sqrt square sub sub_ tanh"
).split()
REDUCTIONS = "sum mean amax avg_pool2d max_pool2d prod".split()
HANDLES = (
    {f"aten::{name}": _elementwise for name in ELEMENTWISE}
    | {f"aten::{name}": _reduction for name in REDUCTIONS}
    | {"aten::scaled_dot_product_attention": _attention}
    | {"torchvision::deform_conv2d": _deformable_convolution}
)


def count_flops(model: StageInteractor, size: Sequence[int]) -> FlopCountAnalysis:
    """FLOPs of one image of (height, width), by module."""
    analysis = FlopCountAnalysis(TensorsInAndOut(model).eval(), torch.zeros(1, 3, *size))
    for name, handle in HANDLES.items():
        analysis.set_op_handle(name, handle)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def filter_ratio(embed_dim: int, num_groups: int, num_points: int) -> float:
    """Equation (1): FLOPs of generating a channel filter over those of mixing with it."""
    width = embed_dim // num_groups
    return (2 * embed_dim - 1) * width * width / (num_points * (2 * width - 1) * width)


def static_parameters(num_points: int, group_dim: int) -> int:
    """Section A: weights of one static mixing, (K^2 + (P / K)^2) Dc^2."""
    across, within = group_points(num_points)
    return (across**2 + within**2) * group_dim**2


def report(model: StageInteractor, size: Sequence[int]) -> str:
    """The tables as text."""
    flops = count_flops(model, size)
    activations = ActivationCountAnalysis(TensorsInAndOut(model).eval(), torch.zeros(1, 3, *size))
    activations.set_op_handle("torchvision::deform_conv2d", _elementwise)
    activations.set_op_handle("aten::scaled_dot_product_attention", _attention_activations)
    activations.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_flops, by_activations = flops.by_module(), activations.by_module()

    def line(label: str, path: str) -> list:
        prefix = f"model.{path}".rstrip(".")
        module = model.get_submodule(path)
        parameters = sum(p.numel() for p in module.parameters())
        return [label, parameters / 1e6, by_flops[prefix] / 1e9, by_activations[prefix] / 1e6]

    lines = [line("whole model", "")]
    lines += [line(name, name) for name in ("backbone", "neck", "queries", "decoder")]
    for index, stage in enumerate(model.decoder.stages):
        lines.append(line(f"· stage {index}", f"decoder.stages.{index}"))
        for part in STAGE_PARTS:
            module = stage
            for name in part.split("."):
                module = getattr(module, name, None)
            if isinstance(module, nn.Module) and list(module.parameters()):
                indent = "· " * (2 + part.count("."))
                lines.append(line(f"{indent}{part}", f"decoder.stages.{index}.{part}"))
    headers = ["part", "parameters, M", "FLOPs, G", "activations, M"]
    text = tabulate(
        lines, headers, floatfmt=".3f", tablefmt="simple", colalign=("left",) + ("right",) * 3
    )
    skipped = dict(flops.unsupported_ops())
    text += f"\n\nOperations that no FLOPs are counted for: {', '.join(skipped)}"

    stage = model.decoder.stages[-1]
    embed_dim, groups = model.queries.content.shape[1], stage.mixing.num_groups
    points = stage.mixing.spatial_shape[1]
    ratio = filter_ratio(embed_dim, groups, points)
    text += (
        f"\nGenerating a channel filter takes {ratio:.2f} times the FLOPs of mixing with it "
        f"(equation 1; D = {embed_dim}, Dc = {embed_dim // groups}, P = {points})."
    )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1344), metavar=("H", "W"))
    parser.add_argument("opts", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.config_file, args.opts)
    without_pretrained_weights(cfg)
    print(report(instantiate(cfg.model), args.size))


if __name__ == "__main__":
    sys.exit(call("analyze.py", main, mistake=1))
