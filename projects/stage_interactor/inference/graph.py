"""Whether an ONNX file is a plain computation: looked at before anything runs it.

A graph of ONNX can hold loops, functions, operators of other libraries, and names of other files.
An exported detector has none of these: only operators whose work follows from the sizes of what
they are given, and these sizes are inferred, and bounded, for one small picture.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..untrusted.tensors import MOST_TEXT, CheckpointError, require_file, require_finite

# Of the standard, those of networks and of the arithmetic around them; none holds a graph.
_OPERATORS = frozenset(
    """Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos CumSum DeformConv DepthToSpace DequantizeLinear Div
    Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization
    HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu
    Less LessOrEqual Log LogSoftmax LpNormalization MatMul Max MaxPool Mean Min Mish Mod Mul Neg
    NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax
    Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Trilu
    Unsqueeze Where Xor""".split()
)
_MOST_NODES = 100_000
_MOST_VALUES = 2**28  # of an array, 1 GiB
_MOST_WORK = 4e12  # multiplications of all layers
_MOST_FIELDS = 1_000_000  # of a file that are looked at, such as operators and arrays
_LONGEST_LIST = 1 << 16  # values, of constants and of shapes
_SIDE = 256  # pixels at least of the picture that these are for


def read_graph(path: str, inputs: Mapping[str, int], outputs: Iterable[str]) -> dict[str, str]:
    """The metadata of an ONNX file that is a plain computation.

    Args:
        inputs: names of what it must take, each with its number of axes.
        outputs: names of what it must give.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that reads ONNX is not installed.
        CheckpointError: it cannot be read, takes or gives something else, or holds more than an
            exported detector does.
    """
    require_file(path)
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "an .onnx file is looked at before it runs, which needs: "
            "pip install 'stage-interactor[export]'"
        ) from error
    with open(path, "rb") as file:
        _require_mostly_weights(file.read(), path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # of protobuf, whose kinds differ from version to version
        raise CheckpointError(f"{path} cannot be read as ONNX: {error}") from error
    if told := _what_is_foreign(onnx, model):
        raise CheckpointError(f"{path} is no exported detector: {told}")
    graph = model.graph
    initializers = {tensor.name for tensor in graph.initializer}
    for what, values, names in (
        ("takes", graph.input, list(inputs)),
        ("gives", graph.output, list(outputs)),
    ):
        found = [value.name for value in values if value.name not in initializers]
        if sorted(found) != sorted(names):
            raise CheckpointError(f"{path} {what} {found}, where an exported detector has {names}")
    try:
        arrays = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in graph.initializer
            if math.prod(tensor.dims) > 1  # a single one may well be infinite, such as a bound
        }
        arrays = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
        sizes, work = _infer(onnx, model, inputs)
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} is no exported detector: {told}") from error
    require_finite(arrays, path)
    name, values = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    if values > _MOST_VALUES or work > _MOST_WORK:
        raise CheckpointError(
            f"{path} is no exported detector: for a picture of {_SIDE} pixels it computes "
            + (
                f"{name!r} of {values} values, {values * 4 / 2**30:.1f} GiB"
                if values > _MOST_VALUES
                else f"{work:.1e} multiplications, where {_MOST_WORK:.0e} are many"
            )
        )
    return {item.key: item.value for item in model.metadata_props}


def _require_mostly_weights(content: bytes, path: str) -> None:
    """Raises a CheckpointError if much is no weight: of two bytes a library makes hundreds."""
    left = iter(range(_MOST_FIELDS))
    other = len(content)
    try:
        for start, end in _fields(content, 0, len(content), 7, left):  # a model's graph
            for first, last in _fields(content, start, end, 5, left):  # its arrays
                for from_, to in _fields(content, first, last, 9, left):  # their values
                    other -= to - from_
    except OverflowError as error:
        raise CheckpointError(f"{path} is no exported detector: {error}") from error
    if other > MOST_TEXT:
        raise CheckpointError(
            f"{path} is no exported detector: {other >> 20} MiB of it are no weights, more than "
            f"{MOST_TEXT >> 20}"
        )


def _fields(
    content: bytes, at: int, end: int, number: int, left: Iterator[int]
) -> Iterator[tuple[int, int]]:
    """Where the fields of a number begin and end in a message of protobuf, up to what is none."""

    def whole_number() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = content[at] if at < end else 0
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
        return value

    while at < end:
        if next(left, None) is None:
            raise OverflowError(f"it has more than {_MOST_FIELDS:,} operators and arrays")
        key = whole_number()
        kind = key & 7
        size = whole_number() if kind in (0, 2) else {1: 8, 5: 4}.get(kind, end)
        start, at = at, at + size * (kind != 0)
        if kind == 2 and key >> 3 == number and at <= end:
            yield start, at


def _what_is_foreign(onnx: Any, model: Any) -> str | None:
    """What a model has that an exported detector has not."""
    graph = model.graph
    if model.functions or any(opset.domain not in ("", "ai.onnx") for opset in model.opset_import):
        return "it holds functions, or operators that are not of the standard"
    if len(graph.node) > _MOST_NODES:
        return f"it has {len(graph.node)} operators, more than {_MOST_NODES}"
    if graph.sparse_initializer:
        return "it holds sparse arrays"
    types = onnx.AttributeProto
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _OPERATORS:
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            return f"its operator {name[:80]!r} is not one that detectors are made of"
        for attribute in node.attribute:
            if attribute.type == types.TENSOR:
                tensors.append(attribute.t)
            elif attribute.type not in (
                types.FLOAT, types.INT, types.STRING, types.FLOATS, types.INTS, types.STRINGS
            ):  # fmt: skip
                return f"{node.op_type} holds more than values ({attribute.name[:80]!r})"
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            return f"{tensor.name[:80]!r} lies in another file"
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > _MOST_VALUES:
            return f"{tensor.name[:80]!r} has the shape {list(tensor.dims)[:8]}"
    return None


_LISTS = frozenset("Cast Concat Gather Identity Slice Squeeze Unsqueeze Add Sub Mul Div".split())


def _require_short_lists(onnx: Any, model: Any) -> None:
    """Raises a ValueError if lists of sizes grow: whoever infers shapes computes all of them.

    A list has one axis at most. What is known to have more is none, such as boxes that go through
    one stage after the other.
    """
    plain = onnx.shape_inference.infer_shapes(model, data_prop=False).graph
    known = [value for value in plain.value_info if value.type.tensor_type.HasField("shape")]
    none = {value.name for value in known if len(value.type.tensor_type.shape.dim) > 1}
    graph = model.graph
    lengths = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        of = [lengths.get(name, 0) for name in node.input]
        length = 0
        if node.op_type in _LISTS:
            length = sum(of) if node.op_type == "Concat" else max(of, default=0)
        elif node.op_type == "Constant":
            length = sum(math.prod(a.t.dims) + len(a.ints) + len(a.floats) for a in node.attribute)
        elif node.op_type in ("Shape", "Size"):
            length = 64
        if none.issuperset(node.output):
            length = 0
        if node.op_type == "Concat" and length > _LONGEST_LIST:
            raise ValueError(f"{node.output[0]!r} joins {length} values that are none of pictures")
        lengths |= dict.fromkeys(node.output, length)


def _infer(onnx: Any, model: Any, inputs: Mapping[str, int]) -> tuple[dict[str, int], float]:
    """Values of every array whose shape is known for one picture, and multiplications of layers."""
    model = _without_weights(onnx, model)
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in inputs:
            if len(dims) != inputs[value.name]:
                raise ValueError(f"{value.name} has {len(dims)} axes, not {inputs[value.name]}")
            for axis, size in enumerate(dims):
                if size.HasField("dim_param"):
                    multiple = size.dim_param.partition("*")[0]  # "32*height"
                    stride = int(multiple) if multiple.isdecimal() and len(multiple) < 5 else 1
                    size.dim_value = 1 if axis == 0 else _SIDE + -_SIDE % max(stride, 1)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    _require_short_lists(onnx, model)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = [size.dim_value for size in dims]
    work = 0
    for node in inferred.node:
        names = [*node.input[:2], *node.output[:1]]
        if len(names) == 3 and all(name in shapes for name in names):
            one, other, made = (shapes[name] for name in names)
            if node.op_type in ("MatMul", "Gemm"):
                work += math.prod(made) * max(one, default=1)
            elif "Conv" in node.op_type:
                work += math.prod(made) * math.prod(other[1:])
    computed = {name for node in inferred.node for name in node.output}
    return {name: math.prod(dims) for name, dims in shapes.items() if name in computed}, work


def _without_weights(onnx: Any, model: Any) -> Any:
    """The same graph, its large arrays as shapes alone: inferring copies what it is given."""
    small = onnx.ModelProto()
    small.ir_version = model.ir_version
    small.opset_import.extend(model.opset_import)
    graph = small.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    known = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= 1024:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return small


def require_detections(found: list[Any], num_classes: int, path: str) -> None:
    """Raises a CheckpointError unless a graph gave boxes, scores and classes of a detector."""
    boxes, scores, classes = (np.asarray(value) for value in found)
    fits = (
        boxes.shape == (*scores.shape, 4) and boxes.dtype == scores.dtype == np.float32
        and scores.ndim == 2 and classes.shape == scores.shape and classes.dtype == np.int64
    )  # fmt: skip
    if not fits:
        given = [f"{value.dtype} {value.shape}" for value in (boxes, scores, classes)]
        raise CheckpointError(f"{path} is no exported detector: it gave {', '.join(given)}")
    if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
        raise CheckpointError(
            f"{path}: its graph gave the class {classes.max()}, its blueprint names {num_classes}"
        )
