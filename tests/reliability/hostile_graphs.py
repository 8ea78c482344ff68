"""ONNX files that are no detector's, or do more than compute: each a name and what writes it.

All are made of one small graph, whose outputs are constants; ``good`` is that graph itself.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hostile_checkpoints import Hostile


def written(blueprint: dict, folder: Path) -> Iterator[Hostile]:
    import onnx
    from onnx import TensorProto, helper

    def constant(name: str, array: np.ndarray) -> Any:
        return onnx.numpy_helper.from_array(array, name)

    def graph() -> Any:
        shapes = {"images": ["batch", 3, "16*height", "16*width"], "image_sizes": ["batch", 2],
                  "boxes": [1, 2, 4], "scores": [1, 2], "classes": [1, 2]}  # fmt: skip
        whole = ("image_sizes", "classes")
        values = [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if name in whole else TensorProto.FLOAT, shape
            )
            for name, shape in shapes.items()
        ]
        constants = [
            constant("b", np.ones((1, 2, 4), np.float32)),
            constant("s", np.full((1, 2), 0.5, np.float32)),
            constant("c", np.ones((1, 2), np.int64)),
        ]
        nodes = [
            helper.make_node("Identity", [one], [other], name=other)
            for one, other in zip("bsc", ("boxes", "scores", "classes"))
        ]
        made = helper.make_graph(nodes, "g", values[:2], values[2:], constants)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        helper.set_model_props(model, {"blueprint": json.dumps(blueprint)})
        return model

    def changed(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
        def write(path: Path) -> None:
            model = graph()
            change(model)
            path.write_bytes(model.SerializeToString())

        return write

    def adds(nodes: list, **constants: np.ndarray) -> Callable[[Path], Any]:
        """Nodes whose last output is added to the scores."""

        def change(model: Any) -> None:
            model.graph.initializer.extend(constant(k, v) for k, v in constants.items())
            last = nodes[-1].output[0]
            zero = [
                helper.make_node("ReduceMin", [last], ["least"], keepdims=0),
                helper.make_node("Add", ["s", "least"], ["scores"]),
            ]
            model.graph.node.remove(next(n for n in model.graph.node if n.name == "scores"))
            model.graph.node.extend([*nodes, *zero])

        return changed(change)

    def node(kind: str, inputs: list[str], output: str, **options: Any) -> Any:
        return helper.make_node(kind, inputs, [output], **options)

    def info(name: str, kind: int) -> Any:
        return helper.make_tensor_value_info(name, kind, [])

    body = helper.make_graph(
        [node("Identity", ["go"], "on"), node("Add", ["sum", "sum"], "more")],
        "body",
        [info("i", TensorProto.INT64), info("go", TensorProto.BOOL), info("sum", 1)],
        [info("on", TensorProto.BOOL), info("more", 1)],
    )
    branch = helper.make_graph(
        [node("Constant", [], "x", value_float=0.0)], "b", [], [info("x", 1)]
    )
    far = np.array([2**20, 2**20], np.int64)
    one = np.ones(1, np.float32)
    true = np.array(True)
    doubling = [node("Concat", [f"d{i}", f"d{i}"], f"d{i + 1}", axis=0) for i in range(40)]
    to_float = node("Cast", ["d40"], "x", to=1)
    products = [node("MatMul", [f"m{i}", f"m{i}"], f"m{i + 1}") for i in range(1000)]
    files: dict[str, Callable[[Path], Any]] = {
        "good": changed(lambda model: None),
        "a loop": adds([node("Loop", ["n", "go", "z"], "l", body=body)],
                       n=np.array(2**40), go=true, z=np.zeros((), np.float32)),
        "a branch": adds([node("If", ["go"], "y", then_branch=branch, else_branch=branch)],
                         go=true),
        "another domain": adds([node("Gelu", ["one"], "x", domain="com.microsoft")], one=one),
        "an unknown operator": adds([node("ReadFile", ["one"], "x")], one=one),
        "text as an operator": adds([node("StringNormalizer", ["one"], "x")], one=one),
        "a huge constant": adds([node("ConstantOfShape", ["far"], "x")], far=far),
        "a huge expansion": adds([node("Expand", ["one", "far"], "x")], one=one, far=far),
        "a huge tile": adds([node("Tile", ["one", "far"], "x")], one=one, far=far[:1] * 2**20),
        "a huge range": adds([node("Range", ["a", "n", "b"], "y"), node("Cast", ["y"], "x", to=1)],
                             a=np.array(0), b=np.array(1), n=np.array(2**50)),
        "doubling": adds(doubling, d0=one),
        "the size of a picture doubled": adds(
            [node("Size", ["images"], "n"), node("Unsqueeze", ["n", "k"], "d0"), *doubling,
             to_float],
            k=np.zeros(1, np.int64)),
        "its size in numbers doubled": adds(
            [node("Size", ["images"], "n"), node("Add", ["n", "k"], "d0"), *doubling, to_float],
            k=np.ones(1000, np.int64)),
        "its pixels doubled": adds(
            [node("Reshape", ["images", "k"], "n"), node("Slice", ["n", "first", "to"], "d0"),
             *doubling],
            k=np.full(1, -1), first=np.zeros(1, np.int64), to=np.ones(1, np.int64)),
        "products": adds([node("Expand", ["one", "far"], "m0"), *products],
                         one=one, far=np.array([8192, 8192])),
        "weights of NaN": adds([node("Identity", ["w"], "x")],
                               w=np.array([1, math.nan], np.float32)),
        "scores of NaN": adds([node("Identity", ["w"], "x")], w=np.array(math.nan, np.float32)),
        "other outputs": changed(lambda m: setattr(m.graph.output[0], "name", "s")),
        "other inputs": changed(lambda m: setattr(m.graph.input[0], "name", "pixels")),
        "no inputs": changed(lambda m: m.graph.ClearField("input")),
        "no nodes": changed(lambda m: m.graph.ClearField("node")),
        "a class too many": changed(
            lambda m: m.graph.initializer[2].CopyFrom(constant("c", np.full((1, 2), 99)))
        ),
        "a class below 0": changed(
            lambda m: m.graph.initializer[2].CopyFrom(constant("c", np.full((1, 2), -1)))
        ),
        "boxes of another shape": changed(
            lambda m: m.graph.initializer[0].CopyFrom(constant("b", np.ones((1, 3), np.float32)))
        ),
        "scores of whole numbers": changed(
            lambda m: m.graph.initializer[1].CopyFrom(constant("s", np.ones((1, 2), np.int64)))
        ),
        "a negative shape": changed(lambda m: m.graph.initializer[0].dims.append(-5)),
        "a shape that is not there": changed(lambda m: m.graph.initializer[0].dims.append(5)),
        "itself as input": changed(lambda m: m.graph.node[1].input.__setitem__(0, "scores")),
        "no version": changed(lambda m: m.ClearField("opset_import")),
        "a later version": changed(lambda m: setattr(m.opset_import[0], "version", 10**6)),
        "no blueprint": changed(lambda m: m.ClearField("metadata_props")),
    }  # fmt: skip
    for place in ("/etc/passwd", "../../../etc/passwd", str(folder / "evil.bin")):

        def outside(model: Any, place: str = place) -> None:
            tensor = model.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=place)

        files[f"a file {place[:9]}"] = changed(outside)
    for text in ("{", "[1]", "null", "[" * 10**5, json.dumps(blueprint | {"categories": []})):

        def says(model: Any, text: str = text) -> None:
            helper.set_model_props(model, {"blueprint": text})

        files[f"a blueprint {text[:9]}"] = changed(says)

    def function(model: Any) -> None:
        made = helper.make_function(
            "own", "F", ["x"], ["y"], [node("Identity", ["x"], "y")], model.opset_import
        )
        model.functions.append(made)

    files["a function"] = changed(function)
    # Two bytes each, of which a library makes hundreds.
    arrays = b"\x2a\0" * 2**20
    files["many arrays"] = lambda path: path.write_bytes(b"\x3a\x80\x80\x80\1" + arrays)  # 2**21
    files["much text"] = changed(lambda model: setattr(model, "doc_string", "x" * 2**25))
    for name, write in files.items():
        yield Hostile(f"a graph with {name}" if name != "good" else name, write, ".onnx")
