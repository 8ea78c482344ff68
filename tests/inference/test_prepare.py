"""Detectors prepared for inference, and the switch between fast and reference operations."""

import operator
import os
import subprocess
import sys
import time

import pytest
import torch
from checks.labels_and_losses import labels_and_losses
from checks.small import random_image, tiny_model, without_zeros

from stage_interactor.inference import prepare
from stage_interactor.inference.prepare import (
    FusedConvolution,
    PreparedDetector,
    _fuse_convolutions,
    prepare_for_inference,
)
from stage_interactor.modeling import ChannelMapper, TimmBackbone
from stage_interactor.ops import use_ops


@pytest.fixture
def model(operations):
    """On the fast operations, and on the reference."""
    torch.manual_seed(0)
    return tiny_model(num_queries=8).eval()


IMAGES = [random_image(2, (64, 96), seed=1), random_image(3, (80, 64), seed=2)]


def detections(model, images=IMAGES):
    with torch.no_grad():
        found = [output["instances"] for output in model(images)]
    return [(f.pred_boxes.tensor.float(), f.scores.float(), f.pred_classes) for f in found]


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_prepared_detector_gives_the_same_detections(model, channels_last):
    prepared = prepare_for_inference(model, channels_last=channels_last)
    for ours, theirs in zip(detections(prepared), detections(model)):
        for actual, expected in zip(ours, theirs):
            torch.testing.assert_close(actual, expected)
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_half_precision_keeps_weights_in_it_and_coordinates_out_of_it(model, dtype):
    prepared = prepare_for_inference(model, dtype=dtype).model
    kinds = {name: parameter.dtype for name, parameter in prepared.named_parameters()}
    assert kinds["backbone.convs.0.weight"] == torch.bfloat16
    assert kinds["decoder.stages.1.mixing.generator.weight"] == torch.bfloat16
    for exact in ("sampler.outer.weight", "sampler.inner.weight", "head.box_out.weight"):
        assert kinds[f"decoder.stages.1.{exact}"] == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())  # the original is untouched
    ours = detections(prepare_for_inference(model, dtype=dtype))
    for (boxes, scores, _), (expected_boxes, expected_scores, _) in zip(ours, detections(model)):
        assert boxes.isfinite().all()
        torch.testing.assert_close(scores, expected_scores, atol=2e-2, rtol=0)
        assert boxes.shape == expected_boxes.shape


def test_batch_norms_of_a_real_backbone_are_folded(model):
    backbone = TimmBackbone(name="resnet18", pretrained=False)
    model.backbone = backbone
    model.neck = ChannelMapper(in_channels=backbone.channels, out_channels=16, norm_groups=4)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2.0)
    model.eval()
    prepared = prepare_for_inference(model)
    assert norms and not any(isinstance(m, torch.nn.BatchNorm2d) for m in prepared.modules())
    for ours, theirs in zip(detections(prepared), detections(model)):
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


