"""Detection replayed, on a stand-in for the device that forbids what a recording forbids."""

import copy

import pytest
import torch
from checks.small import random_image, tiny_model
from checks.stand_in_device import DEVICE, on_host, stand_in_device

from stage_interactor.engine.evaluation import replayed_on_gpu
from stage_interactor.inference.prepare import (
    PreparedDetector,
    _fuse_activations,
    _fuse_convolutions,
    prepare_for_inference,
)
from stage_interactor.modeling import ChannelMapper, TimmBackbone
from stage_interactor.ops.cuda_graph import Replayed


@pytest.fixture
def device(monkeypatch):
    # The stand-in's tensors know no inference mode.
    plain = torch.no_grad()(PreparedDetector.forward.__wrapped__)
    monkeypatch.setattr(PreparedDetector, "forward", plain)
    with stand_in_device() as stand_in:
        yield stand_in


def build(**decoder):
    torch.manual_seed(0)
    return tiny_model(**decoder).eval().to(DEVICE)


def picture(size, seed=0):
    image = random_image(1, size, seed=seed)
    return {key: image[key] for key in ("image", "height", "width")}


def found(detections):
    return [
        on_host((d["instances"].pred_boxes.tensor, d["instances"].scores, d["num_undefined"]))
        for d in detections
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_size_is_replayed_from_its_third_time_on(device, dtype):
    model = build()
    prepared = PreparedDetector(model, dtype, channels_last=True, compile=False).eval()
    computed = PreparedDetector(model, dtype, channels_last=True, compile=False).eval()
    computed._predict = model.predict
    sizes = [(64, 64), (64, 96), (50, 64), (64, 64), (64, 96), (64, 64), (40, 60), (64, 96)]
    for number, size in enumerate(sizes):
        images = [picture(size, number), picture(size, number + 100)]
        for ours, theirs in zip(found(prepared(images)), found(computed(images))):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    # 50 and 40 of 60 pixels are padded to 64: with their sizes, not as others.
    assert device.replays == sum(padded - 2 for padded in (5, 3))


def test_a_replay_asks_for_next_to_nothing_and_waits_for_nothing(device):
    prepared = PreparedDetector(build(), torch.float32, channels_last=False, compile=False)
    counts = []
    for number in range(4):
        device.reset()
        prepared.eval()([picture((64, 64), number)])
        assert not device.waits
        counts.append(sum(device.dispatched.values()))
    assert counts[3] < 0.1 * counts[1]


def test_weights_that_change_are_followed_and_those_that_move_too(device):
    model = build()
    prepared = PreparedDetector(model, torch.float32, channels_last=False, compile=False).eval()
    image = [picture((64, 64))]
    for _ in range(4):
        prepared(image)
    assert device.replays == 2
    for change in ("in place", "moved"):
        head = model.decoder.stages[-1].head.cls_out
        if change == "in place":
            head.bias.data.add_(1.0)
        else:
            head.bias = torch.nn.Parameter(head.bias.detach() + 1.0)
        (ours,), (theirs,) = found(prepared(image)), found(model(image))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert device.replays == 3


def test_what_cannot_be_recorded_is_computed(device, caplog):
    caplog.set_level("INFO")
    model = build()

    class Reading(torch.nn.Module):
        def forward(self, maps):
            assert maps[0].sum().item() < 1e9
            return maps

    model.neck = torch.nn.Sequential(model.neck, Reading())
    prepared = PreparedDetector(model, torch.float32, channels_last=False, compile=False).eval()
    image = [picture((64, 64))]
    for _ in range(5):
        (ours,), (theirs,) = found(prepared(image)), found(model(image))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert device.replays == 0


def test_hooks_see_what_passes(device):
    model, seen = build(), []
    prepared = PreparedDetector(model, torch.float32, channels_last=False, compile=False).eval()
    for _ in range(4):
        prepared([picture((64, 64))])
    assert device.replays == 2
    handle = model.decoder.stages[0].register_forward_hook(lambda *args: seen.append(1))
    prepared([picture((64, 64))])
    assert seen and device.replays == 2
    handle.remove()
    prepared([picture((64, 64))])
    assert device.replays == 3


def test_other_operations_are_not_those_that_were_recorded(device):
    """A recording of one kind of operations does not answer for another."""
    from stage_interactor.ops import use_ops

    prepared = PreparedDetector(build(), torch.float32, channels_last=False, compile=False).eval()
    image = [picture((64, 64))]
    for _ in range(3):
        prepared(image)
    before = device.replays
    with use_ops("reference"):
        prepared(image)
    assert device.replays == before


def test_results_are_the_callers_to_keep(device):
    work = Replayed(lambda x: (x * 2, x + 1), torch.nn.Identity(), most=2)
    inputs = [torch.full((4,), float(i), device="cuda:0") for i in range(6)]
    results = [list(work(x)) for x in inputs]
    assert device.replays == 4
    for x, (doubled, more) in zip(inputs, results):
        assert torch.equal(on_host(doubled), on_host(x) * 2)
        assert torch.equal(on_host(more), on_host(x) + 1)


def test_an_evaluation_leaves_the_model_in_its_mode(device):
    for training in (True, False):
        model = build().train(training)
        assert replayed_on_gpu(model).training is training
    assert replayed_on_gpu(tiny_model()).__class__.__name__ == "StageInteractor"


def test_what_follows_a_convolution_is_one_operation(device):
    torch.manual_seed(0)
    backbone = TimmBackbone(name="resnet18", pretrained=False, channels_last=True)
    backbone.eval().requires_grad_(False)
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2.0)
    images = torch.randn(2, 3, 64, 96)
    expected = backbone(images)
    _fuse_convolutions(backbone, activations=False)
    _fuse_activations(backbone.to(DEVICE).network)
    backbone.network.recompile()
    found = on_host(backbone(images.to(DEVICE)))
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level, rtol=1e-4, atol=1e-4)
    assert device.dispatched["shift_relu"] == 17 and not device.dispatched["native_batch_norm"]
    assert not device.dispatched["relu_"] + device.dispatched["add_"]


def with_resnet(model):
    """Whose norms do something."""
    backbone = TimmBackbone(
        name="resnet10t", pretrained=False, channels=(8, 16, 24, 32), stem_width=8
    )
    for norm in (m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2.0)
    model.backbone = backbone
    model.neck = ChannelMapper(in_channels=backbone.channels, out_channels=16, norm_groups=4)
    return model.eval()


@pytest.mark.parametrize("prepared_on", ["cuda", "cpu"])
def test_a_detector_that_is_moved_finds_the_same(device, prepared_on):
    torch.manual_seed(0)
    model = with_resnet(tiny_model())
    images = [picture((64, 96), n) for n in range(2)]
    expected = found(model(images))
    places = (DEVICE, torch.device("cpu"))
    here, there = places if prepared_on == "cuda" else places[::-1]
    prepared = prepare_for_inference(model.to(here))
    replays = []
    for place in (here, there, here):
        prepared.to(place)
        device.reset()
        for detector in (prepared, copy.deepcopy(prepared)):
            for _ in range(4):
                for ours, theirs in zip(found(detector(images)), expected):
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        replays.append(device.replays)
    assert replays == [4 * (place == DEVICE) for place in (here, there, here)]
