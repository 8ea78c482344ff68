"""Exports of less precision: what is lowered, what stays in float32, and what it costs."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.engine import CheckpointError
from stage_interactor.engine.judge import Judge
from stage_interactor.inference.blueprint import load_model
from stage_interactor.inference.export import Exported, ExportError, export_checkpoint
from stage_interactor.inference.lowered import lowered_modules, module_of, to_half, to_int8

onnx = pytest.importorskip("onnx", reason="needs stage-interactor[export]")
pytest.importorskip("onnxscript", reason="needs stage-interactor[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs stage-interactor[export]")


def needs(*packages):
    for package in packages:
        pytest.importorskip(package, reason="needs stage-interactor[openvino]")


@pytest.fixture(scope="module")
def checkpoint(small_run):
    return str(small_run / "model_final.pth")


@pytest.fixture(scope="module")
def whole(checkpoint, exported):
    """The detector, and its graph in float32."""
    return *load_model(checkpoint), onnx.load(exported("onnx"))


@pytest.fixture(scope="module")
def data(small_run):
    return str(small_run / "shapes" / "val.json")


@pytest.fixture
def without_exporting(monkeypatch, whole):
    """The same graph for every test: PyTorch's exporter takes half a minute."""
    monkeypatch.setattr("stage_interactor.inference.export.export_program", lambda model: None)
    monkeypatch.setattr("stage_interactor.inference.export.to_onnx", lambda *_: whole[2])


def run(graph, inputs):
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["boxes", "scores", "classes"], inputs)


def noise(seed=0, size=(96, 128)):
    images = np.random.default_rng(seed).uniform(0, 255, (1, 3, *size)).astype(np.float32)
    return {"images": images, "image_sizes": np.array([[size[0] - 5, size[1]]])}


def types_of(graph):
    """Element types of all values of a graph, by name."""
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def test_every_node_of_a_graph_tells_its_module(whole):
    model, _, graph = whole
    modules = dict(model.named_modules())
    found = {module_of(node) for node in graph.graph.node}
    # What a graph asks of its inputs belongs to none.
    assert {name for name in found if not name.startswith("_")} <= modules.keys()
    assert {"decoder.stages.0.sampler", "neck.convs.0", "decoder.stages.2.mixing"} <= found


def test_what_computes_places_is_never_lowered(whole):
    model, _, _ = whole
    modules = lowered_modules(model)
    for stage in range(len(model.decoder.stages)):
        at = f"decoder.stages.{stage}"
        for name in ("", ".sampler", ".sampler.outer", ".attention", ".head", ".head.box_out"):
            assert at + name not in modules
        for name in (".attention.qkv", ".mixing", ".feedforward.layers.0", ".head.cls_branch.0"):
            assert modules[at + name] == f"decoder.stages.*.{name.split('.')[1]}"
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm)
    assert not any(isinstance(model.get_submodule(name), norms) for name in modules)
    assert {"neck", "backbone.network.layer1"} <= set(modules.values())


def test_a_graph_in_half_precision_is_float32_but_for_the_layers_that_may(whole):
    model, _, graph = whole
    modules = lowered_modules(model)
    half = to_half(graph, modules)
    onnx.checker.check_model(half, full_check=True)
    types, float16 = types_of(half), onnx.TensorProto.FLOAT16
    for node in half.graph.node:
        if node.op_type == "Cast":
            continue
        lowered = any(types.get(name) == float16 for name in (*node.input, *node.output))
        assert not lowered or module_of(node) in modules, node.name
        # Convolutions and linear layers are; of the others some, such as norms, cannot be.
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            assert lowered == (module_of(node) in modules), node.name
    made = {name: node for node in half.graph.node for name in node.output}
    for node in half.graph.node:  # nothing is rounded between two nodes that are float32
        if node.op_type == "Cast" and node.output[0].endswith("_float"):
            assert made[node.input[0]].op_type != "Cast"
    values = {value.name: value.type.tensor_type.elem_type for value in half.graph.output}
    assert values["boxes"] == values["scores"] == onnx.TensorProto.FLOAT
    assert half.ByteSize() < 0.65 * graph.ByteSize()
    assert graph.ByteSize() == whole[2].ByteSize()  # the whole one is as it was