class Residuals(torch.nn.Module):
    """A residual network whose first map, a residual, is wanted again after the addition."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 1) for _ in range(3))
        self.acts = torch.nn.ModuleList(torch.nn.ReLU(inplace=True) for _ in range(3))
        self.skip = torch.nn.Identity()

    def forward(self, images):
        first = self.norm(self.stem(images))
        second = self.acts[0](self.skip(self.convs[0](first)))
        third = self.acts[1](self.convs[1](second) + first)
        return first, self.acts[2](self.convs[2](third) + second)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_activations_and_residuals_are_fused_where_nothing_is_lost(model):
    network = Residuals().eval()
    model.backbone.network = network
    prepared = prepare_for_inference(model).model.backbone.network
    fused = {name for name, m in prepared.named_modules() if isinstance(m, FusedConvolution)}
    assert fused == {"convs.0", "convs.1", "convs.2"}
    # What is the first map's is left.
    assert [prepared.get_submodule(f"convs.{n}")._overwrites for n in (1, 2)] == [False, True]
    images = torch.randn(2, 3, 16, 20)
    with torch.inference_mode():
        for ours, theirs in zip(prepared(images), network(images)):
            torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_traced_is_left_as_it_is(model, caplog):
    class Stranger(torch.nn.Sequential):
        def forward(self, images):
            return super().forward(images) if images.mean() > -1e9 else images

    model.backbone.odd = Stranger(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
    with caplog.at_level("INFO"):
        prepared = prepare_for_inference(model)
    assert isinstance(prepared.model.backbone.odd, Stranger)
    assert "Convolutions of Stranger are not fused" in caplog.text


def test_images_are_padded_to_buckets(model):
    prepared = prepare_for_inference(model, bucket=100)
    assert prepared.model.size_divisibility == 128  # a multiple of the coarsest stride
    assert model.size_divisibility == 32
    assert prepared.model.preprocess(IMAGES).tensor.shape[-2:] == (128, 128)


def test_prediction_is_one_graph(model):
    images, sizes = torch.randn(2, 3, 64, 96), torch.tensor([[64, 96], [50, 90]])
    compiled = torch.compile(model.predict, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        for ours, theirs in zip(compiled(images, sizes), model.predict(images, sizes)):
            torch.testing.assert_close(ours, theirs)


def test_compiling_is_announced_once_a_size(model, caplog, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(PreparedDetector, "_compare", lambda self, images, sizes: "")
    prepared = prepare_for_inference(model, compile=True)
    with caplog.at_level("INFO"):
        for images in (IMAGES, IMAGES, IMAGES[:1]):
            detections(prepared, images)
    announced = [r.message for r in caplog.records if r.message.startswith("Compiling")]
    # Each size of image in as many as are asked for, whatever the others' sizes are.
    sizes = ("2 x 64 x 96 (size 1;", "2 x 96 x 64 (size 2;", "1 x 64 x 96 (size 3;")
    assert len(announced) == 3 and all(map(operator.contains, announced, sizes))


@pytest.mark.parametrize("wins", [True, False])
def test_what_is_compiled_on_a_cpu_is_used_where_it_is_faster(model, caplog, monkeypatch, wins):
    calls = []

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    prepared = prepare_for_inference(model, compile=True)
    compiled, plain = prepared._predict, prepared.plain.predict

    def slowed(function, name, seconds):
        def work(*arguments):
            calls.append(name)
            time.sleep(seconds)
            return function(*arguments)

        return work

    monkeypatch.setattr(prepared, "_predict", slowed(compiled, "compiled", 0.2 * (not wins)))
    monkeypatch.setattr(prepared.plain, "predict", slowed(plain, "plain", 0.2 * wins))
    with caplog.at_level("INFO"):
        first = detections(prepared, IMAGES[:1])
    told = "so it is used" if wins else "so it is not used, and nothing else is compiled"
    assert "Compiled for 1 x" in caplog.text and told in caplog.text
    calls.clear()
    again = detections(prepared, IMAGES[:1])
    assert calls == ["compiled" if wins else "plain"]
    torch.testing.assert_close(again, first)
    if not wins:  # other sizes neither
        calls.clear()
        detections(prepared, IMAGES)
        assert set(calls) == {"plain"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="int8"), "dtype must be one of .* 'int8'"),
        (dict(bucket=0), "bucket must be .* got 0"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        prepare_for_inference(model, **options)


def test_losses_are_those_of_the_release_computed_image_by_image(model):
    model.train()
    with use_ops("reference"):
        images = model.preprocess(IMAGES)
        outputs = model.decode(images.tensor, torch.tensor(images.image_sizes))
        instances = [image["instances"] for image in IMAGES]
        ours = model.criterion(outputs, instances)
        theirs = labels_and_losses(
            [output.logits for output in outputs],
            [output.boxes for output in outputs],
            [image.gt_boxes.tensor for image in instances],
            [image.gt_classes for image in instances],
            images.image_sizes,
        )
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_recomputed_mixing_gives_the_same_gradients(operations):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = tiny_model(num_queries=8, recompute_mixing=recompute)
        without_zeros(model.decoder, std=0.1)
        sum(model(IMAGES).values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(("name", "status"), [("reference", 0), ("", 0), ("quick", 1)])
def test_the_environment_chooses_the_operations(name, status):
    process = subprocess.run(
        [sys.executable, "-c", "from stage_interactor import ops; print(ops.current_ops())"],
        env=os.environ | {"STAGE_INTERACTOR_OPS": name, "PYTHONPATH": "projects"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == status
    if status:
        assert "STAGE_INTERACTOR_OPS must be one of" in process.stderr
    else:
        assert process.stdout.strip() == (name or "fast")


class Network(torch.nn.Module):
    """Convolutions whose activation cannot simply be made one with them."""

    def __init__(self, kind):
        super().__init__()
        mode = "circular" if kind == "other padding" else "zeros"
        self.first, self.second = (
            torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode) for _ in range(2)
        )
        self.relu, self.plain = torch.nn.ReLU(inplace=True), torch.nn.ReLU()
        self.kind = kind

    def forward(self, images):
        if self.kind == "by name":
            return self.plain(input=self.first(input=images))
        if self.kind == "other padding":
            return self.plain(self.first(images))
        early = self.first(images)
        late = self.second(early)
        written = self.relu(early)  # over what the second one reads
        return self.plain(late + early), written * 1


@pytest.mark.parametrize("kind", ["by name", "other padding", "written over"])
@pytest.mark.parametrize("overwrites", [True, False], ids=["as on a CPU", "as on CUDA"])
def test_what_stands_between_a_convolution_and_its_activation_stays(monkeypatch, kind, overwrites):
    torch.manual_seed(0)
    network, images = Network(kind).eval(), torch.randn(1, 3, 8, 9)
    backbone = torch.nn.ModuleDict({"network": network})
    with torch.inference_mode():
        expected = network(images)
        if not overwrites:  # parameters that are on no CPU
            elsewhere = [torch.empty(1, device="meta")]
            monkeypatch.setattr(torch.fx.GraphModule, "parameters", lambda self: iter(elsewhere))
        _fuse_convolutions(backbone, activations=True)
        monkeypatch.undo()
        found = backbone["network"](images)
    torch.testing.assert_close(found, expected)


def test_whose_name_begins_as_ours_is_not_ours():
    ours = type("Ours", (torch.nn.Module,), {"__module__": "stage_interactor.modeling.neck"})
    theirs = type("Theirs", (torch.nn.Module,), {"__module__": "stage_interactor_more.backbones"})
    assert prepare._is_known(ours()) and not prepare._is_known(theirs())
