"""A network of one's own computes the same, whatever is made of it for speed."""

import copy
from contextlib import nullcontext

import own_networks
import pytest
import torch
from torch import nn

from stage_interactor.engine import folded_norms
from stage_interactor.engine.folded_norms import FoldedNorms
from stage_interactor.inference import prepare
from stage_interactor.ops import convolution

SIZES = (8, 12), (11, 6), (1, 1)


def networks(rng, cases, work, **kwargs):
    """Random ones that can be computed, images of several sizes, and what ``work`` gives."""
    count = 0
    for _ in range(cases):
        torch.manual_seed(rng.randrange(2**31))
        network = own_networks.OwnNetwork(rng, **kwargs).eval()
        layout = rng.choice([torch.contiguous_format, torch.channels_last])
        images = [torch.randn(2, 3, *size).contiguous(memory_format=layout) for size in SIZES]
        try:
            expected = work(copy.deepcopy(network), images)
        except Exception:
            continue
        if all(value.isfinite().all() for maps in expected for value in maps.values()):
            count += 1
            yield network, images, expected
    assert count > 0.3 * cases


def computed(network, images):
    with torch.inference_mode():
        return [network(batch.clone()) for batch in images]


def assert_same(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, two in theirs.items():
            assert ours[name].shape == two.shape and ours[name].dtype == two.dtype
            scale = two.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(ours[name] / scale, two / scale, rtol=0, atol=tolerance)


@pytest.mark.cases(120)
@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "other devices"])
@pytest.mark.parametrize("tidy", [True, False])
def test_prepared_for_inference(rng, cases, monkeypatch, onednn, tidy):
    if not onednn:
        monkeypatch.setattr(prepare, "onednn_computes_in", lambda dtype: False)
    if tidy:  # what a trace shows is enough
        monkeypatch.setattr(prepare, "_require_same", lambda fused, network: None)
    fused = 0
    for network, images, expected in networks(rng, cases, computed, tidy=tidy):
        exact, doubles = copy.deepcopy(network).double(), [batch.double() for batch in images]
        exactly = computed(copy.deepcopy(exact), doubles)
        quick = prepared(network, images)
        fused += any(isinstance(m, prepare.FusedConvolution) for m in quick.modules())
        # What is left of large numbers that cancel is rounding, of which float64 has none.
        assert_same(computed(quick, images), expected, 1e-3)
        assert_same(computed(prepared(exact, doubles), doubles), exactly, 1e-7)
    assert fused > 0.1 * cases


def prepared(network, images):
    backbone = nn.ModuleDict({"network": network})
    prepare._fuse_convolutions(backbone, activations=True)
    if images[0].is_contiguous(memory_format=torch.channels_last):
        backbone.to(memory_format=torch.channels_last)
    return backbone["network"]


def trained(network, images, norms=None):
    """Maps and gradients, by name."""
    network.double()
    found = []
    for batch in images:
        network.zero_grad()
        with norms.used() if norms else nullcontext():
            maps = network(batch.double().clone())
        weights = (
            torch.linspace(-1, 1, level.numel()).view(level.shape) for level in maps.values()
        )
        sum((level * weight).sum() for level, weight in zip(maps.values(), weights)).backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append({name: value.detach() for name, value in (maps | grads).items()})
    return found


@pytest.mark.cases(80)
def test_trained_with_folded_norms(rng, cases, monkeypatch):
    """As if it were a library's: of one's own nothing is folded."""
    for module in (convolution, folded_norms):
        monkeypatch.setattr(module, "is_known", lambda part: True)
    folded = 0
    for network, images, expected in networks(rng, cases, trained, tidy=True):
        norms = FoldedNorms(nn.ModuleDict({"network": network}), True)
        assert_same(trained(network, images, norms), expected, 1e-7)
        folded += sum(len(found) for _, found in norms._known.values() if found)
    assert folded > 0.1 * cases