def test_half_precision_finds_nearly_the_same(whole):
    model, _, graph = whole
    half = to_half(graph, lowered_modules(model))
    (boxes, scores, _), (half_boxes, half_scores, _) = run(graph, noise()), run(half, noise())
    assert 0 < np.abs(scores - half_scores).max() < 5e-3
    assert np.abs(np.sort(boxes, 1) - np.sort(half_boxes, 1)).max() < 1.5


def test_a_graph_of_no_lowered_module_is_the_same_graph(whole):
    _, _, graph = whole
    same = to_half(graph, ())
    assert [node.op_type for node in same.graph.node] == [n.op_type for n in graph.graph.node]
    for ours, theirs in zip(run(same, noise(1)), run(graph, noise(1))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_weight_that_float16_cannot_hold_stays_in_float32(whole):
    model, _, graph = whole
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    weights = {tensor.name: tensor for tensor in changed.graph.initializer}
    node = next(n for n in changed.graph.node if module_of(n) == "neck.convs.0")
    array = onnx.numpy_helper.to_array(weights[node.input[1]]).copy()
    array.flat[0] = 1e5
    weights[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(array, node.input[1]))
    half = to_half(changed, lowered_modules(model))
    onnx.checker.check_model(half, full_check=True)
    assert all(np.isfinite(value).all() for value in run(half, noise()))
    (kept,) = [n for n in half.graph.node if n.name == node.name]
    assert types_of(half)[kept.input[1]] == onnx.TensorProto.FLOAT


def test_eight_bits_are_in_the_layers_that_may_alone(whole):
    needs("nncf")
    model, _, graph = whole
    modules = lowered_modules(model)
    lowered = to_int8(graph, modules, [noise(seed) for seed in range(3)])
    onnx.checker.check_model(lowered)
    made = {name: node for node in lowered.graph.node for name in node.output}
    layers = [n for n in lowered.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]
    eight = {
        node.name: any(
            made[name].op_type == "DequantizeLinear" for name in node.input if name in made
        )
        for node in layers
    }
    assert any(eight.values())
    assert not any(eight[n.name] for n in layers if module_of(n) not in modules)
    convolutions = [n for n in layers if n.op_type == "Conv" and module_of(n) in modules]
    assert all(eight[node.name] for node in convolutions)
    scores = [run(which, noise())[1] for which in (graph, lowered)]
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.1


@pytest.mark.parametrize(
    ("format", "precision"),
    [("onnx", "fp16"), ("onnx", "int8"), ("openvino", "fp16"), ("openvino", "int8")],
)
def test_an_export_says_what_it_costs(
    checkpoint, data, tmp_path, capsys, without_exporting, format, precision
):
    if format == "openvino" or precision == "int8":
        needs("nncf", "openvino")
    path = tmp_path / ("model.onnx" if format == "onnx" else "model.xml")
    arguments = ["--checkpoint", checkpoint, "--format", format, "--precision", precision]
    arguments += ["--data", data, "--output", str(path), "--tolerance", "50"]
    assert main(["export", *arguments]) == 0
    output = capsys.readouterr().out
    assert re.search(r"AP [\d.]+, [+-][\d.]+ against PyTorch's, on 6 pictures \(val of ", output)
    card = path.with_suffix(".md").read_text()
    expected = Judge(data)(*load_model(checkpoint))
    assert f"| PyTorch | {expected['AP']:.2f} |" in card and "| this file | " in card
    told = {"fp16": "float16 in the layers", "int8": "8 bits, weights and features,"}[precision]
    assert told in card
    trusted = format == "openvino"
    theirs = Detector.from_checkpoint(path, device="cpu", trusted=trusted)
    ours = Detector.from_checkpoint(checkpoint, device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    found, expected = (of(picture, 0.0, multi_label=True) for of in (theirs, ours))
    assert found.image_size == (70, 90) and len(found) == len(expected)
    assert np.abs(np.sort(found.scores) - np.sort(expected.scores)).max() < 0.1


def test_an_openvino_file_of_float32_is_the_detector(
    checkpoint, tmp_path, without_exporting, monkeypatch
):
    needs("openvino")
    path = tmp_path / "model.xml"
    written = export_checkpoint(checkpoint, "openvino", path)
    assert written.box_difference < 0.05 and written.score_difference < 1e-3
    with pytest.raises(CheckpointError, match="--trust, or trusted=True"):
        Detector.from_checkpoint(path)
    with pytest.raises(ValueError, match="this OpenVINO has .*CPU"):
        Detector.from_checkpoint(path, device="cuda", trusted=True)
    path.write_text(path.read_text().replace("<net", "<nett", 1))
    with pytest.raises(CheckpointError, match="cannot be read by OpenVINO"):
        Detector.from_checkpoint(path, trusted=True)


def test_openvino_and_nncf_tell_nobody_of_a_file(checkpoint, data, tmp_path):
    """They have a package for that, which asks the network and leaves a folder in the home."""
    needs("nncf", "openvino", "openvino_telemetry")
    code = (
        "import sys\n"
        "from stage_interactor.inference.exported import require_openvino\n"
        "from stage_interactor.inference import lowered\n"
        "require_openvino(); lowered.tell_nobody(); import nncf\n"
        "from nncf.telemetry.wrapper import telemetry\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "print(type(telemetry._impl).__name__ if hasattr(telemetry, '_impl') else telemetry)\n"
    )
    environment = os.environ | {"HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert not list(tmp_path.rglob("*telemetry*"))


@pytest.mark.parametrize("wanted", [{"neck"}, {"neck", "decoder.stages.*.mixing"}, {"nothing"}])
def test_parts_that_cost_too_much_stay_in_float32(
    checkpoint, data, tmp_path, monkeypatch, without_exporting, whole, wanted
):
    """AP falls by 5 but for what some parts in float32 save: of which none is named before."""
    known = lowered_modules(whole[0])
    kept: list[set[str]] = []

    def watched(graph, modules):
        kept.append(set(known.values()) - {known[name] for name in modules})
        return to_half(graph, modules)

    def compared(model, blueprint, path, judge, expected):
        saved = 5.0 * len(kept[-1] & wanted) / len(wanted)
        return Exported(path, None, 0.1, 0.1, expected, {"AP": expected["AP"] - 5 + saved})

    monkeypatch.setattr("stage_interactor.inference.export.to_half", watched)
    monkeypatch.setattr("stage_interactor.inference.export._compared", compared)
    path = tmp_path / "model.onnx"
    options = {"precision": "fp16", "judge": Judge(data)}
    if wanted == {"nothing"}:
        with pytest.raises(ExportError, match="fp16 loses 5.00 AP on .*, more than 0.5"):
            export_checkpoint(checkpoint, "onnx", path, **options)
        assert not path.exists() and not path.with_suffix(".md").exists()
        return
    written = export_checkpoint(checkpoint, "onnx", path, **options)
    assert set(written.kept) == wanted and kept[-1] == wanted
    card = path.with_suffix(".md").read_text()
    assert f"In float32 too, since AP fell without: {', '.join(written.kept)}." in card
    types = types_of(onnx.load(path))
    of_neck = [n for n in onnx.load(path).graph.node if module_of(n) == "neck.convs.0"]
    assert onnx.TensorProto.FLOAT16 not in {types[n] for node in of_neck for n in node.output}


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_file_that_is_worse_than_pytorch_is_not_written(
    checkpoint, data, tmp_path, capsys, monkeypatch, whole, exported, format
):
    """A file of AP 0.2 less: the exports themselves are made elsewhere, as they take their time."""
    judge = Judge.__call__

    def worse(self, detect, blueprint):
        lost = 0.0 if isinstance(detect, torch.nn.Module) else 0.2
        return {"AP": judge(self, detect, blueprint)["AP"] - lost}

    monkeypatch.setattr(Judge, "__call__", worse)
    made = exported("pt2").read_bytes()
    monkeypatch.setattr("stage_interactor.inference.export.export_program", lambda model: None)
    monkeypatch.setattr("stage_interactor.inference.export.to_onnx", lambda *_: whole[2])
    monkeypatch.setattr(torch.export, "save", lambda _, file, **options: file.write(made))
    path = tmp_path / ("model.onnx" if format == "onnx" else "model.pt2")
    arguments = ["export", "--checkpoint", checkpoint, "--data", data, "--output", str(path)]
    arguments += ["--format", format, "--tolerance"]
    assert main([*arguments, "0"]) == 2
    assert "by more than 0 (--tolerance)" in capsys.readouterr().err
    assert not path.exists()
    assert main([*arguments, "0.3"]) == 0
    assert "-0.20 against PyTorch's" in capsys.readouterr().out and path.exists()


def test_a_runtime_that_is_missing_is_told_where_ap_is_asked_for(
    checkpoint, data, tmp_path, capsys, without_exporting, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = ["export", "--checkpoint", checkpoint, "--output", str(tmp_path / "model.onnx")]
    assert main([*arguments, "--data", data]) == 2
    assert "onnxruntime" in capsys.readouterr().err
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("nncf", ["--precision", "int8", "--data", "DATA"]), ("openvino", ["--format", "openvino"])],
)
def test_a_package_that_is_missing_is_told_before_anything_is_done(
    checkpoint, data, tmp_path, capsys, monkeypatch, package, arguments
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("stage_interactor.inference.export.load_model", None)
    given = [data if word == "DATA" else word for word in arguments]
    assert main(["export", "--checkpoint", checkpoint, *given]) == 2
    assert "stage-interactor[openvino]" in capsys.readouterr().err


def test_data_with_other_classes_are_told(checkpoint, data, tmp_path, capsys):
    content = json.loads(open(data).read())
    content["categories"][0]["name"] = "elephant"
    (tmp_path / "val.json").write_text(json.dumps(content))
    images = os.path.join(os.path.dirname(data), "val")
    arguments = ["export", "--checkpoint", checkpoint, "--data", str(tmp_path / "val.json")]
    assert main([*arguments, "--images", images, "--output", str(tmp_path / "m.onnx")]) == 2
    assert "elephant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--precision", "int8"], "needs data"),
        (["--precision", "fp16", "--format", "safetensors"], "is for --format onnx and openvino"),
        (["--tolerance", "1"], "--data FOLDER"),
        (["--calibration", "."], "belong to --data"),
        (["--tolerance", "-1", "--data", "DATA"], "must be 0 or more"),
        (["--tolerance", "nan", "--data", "DATA"], "must be 0 or more"),
        (["--data", "nowhere"], "nowhere: there is no such"),
        (["--data", "DATA", "--calibration", "nowhere"], "nowhere: there is no such"),
    ],
)
def test_what_makes_no_sense_is_told(checkpoint, data, tmp_path, capsys, arguments, told):
    given = [data if word == "DATA" else word for word in arguments]
    assert main(["export", "--checkpoint", checkpoint, *given]) == 2
    assert told in capsys.readouterr().err


