"""Exported files give what PyTorch gives, for batches and images of any size."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from stage_interactor import Detector
from stage_interactor.commands import main
from stage_interactor.d2.detections import UnusableDetectionsError
from stage_interactor.engine import CheckpointError
from stage_interactor.inference import export
from stage_interactor.inference.blueprint import Blueprint, load_model
from stage_interactor.inference.export import ExportedGraph, export_checkpoint
from stage_interactor.inference.exported import ExportedDetector
from stage_interactor.modeling import TimmBackbone


def needs(suffix):
    if suffix == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="needs stage-interactor[export]")


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "safetensors"])
def test_an_exported_file_finds_the_same_objects(small_run, exported, suffix):
    needs(suffix)
    theirs = Detector.from_checkpoint(exported(suffix), device="cpu", trusted=True)
    ours = Detector.from_checkpoint(small_run / "model_final.pth", device="cpu")
    assert theirs.categories == ours.categories
    image = Image.open(sorted((small_run / "shapes/val").iterdir())[0]).convert("RGB")
    sizes = ((64, 64), (96, 64), (70, 131))  # the last is padded to multiples of the stride
    pictures = [np.array(image.resize(size)) for size in sizes]
    batches = [pictures[:1], pictures[2:], pictures]
    for batch in batches:
        for found, expected in zip(theirs(batch, 0.0), ours(batch, 0.0)):
            assert found.image_size == expected.image_size
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.5)
            assert np.array_equal(found.classes, expected.classes)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_an_exported_file_takes_strips_of_a_pixel(exported, suffix, size):
    needs(suffix)
    detector = Detector.from_checkpoint(exported(suffix), device="cpu", trusted=True)
    found = detector(np.full((*size, 3), 90, np.uint8), threshold=0.0, multi_label=True)
    assert len(found) == 8 and found.image_size == size


# TensorRT 10 has these, and takes opset 9 to 20:
def test_a_file_that_is_read_tells_nobody_of_it(exported, tmp_path):
    """onnxruntime leaves a number of the machine in the home folder before it uses the network."""
    needs("onnx")
    load = (
        "import sys; from stage_interactor import Detector; Detector.from_checkpoint(sys.argv[1])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", load, exported("onnx")], env=environment, check=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))


# https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md
IN_TENSORRT = set(
    """Add And AveragePool BatchNormalization Cast Clip Concat Constant ConstantOfShape Conv Cos Div
    Equal Erf Exp Expand Flatten Gather GatherElements GatherND Gelu Gemm GridSample Identity
    InstanceNormalization LayerNormalization Less Log MatMul Max MaxPool Min Mod Mul Neg Pad Pow
    Range Reciprocal ReduceMean ReduceSum Relu Reshape Shape Sigmoid Sin Slice Softmax Split Sqrt
    Squeeze Sub Tile TopK Transpose Unsqueeze Where""".split()
)


def test_the_onnx_file_holds_standard_operators_and_says_what_it_is(exported):
    needs("onnx")
    import onnx

    path = exported("onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node} <= IN_TENSORRT
    assert all(len(n.output) == 1 for n in model.graph.node if "LayerNorm" in n.op_type)
    assert [(opset.domain, 9 <= opset.version <= 20) for opset in model.opset_import] == [
        ("", True)
    ]

    def shape(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    shapes = {value.name: shape(value) for value in (*model.graph.input, *model.graph.output)}
    assert shapes == {
        "images": ["batch", 3, "32*height", "32*width"],
        "image_sizes": ["batch", 2],
        "boxes": ["batch", 8, 4],
        "scores": ["batch", 8],
        "classes": ["batch", 8],
    }
    text = {item.key: item.value for item in model.metadata_props}["blueprint"]
    assert json.loads(text)["categories"][0]["name"] == "ellipse"


class Changed:
    """A detector whose detections are in another order, or elsewhere."""

    def __init__(self, model, shift=0.0):
        self.model, self.shift = model, shift

    def __call__(self, inputs):
        (output,) = self.model(inputs)
        found = output["instances"]
        order = torch.arange(len(found)).view(-1, 2).flip(1).flatten()  # neighbours swapped
        scores = found.scores
        found = found[order]
        found.scores, found.pred_boxes.tensor = scores, found.pred_boxes.tensor + self.shift
        return [{"instances": found}]


def renamed(found):
    found.pred_classes = (found.pred_classes + 1) % 5
    return found


def test_boxes_in_another_order_are_compared_with_what_they_are(small_run):
    model, _ = load_model(str(small_run / "model_final.pth"))
    boxes, scores = export._differences(model, Changed(model), "x.onnx")
    assert boxes < 1e-4 and scores == 0
    boxes, scores = export._differences(model, Changed(model, 5.0), "x.onnx")
    assert boxes == pytest.approx(5) and scores == 0
    wrong = Changed(model)
    wrong.model = lambda inputs: [
        {"instances": renamed(output["instances"])} for output in model(inputs)
    ]
    assert export._differences(model, wrong, "x.onnx")[0] > 100
    moved = export.Exported("x.onnx", None, boxes, scores)
    with pytest.raises(export.ExportError, match=r"boxes differ by 5.0e\+00 pixels"):
        export._require_tolerance(moved, 0.1)


def test_a_torch_export_needs_nothing_of_this_project(exported):
    program = torch.export.load(exported("pt2"))
    names = {str(node.target).split(".")[0] for node in program.graph.nodes
             if node.op == "call_function"}  # fmt: skip
    assert not any("stage_interactor" in name for name in names)
    boxes, scores, classes = program.module()(
        torch.rand(1, 3, 96, 32) * 255, torch.tensor([[90, 30]])
    )
    assert boxes.shape == (1, 8, 4) and scores.shape == classes.shape == (1, 8)


def test_padding_does_not_matter(exported):
    module = torch.export.load(exported("pt2")).module()
    images = torch.rand(2, 3, 64, 96) * 255
    sizes = torch.tensor([[60, 90], [40, 96]])
    expected = module(images, sizes)
    images[0, :, 60:], images[0, :, :, 90:], images[1, :, 40:] = 7.0, -3.0, 1e4
    for ours, theirs in zip(module(images, sizes), expected):
        torch.testing.assert_close(ours, theirs)


def test_a_model_card_is_written_beside_it(small_run, exported):
    path = exported("safetensors")
    card = path.with_suffix(".md").read_text()
    for part in (
        "ellipse, rectangle, triangle",
        "shapes_val",
        "`resnet10t`",
        "8 queries",
        "| AP |",
    ):
        assert part in card
    ap = json.loads((small_run / "results.json").read_text())["bbox"]["AP50"]
    assert f" {ap:.2f} " in card


def test_mistakes_are_told(small_run, exported, tmp_path, capsys):
    checkpoint = str(small_run / "model_final.pth")
    arguments = ["export", "--checkpoint", checkpoint, "--output"]
    assert main([*arguments, str(tmp_path / "model.pt")]) == 2
    assert "ends in .onnx" in capsys.readouterr().err
    path = exported("safetensors")
    arguments = ["export", "--checkpoint", str(path), "--format", "safetensors"]
    assert main([*arguments, "--output", str(path)]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    with pytest.raises(ValueError, match="keeps its precision"):
        Detector.from_checkpoint(exported("pt2"), dtype="bfloat16")


def test_a_file_that_another_program_exported_is_refused():
    with pytest.raises(CheckpointError, match="net.onnx does not say how its detector is built"):
        Blueprint.from_json(None, "net.onnx")


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_damaged_file_is_told(exported, tmp_path, suffix):
    needs(suffix)
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(exported(suffix).read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=f"model.{suffix} cannot be read"):
        Detector.from_checkpoint(path, device="cpu", trusted=True)


def test_a_card_that_somebody_wrote_stays(small_run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    arguments = ["--checkpoint", str(small_run / "model_final.pth"), "--format", "safetensors"]
    assert main(["export", *arguments, "--output", str(tmp_path / "README.safetensors")]) == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "stays as it is" in capsys.readouterr().out


def test_a_file_that_gives_nan_is_not_taken_for_a_detector(small_run, tmp_path):
    content = torch.load(small_run / "model_final.pth", weights_only=True)
    content["ema"]["module.neck.convs.0.weight"].fill_(3e38)  # finite, but not what it computes
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UnusableDetectionsError, match="model.pt2: .* NaN or infinite"):
        export_checkpoint(tmp_path / "model.pth", "torch-export")
    detector = Detector.from_checkpoint(tmp_path / "model.pt2", device="cpu", trusted=True)
    with pytest.raises(UnusableDetectionsError, match="8 detections are NaN"):
        detector(np.zeros((64, 64, 3), np.uint8))


def test_an_exported_graph_hides_no_score_that_cannot_be_computed(small_run):
    model, blueprint = load_model(str(small_run / "model_final.pth"))
    head = model.decoder.stages[-1].head
    # One query of the second image only.
    head.register_forward_hook(lambda _, __, out: (poisoned(out[0]), out[1]))

    def poisoned(logits):
        logits = logits.clone()
        logits[1, 3] = torch.nan
        return logits

    boxes, scores, _ = ExportedGraph(model)(torch.rand(2, 3, 64, 64), torch.tensor([[64, 64]] * 2))
    assert scores.isnan().sum(1).tolist() == [0, 1] and scores[1, -1].isnan()
    detector = ExportedDetector(ExportedGraph(model), blueprint)
    pictures = [{"image": torch.zeros(3, 64, 64)}] * 2
    nan = [found["instances"].pred_boxes.tensor.isnan().any() for found in detector(pictures)]
    assert nan == [False, True]


def test_deformable_convolutions_have_an_onnx_operator(tmp_path):
    needs("onnx")
    import onnx
    import onnxruntime

    small = dict(layers=(1, 1, 1, 1), channels=(16, 16, 16, 16), cardinality=2, stem_width=8)
    torch.manual_seed(0)
    backbone = TimmBackbone(
        name="resnext101_32x4d", pretrained=False, deformable_strides=(16,), **small
    ).eval()
    for name, parameter in backbone.named_parameters():
        if "conv_offset" in name:  # which start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    images, path = torch.randn(1, 3, 64, 96), str(tmp_path / "backbone.onnx")
    torch.onnx.export(backbone, (images,), path, dynamo=True, verbose=False)
    assert "DeformConv" in {node.op_type for node in onnx.load(path).graph.node}
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    for ours, theirs in zip(
        backbone(images).values(), session.run(None, {entry.name: images.numpy()})
    ):
        np.testing.assert_allclose(theirs, ours.detach().numpy(), rtol=1e-3, atol=1e-4)
