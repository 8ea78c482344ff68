"""An exported ONNX graph in float16, or with weights and features of 8 bits, part by part.

What computes places stays in float32: points and boxes, weights of the levels, the embedding of
positions, norms, softmax, scores. Between 1024 and 2048 pixels float16 has steps of 1.
"""

import ast
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from ..modeling import StageInteractor
from .exported import tell_nobody
from .prepare import is_full_precision

PRECISIONS = ("fp32", "fp16", "int8")
_SCOPES = "pkg.torch.onnx.name_scopes"  # where PyTorch's exporter says whose a node is
_LARGEST_HALF = 65504.0
# Whose float inputs and outputs may be of one half precision. Norms, softmax, powers, sampling and
# the choice of the best are none of them.
_HALVES = frozenset(
    """Add AveragePool BatchNormalization Clip Concat Conv ConvTranspose Div Einsum Elu Erf Expand
    Flatten Gather Gelu Gemm GlobalAveragePool HardSigmoid HardSwish Identity LeakyRelu MatMul
    MaxPool Mish Mul Neg PRelu Pad Relu Reshape Sigmoid Slice Split Squeeze Sub Tanh Transpose
    Unsqueeze Where""".split()
)
_NORMS = (nn.LayerNorm, nn.GroupNorm)


def module_of(node: Any) -> str:
    """The name of the module of the detector that a node of its graph computes for."""
    for item in node.metadata_props:
        if item.key == _SCOPES:
            try:
                *_, module, _ = ast.literal_eval(item.value)
            except (ValueError, SyntaxError):
                break
            return str(module).removeprefix("model").removeprefix(".")
    return ""


def lowered_modules(model: StageInteractor) -> dict[str, str]:
    """The modules of a detector that may be computed in less than float32, with their parts.

    Parts are what one decides on: children of the backbone's network, the neck, and of all stages
    of the decoder together the attention, the mixing, the feed-forward layers and the head.
    """
    found = {}
    for name, module in model.named_modules():
        if is_full_precision(name) or isinstance(module, _NORMS):
            continue
        if name.startswith("backbone."):
            found[name] = ".".join(name.split(".")[:3])
        elif name.startswith("neck."):
            found[name] = "neck"
        elif match := re.match(r"decoder\.stages\.\d+\.(\w+)", name):
            # What is no layer computes places, or weighs by them; but mixing multiplies.
            if not list(module.children()) or match[1] == "mixing":
                found[name] = f"decoder.stages.*.{match[1]}"
    return found


def to_half(graph: Any, modules: Collection[str]) -> Any:
    """A copy of an ONNX model in which the nodes of some modules compute in float16.

    Inputs and outputs of the model stay float32, and so does every other node: a value is cast once
    where it is made, for all that take it in the other precision.
    """
    import onnx

    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    model = onnx.shape_inference.infer_shapes(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    floats = {name for name, tensor in weights.items() if tensor.data_type == single}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        if value.type.tensor_type.elem_type == single:
            floats.add(value.name)
    too_large = {
        name
        for name in floats & weights.keys()
        if np.abs(onnx.numpy_helper.to_array(weights[name])).max(initial=0) > _LARGEST_HALF
    }
    halves: set[str] = set()  # values that are made in float16
    casts: set[str] = set()  # values that are there in the other precision as well
    nodes = []

    def as_other(name: str) -> str:
        """The name of a value in the other precision, which is made if it is not there."""
        other = f"{name}_{'float' if name in halves else 'half'}"
        if other not in casts:
            casts.add(other)
            if name in weights:
                array = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, other))
            else:
                to = single if name in halves else half
                nodes.append(onnx.helper.make_node("Cast", [name], [other], f"to_{other}", to=to))
        return other

    for node in model.graph.node:
        lowered = (
            node.op_type in _HALVES
            and module_of(node) in modules
            and not too_large.intersection(node.input)
        )
        for index, name in enumerate(node.input):
            if name in floats and lowered != (name in halves):
                node.input[index] = as_other(name)
        if lowered:
            halves.update(floats.intersection(node.output))
        nodes.append(node)
    # What the model gives is float32 under its own name.
    for value in model.graph.output:
        if value.name in halves:
            raise ValueError(f"{value.name} of the graph is computed in float16")
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.value_info[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
    return model


def require_nncf() -> Any:
    """The module that makes 8 bits of a graph.

    Raises:
        ImportError: it is not installed.
    """
    tell_nobody()
    try:
        import nncf
    except ImportError as error:
        raise ImportError("int8 needs: pip install 'stage-interactor[openvino]'") from error
    return nncf


def to_int8(
    graph: Any, modules: Collection[str], inputs: Iterable[Mapping[str, np.ndarray]]
) -> Any:
    """A copy of an ONNX model in which the layers of some modules have weights and features of 8
    bits, by NNCF.

    Args:
        inputs: of pictures like those that it will see, which the ranges of the features are
            measured on.

    Raises:
        ImportError: NNCF is not installed.
    """
    import onnx

    nncf = require_nncf()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    items = list(inputs)
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    others = [node.name for node in graph.graph.node if module_of(node) not in modules]
    return nncf.quantize(
        copied,
        nncf.Dataset(items),
        subset_size=len(items),
        fast_bias_correction=True,
        ignored_scope=nncf.IgnoredScope(names=others, validate=False),
    )