def test_a_calibration_is_of_the_pictures_that_were_named(data, small_run, tmp_path, checkpoint):
    _, blueprint = load_model(checkpoint)
    for number in range(3):
        shade = np.full((64, 64, 3), 40 * number, np.uint8)
        Image.fromarray(shade).save(tmp_path / f"{number}.png")
    judge = Judge(data, calibration=tmp_path)
    means = [picture["image"].float().mean().item() for picture in judge.pictures(blueprint)]
    assert means == [0, 40, 80] and judge.apart
    assert not Judge(data).apart and len(list(Judge(data).pictures(blueprint))) == 6
    assert Judge(small_run / "shapes").apart


def test_each_file_and_its_card_have_names_of_their_own(
    checkpoint, tmp_path, without_exporting, monkeypatch
):
    for name in ("save_openvino", "require_openvino"):
        monkeypatch.setattr(f"stage_interactor.inference.export.{name}", lambda *_: None)
    monkeypatch.setattr(
        "stage_interactor.inference.export._compared",
        lambda model, of, path, *_: Exported(path, None),
    )
    monkeypatch.setattr("stage_interactor.inference.export._move", lambda made, path: None)
    shutil.copy(checkpoint, tmp_path / "model.pth")
    names = {
        (format, precision): export_checkpoint(tmp_path / "model.pth", format, precision=precision)
        for format in ("onnx", "openvino")
        for precision in ("fp32", "fp16")
    }
    paths = {key: os.path.basename(written.path) for key, written in names.items()}
    assert set(paths.values()) == {
        "model.onnx", "model.fp16.onnx", "model.openvino.xml", "model.openvino.fp16.xml"
    }  # fmt: skip
    assert len({written.card for written in names.values()}) == 4


def test_a_card_is_written_again_unless_somebody_has_written_in_it(checkpoint, tmp_path):
    path, card = tmp_path / "model.safetensors", tmp_path / "model.md"
    assert export_checkpoint(checkpoint, "safetensors", path).card == str(card)
    first = card.read_text()
    card.write_text(first.replace("license: unknown", "license: mit"))
    assert export_checkpoint(checkpoint, "safetensors", path).card is None
    assert "license: mit" in card.read_text()
    card.write_text(first)
    assert export_checkpoint(checkpoint, "safetensors", path).card == str(card)
