"""Norms with fixed statistics folded into convolutions in training: nothing else changes."""

import copy
import logging
import pickle
import time

import numpy as np
import pytest
import torch
import torchvision
from checks.small import random_image, tiny_model
from checks.stand_in_device import DEVICE, on_host, stand_in_device
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from stage_interactor.engine import Trainer
from stage_interactor.engine.folded_norms import FoldedNorms
from stage_interactor.modeling import ChannelMapper, TimmBackbone
from stage_interactor.ops import convolution

SMALL = dict(name="resnet10t", channels=(8, 16, 24, 32), stem_width=8)
# How many norms there are, and how many of them do not come after a convolution alone.
NETWORKS = {
    "resnet18": (20, 0),
    "resnetv2_50": (48, 16),
    "regnety_002": (44, 0),
    "efficientnet_b0": (48, 0),
    "mobilenetv3_small_050": (34, 0),
    "densenet121": (121, 62),
    "convnext_atto": (0, 0),
}


def build(**kwargs):
    """A backbone in training, in float64, whose norms do something."""
    torch.manual_seed(0)
    backbone = TimmBackbone(pretrained=False, **kwargs or SMALL).double()
    for norm in norms_of(backbone):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    return backbone.train()


def norms_of(backbone):
    return [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def images(size=(64, 96)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()


def results(backbone, norms, dtype=None, levels=4):
    """Maps, gradients, and how many norms were computed."""
    calls, batch_norm = [], nn.functional.batch_norm
    nn.functional.batch_norm = lambda *args, **kw: calls.append(1) or batch_norm(*args, **kw)
    backbone.zero_grad()
    inputs = images().to(next(backbone.parameters()).dtype)
    try:
        torch.manual_seed(1)  # of what is dropped
        with norms.used(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            maps = list(backbone(inputs).values())
    finally:
        nn.functional.batch_norm = batch_norm
    weights = (torch.linspace(-1, 1, level.numel()).view_as(level) for level in maps)
    sum((m.double() * w).sum() for m, w in zip(maps[:levels], weights)).backward()
    grads = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return maps, grads, len(calls)


def assert_same(backbone, norms=None, **kwargs):
    """Returns how many norms were left."""
    maps, grads, _ = results(backbone, FoldedNorms(backbone, False), **kwargs)
    ours, found, left = results(backbone, norms or FoldedNorms(backbone, True), **kwargs)
    torch.testing.assert_close(ours, maps, rtol=1e-9, atol=1e-9)
    assert found.keys() == grads.keys()
    for name, value in grads.items():
        error = (found[name] - value).norm() / (value.norm() + 1e-9)
        assert error < 1e-9, f"{name}: {error}"
    return left


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_and_all_gradients_are_the_same(name):
    norms, others = NETWORKS[name]
    backbone = build(name=name, **{} if name == "densenet121" else {"drop_path_rate": 0.1})
    assert len(norms_of(backbone)) == norms
    assert assert_same(backbone) == others


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("frozen_stages", [0, 2, 3])
def test_gradients_lie_in_memory_as_the_weights_do(frozen_stages, channels_last):
    """Or optimizers and DDP take slower ways."""
    backbone = build(**SMALL, frozen_stages=frozen_stages, channels_last=channels_last)
    assert assert_same(backbone) == 0
    for parameter in backbone.parameters():
        assert parameter.grad is None or parameter.grad.stride() == parameter.stride()


def test_swin_has_nothing_to_fold():
    backbone = build(name="swin_tiny_patch4_window7_224", drop_path_rate=0.0)
    assert not norms_of(backbone) and assert_same(backbone) == 0


def test_a_map_that_nobody_reads_gives_no_gradient():
    assert assert_same(build(), levels=2) == 0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_off_by_no_more_than_it_was(kind):
    exact, _ = (results(b := build(), FoldedNorms(b, False))[i] for i in (1, 0))
    errors = []
    for folds in (False, True):
        backbone = build().float()
        _, grads, left = results(backbone, FoldedNorms(backbone, folds), dtype=kind)
        assert left == (0 if folds else len(norms_of(backbone)))
        errors.append({n: ((grads[n] - g).norm() / g.norm()).item() for n, g in exact.items()})
    plain, folded = errors
    assert all(folded[name] < 3 * plain[name] + 1e-2 for name in exact), (plain, folded)


def doubled(tensor):
    return tensor.detach() * 2


def swapped_with_an_average(tensors):
    averages = [doubled(tensor) for tensor in tensors]
    for tensor, average in zip(tensors, averages):
        tensor.data, average.data = average.data, tensor.data


def arrays(tensors):
    return [tensor.detach().numpy() for tensor in tensors]


def doubled_state(backbone):
    return {k: v * 2 if v.is_floating_point() else v for k, v in backbone.state_dict().items()}


def with_other_parameters(backbone):
    for norm in norms_of(backbone):
        norm.weight = nn.Parameter(doubled(norm.weight), requires_grad=False)


# What is done with a backbone, or with its parameters and buffers.
CHANGES = {
    "in place": lambda b, tensors: [torch.no_grad()(t.mul_)(2) for t in tensors],
    "data in place": lambda b, tensors: [t.data.mul_(2) for t in tensors],
    "by numpy": lambda b, tensors: [np.multiply(2, a, out=a) for a in arrays(tensors)],
    "data": lambda b, tensors: [setattr(t, "data", doubled(t)) for t in tensors],
    "an average": lambda b, tensors: swapped_with_an_average(tensors),
    "a state": lambda b, _: b.load_state_dict(doubled_state(b)),
    "a state's tensors": lambda b, _: b.load_state_dict(doubled_state(b), assign=True),
    "precision": lambda b, _: b.to(torch.bfloat16).to(torch.float64),
    "layout": lambda b, _: b.to(memory_format=torch.channels_last),
    "what is trained": lambda b, _: [p.requires_grad_() for p in list(b.parameters())[::3]],
    "what is frozen": lambda b, _: [p.requires_grad_(False) for p in list(b.parameters())[:-9]],
    "other parameters": lambda b, _: with_other_parameters(b),
    "a constant": lambda b, _: [setattr(norm, "eps", norm.eps + 0.1) for norm in norms_of(b)],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("frozen_stages", [2, 4])
def test_weights_and_statistics_are_folded_as_they_are(frozen_stages, change):
    """Whether they are frozen, and however they have come to be others."""
    backbone = build(**SMALL, frozen_stages=frozen_stages)
    if frozen_stages == 4:  # or there is no gradient to compare
        backbone.network.layer4[0].conv1.weight.requires_grad_()
    norms = FoldedNorms(backbone, True)
    for _ in range(3):
        tensors = [
            t for t in (*backbone.parameters(), *backbone.buffers()) if t.is_floating_point()
        ]
        assert assert_same(backbone, norms) == 0
        CHANGES[change](backbone, tensors)
    assert assert_same(backbone, norms) == 0


def test_modules_that_change_are_seen():
    backbone = build()
    norms = FoldedNorms(backbone, True)
    assert assert_same(backbone, norms) == 0
    live = norms_of(backbone)[3].train()
    statistics = [copy.deepcopy(dict(live.named_buffers())) for _ in range(3)]
    for kept, folds in zip(statistics, (False, norms)):
        live.load_state_dict(statistics[2], strict=False)
        folded = norms if folds else FoldedNorms(backbone, False)
        assert results(backbone, folded)[2] == (1 if folds else len(norms_of(backbone)))
        kept.update({k: v.clone() for k, v in live.named_buffers()})
    torch.testing.assert_close(*statistics[:2])
    assert not torch.equal(statistics[0]["running_mean"], statistics[2]["running_mean"])
    backbone.train()
    backbone.network.layer3 = nn.Sequential(
        nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()
    ).double()
    backbone.train()
    assert assert_same(backbone, norms) == 1  # behind a convolution with a bias


def test_hooks_of_ones_own_are_called():
    backbone, seen = build(), []
    norms = FoldedNorms(backbone, True)
    handle = norms_of(backbone)[2].register_forward_hook(lambda *args: seen.append(1))
    assert assert_same(backbone, norms) == len(norms_of(backbone)) and len(seen) == 2
    handle.remove()
    assert assert_same(backbone, norms) == 0
    everywhere = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert assert_same(backbone, norms) == len(norms_of(backbone))
    finally:
        everywhere.remove()


def test_what_is_compiled_recomputed_or_replaced_is_left():
    for change in (
        lambda network: network.layer2.compile(backend="eager"),
        lambda network: setattr(network, "grad_checkpointing", True),
        lambda network: setattr(network.bn1, "forward", network.bn1.forward),
        lambda network: setattr(network, "forward", network.forward),
    ):
        backbone = build()
        change(backbone.network)
        assert assert_same(backbone) == len(norms_of(backbone))


class Wrapper(nn.Module):
    """A backbone of one's own around a network of timm, with a norm of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"body": build().network})
        self.norm = nn.BatchNorm2d(24).double()
        self.turns = 0

    def forward(self, inputs):
        self.turns += 1
        *maps, last = self.inner["body"](inputs)
        maps[-1] = self.norm(maps[-1]) * (self.turns % 2)
        return dict(enumerate([*maps, last]))


def test_of_code_of_ones_own_only_what_it_has_of_libraries_is_folded():
    backbone = Wrapper().eval()
    left = [results(backbone, FoldedNorms(backbone, True))[2] for _ in range(2)]
    assert left == [1, 1] and backbone.turns == 2
    backbone.turns = 0
    one = results(backbone, FoldedNorms(backbone, False))
    backbone.turns = 0
    two = results(backbone, FoldedNorms(backbone, True))
    torch.testing.assert_close(one[:2], two[:2], rtol=1e-9, atol=1e-9)


def test_the_network_is_its_own():
    backbone = build()
    norms = FoldedNorms(backbone, True)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert_same(backbone, norms)
    with norms.used():
        backbone(images())
        averaged = copy.deepcopy(backbone.state_dict())
    assert "forward" not in vars(backbone.network)
    assert before.keys() == averaged.keys() == backbone.state_dict().keys()
    assert all(torch.equal(value, averaged[name]) for name, value in before.items())
    clone = pickle.loads(pickle.dumps(copy.deepcopy(backbone)))
    assert_same(clone)


# Of a detector.


def detector():
    torch.manual_seed(0)
    model = tiny_model()
    model.backbone = build().float()
    model.neck = ChannelMapper(in_channels=model.backbone.channels, out_channels=16, norm_groups=4)
    torch.manual_seed(1)
    for stage in model.decoder.stages:  # as built, all boxes are the whole image
        nn.init.normal_(stage.head.box_out.weight, std=0.1)
    return model


def trained(model, steps=3, **kwargs):
    batches = [
        [random_image(n, size, seed=i) for i, n in enumerate((2, 3, 1))]
        for size in ((64, 64), (64, 96), (96, 64))
    ]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
    )
    trainer = Trainer(model, batches * 9, optimizer, **kwargs)
    trainer.train(0, steps)
    return trainer


def losses(trainer):
    return [value for value, _ in trainer.storage.history("total_loss").values()]


@pytest.mark.parametrize("parts", [1, 2])
def test_training_is_the_same(parts):
    models = [detector().double() for _ in range(2)]
    for model, folds in zip(models, (False, True)):
        trained(model, fold_norms=folds, accumulation_steps=parts)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(
            one, two, msg=lambda m, n=name: f"{n}: {m}", rtol=1e-7, atol=1e-9
        )


def test_on_a_cpu_nothing_is_folded_without_being_asked_for():
    trainer = trained(detector(), steps=1)
    assert trainer._folded_norms.folds is False and trainer.state_dict()["fold_norms"] is None


@pytest.fixture
def device():
    with stand_in_device() as stand_in:
        yield stand_in


def test_a_network_that_is_built_beside_the_device_is_the_same():
    expected = build().state_dict()
    with stand_in_device():
        found = build().state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_on_a_gpu_in_mixed_precision(device):
    found = []
    for folds in (False, True):
        trainer = trained(detector().to(DEVICE), fold_norms=folds, amp={"enabled": True})
        found.append(losses(trainer))
        assert (device.dispatched["shift_relu"] > 0) is folds
        assert (device.dispatched["native_batch_norm"] == 0) is folds
        # Maps stay in channels_last up to the decoder.
        assert device.dispatched["group_norm"] == 12 and not device.dispatched["native_group_norm"]
        device.reset()
    for parameter in trainer.model.backbone.parameters():
        assert parameter.grad is None or parameter.grad.stride() == parameter.stride()
    torch.testing.assert_close(*found, rtol=2e-2, atol=0)


def test_networks_of_torchvision_too(device):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    layers = {f"layer{number}": f"stride{2 << number}" for number in (1, 2, 3)}
    backbone = nn.Sequential(IntermediateLayerGetter(network, layers)).eval().to(DEVICE)
    images = torch.randn(1, 3, 64, 64).to(DEVICE)
    expected = on_host(backbone(images))
    norms = FoldedNorms(backbone)
    with norms.used():
        backbone(images)
        assert isinstance(norms.measured, bool)
        norms.folds = True
        device.reset()
        found = on_host(backbone(images))
    assert not device.dispatched["native_batch_norm"]
    assert found.keys() == set(layers.values())
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slow", ["plain", "folded"])
def test_the_faster_way_is_taken_told_and_kept(device, caplog, monkeypatch, slow):
    caplog.set_level(logging.INFO, "stage_interactor.engine")
    logging.getLogger("stage_interactor").propagate = True
    model = detector().to(DEVICE)
    owner, name = {
        "plain": (nn.functional, "batch_norm"),
        "folded": (convolution.FoldedConvolution, "forward"),
    }[slow]
    work = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kw: time.sleep(0.02) or work(*args, **kw))
    trainer = trained(model, steps=2)
    assert trainer._folded_norms.folds is (slow == "plain")
    assert caplog.text.count("(train.fold_norms)") == 1 and "of FeatureListNet:" in caplog.text
    state = trainer.state_dict()
    assert state["fold_norms"] is (slow == "plain")
    # A run that goes on does as it did, whatever would be measured now.
    again = Trainer(model, [], trainer.optimizer)
    assert again._folded_norms.folds == "auto"
    again.load_state_dict(state)
    assert again._folded_norms.folds is again.state_dict()["fold_norms"] is (slow == "plain")
    told = Trainer(model, [], trainer.optimizer, fold_norms=False)
    told.load_state_dict(state | {"fold_norms": True})
    assert told._folded_norms.folds is False


def test_measuring_changes_nothing(device):
    """Neither weights, nor random numbers, nor statistics of norms that are live."""
    kept = []
    for folds in ("auto", True):
        model = detector()
        model.backbone.freeze_norm = False
        model.backbone.train()
        for norm in norms_of(model.backbone)[3:]:
            norm.train = lambda mode=True, own=norm: own
            norm.eval()
        trainer = trained(model.to(DEVICE), steps=1, fold_norms=folds)
        assert device.dispatched["native_batch_norm"] > 0
        kept.append(on_host(dict(trainer.model.state_dict())))
    for name, value in kept[0].items():
        torch.testing.assert_close(value, kept[1][name], msg=lambda m, n=name: f"{n}: {m}")


def test_where_results_must_be_the_same_each_time_nothing_is_measured(device):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        trainer = trained(detector().to(DEVICE), steps=1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer._folded_norms.folds is True and trainer.state_dict()["fold_norms"] is None


def test_other_values_than_auto_true_and_false_are_refused():
    with pytest.raises(ValueError, match="train.fold_norms must be"):
        trained(detector(), fold_norms="always")
