"""The decoder replayed in training, on a stand-in for the device that forbids what a GPU does."""

import logging

import pytest
import torch
from checks.small import random_image, tiny_model
from checks.stand_in_device import DEVICE, on_host, stand_in_device

from stage_interactor.engine import Trainer
from stage_interactor.engine.decoder_graph import DecoderGraph

SIZES = [(64, 64), (64, 96), (32, 64), (128, 96), (64, 64)]


@pytest.fixture
def device():
    with stand_in_device() as stand_in:
        yield stand_in


def build(dtype=torch.float32, **decoder):
    torch.manual_seed(0)
    model = tiny_model(**decoder).to(dtype)
    torch.manual_seed(1)
    for stage in model.decoder.stages:  # as built, all boxes are the whole image
        torch.nn.init.normal_(stage.head.box_out.weight, std=0.1)
        torch.nn.init.normal_(stage.mixing.out.weight, std=0.1)
    return model.to(DEVICE)


def batch(size=(64, 64), counts=(2, 3, 1, 2)):
    return [random_image(count, size, seed=index) for index, count in enumerate(counts)]


def trained(batches, model=None, dtype=torch.float32, **kwargs):
    """A trainer that has taken a step on each of the batches."""
    model = model or build(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    clip = {"enabled": True, "params": {"max_norm": 1.0}}
    trainer = Trainer(model, batches * 3, optimizer, clip_grad=clip, **kwargs)
    trainer.train(0, len(batches))
    return trainer


def weights(trainer):
    return on_host(dict(trainer.model.state_dict()))


def losses(trainer):
    return [value for value, _ in trainer.storage.history("total_loss").values()]


def assert_same(one, other, **tolerance):
    for (name, value), theirs in zip(weights(one).items(), weights(other).values()):
        torch.testing.assert_close(value, theirs, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    torch.testing.assert_close(losses(one), losses(other), **tolerance)


EXACT = dict(rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_replayed_training_is_the_training(device, parts):
    batches = [batch(size) for size in SIZES]
    kwargs = dict(dtype=torch.float64, accumulation_steps=parts)
    plain = trained(batches, cuda_graph=False, **kwargs)
    assert device.replays == 0
    replayed = trained(batches, cuda_graph=True, **kwargs)
    assert device.replays >= 2 * len(SIZES)
    assert_same(plain, replayed, **EXACT)


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_may_be_moved_into_buckets_as_they_come(device, parts):
    """As DistributedDataParallel does with views: the next replay fills its own memory anew."""

    def in_bucket():
        model = build(torch.float64)
        sizes = [parameter.numel() for parameter in model.parameters()]
        bucket = torch.zeros(sum(sizes), dtype=torch.float64, device=DEVICE)
        for parameter, view in zip(model.parameters(), bucket.split(sizes)):
            view = view.view_as(parameter)

            def move(parameter, view=view):
                if parameter.grad is not view:
                    parameter.grad = view.copy_(parameter.grad)

            parameter.register_post_accumulate_grad_hook(move)
        return model

    batches = [batch(size) for size in SIZES]
    kwargs = dict(dtype=torch.float64, accumulation_steps=parts)
    plain = trained(batches, cuda_graph=False, **kwargs)
    replayed = trained(batches, in_bucket(), cuda_graph=True, **kwargs)
    assert device.replays >= 2 * len(SIZES)
    assert_same(plain, replayed, **EXACT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_replayed_training_in_mixed_precision(device, dtype):
    batches = [batch(size) for size in SIZES]
    amp = {"enabled": True, "dtype": dtype}
    plain = trained(batches, cuda_graph=False, amp=amp)
    replayed = trained(batches, cuda_graph=True, amp=amp)
    assert device.replays == 2 * len(SIZES)
    torch.testing.assert_close(losses(plain), losses(replayed), rtol=1e-5, atol=0)


def test_one_recording_serves_all_sizes_up_to_the_largest(device, caplog):
    caplog.set_level(logging.INFO, "stage_interactor.engine")
    logging.getLogger("stage_interactor").propagate = True
    trained([batch(size) for size in SIZES])
    # 64 x 96 is larger than 64 x 64, and 128 x 96 than both.
    assert caplog.text.count("recorded for 4 images") == 3


def test_a_replay_waits_for_nothing_and_asks_for_little(device):
    batches = [batch() for _ in range(3)]
    counts = {}
    for graph in (False, True):
        trainer = trained(batches[:2], cuda_graph=graph)
        device.reset()
        trainer.train(0, 1)
        counts[graph] = sum(device.dispatched.values()), len(device.waits)
    assert counts[True][0] < 0.6 * counts[False][0]
    assert counts[True][1] == counts[False][1] == 2


def test_weights_that_moved_are_recorded_anew(device):
    batches = [batch() for _ in range(3)]
    trainers = [trained(batches, dtype=torch.float64, cuda_graph=graph) for graph in (False, True)]
    for trainer in trainers:
        for parameter in trainer.model.decoder.parameters():
            parameter.requires_grad_(parameter.dim() > 1)
        stage = trainer.model.decoder.stages[0]
        weight = stage.head.cls_out.weight
        stage.head.cls_out.weight = torch.nn.Parameter(weight.detach().clone() * 0.5)
        trainer.train(0, 3)
    assert_same(*trainers, **EXACT)


def test_a_decoder_that_somebody_looks_into_is_computed(device):
    seen = []
    model = build()
    model.decoder.stages[0].register_forward_hook(lambda *args: seen.append(1))
    trained([batch()] * 3, model)
    assert len(seen) == 3 and device.replays == 0


class Reading(torch.nn.Module):
    """A part of one's own for which the host waits."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, content):
        return self.part(content) * (1.0 if content.sum().item() > -1e9 else 0.5)


def with_reading():
    model = build(torch.float64)
    stage = model.decoder.stages[1]
    stage.feedforward = Reading(stage.feedforward)
    return model


def test_parts_of_ones_own_are_computed_and_named(device, caplog):
    logging.getLogger("stage_interactor").propagate = True
    plain = trained([batch()] * 3, build(torch.float64), cuda_graph=False)
    own = trained([batch()] * 3, with_reading())
    assert device.replays == 0
    assert caplog.text.count("not replayed (train.cuda_graph): Reading may do what") == 1
    torch.testing.assert_close(losses(plain), losses(own), **EXACT)


def test_a_part_that_cannot_be_recorded_is_told_once_and_computed(device, caplog, monkeypatch):
    """Of classes that are known, for others are not tried."""
    logging.getLogger("stage_interactor").propagate = True
    plain = trained([batch()] * 3, build(torch.float64), cuda_graph=False)
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        trained([batch()], with_reading(), cuda_graph=True)
    monkeypatch.setattr(Reading, "__module__", "stage_interactor.modeling.stage")
    own = trained([batch()] * 3, with_reading())
    assert device.replays == 0
    assert caplog.text.count("The decoder is not replayed (train.cuda_graph): ") == 1
    assert "_local_scalar_dense" in caplog.text
    torch.testing.assert_close(losses(plain), losses(own), **EXACT)


def test_recomputed_mixing_goes_without_and_says_so(device, caplog):
    logging.getLogger("stage_interactor").propagate = True
    trained([batch()] * 2, build(recompute_mixing=True))
    assert device.replays == 0 and "recompute_mixing" in caplog.text


def gradients(model, calls, graph=None, zero=True):
    """Of the sum of what several calls give; ``calls`` are lists of sizes of images."""
    if zero:
        model.zero_grad(set_to_none=True)
    total = 0.0
    for size in calls:
        inputs = model.preprocess(batch(size))
        outputs = (
            graph(model.neck(model.backbone(inputs.tensor)), *model.queries(inputs.sizes))
            if graph
            else model.decode(inputs.tensor, inputs.sizes)
        )
        total = total + sum(
            field.square().mean() for output in outputs for field in (output.logits, output.content)
        )
    total.backward()
    return {name: on_host(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def test_two_forward_passes_before_their_backward_pass(device):
    model = build(torch.float64).train()
    graph = DecoderGraph(model.decoder, required=True)
    for calls in ([(64, 64)], [(64, 64), (32, 64)], [(64, 96), (64, 64)], [(64, 64)]):
        expected = gradients(model, calls)
        found = gradients(model, calls, graph)
        for name, value in expected.items():
            torch.testing.assert_close(value, found[name], **EXACT)
    assert device.replays >= 8


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_add_up_over_backward_passes(device, set_to_none):
    model = build(torch.float64).train()
    graph = DecoderGraph(model.decoder, required=True)
    sizes = [(64, 64), (32, 64), (64, 64)]
    expected = [gradients(model, [size]) for size in sizes]
    model.zero_grad(set_to_none=True)
    for size in sizes:
        gradients(model, [size], graph, zero=False)
    for name, parameter in model.named_parameters():
        if name in expected[0]:
            total = sum(grads[name] for grads in expected)
            torch.testing.assert_close(on_host(parameter.grad), total, **EXACT)
    model.zero_grad(set_to_none=set_to_none)
    found = gradients(model, sizes[:1], graph, zero=False)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[name], value, **EXACT)


def test_outputs_without_gradient_are_the_callers_to_keep(device):
    model = build(torch.float64).train()
    graph = DecoderGraph(model.decoder, required=True)
    gradients(model, [(64, 64)], graph)
    with torch.no_grad():
        kept = []
        for size in ((64, 64), (32, 64)):
            inputs = model.preprocess(batch(size))
            maps = model.neck(model.backbone(inputs.tensor))
            kept.append(
                (graph(maps, *model.queries(inputs.sizes)), model.decode(*inputs[:1], inputs.sizes))
            )
    assert device.replays == 2 + 2
    for ours, theirs in kept:
        torch.testing.assert_close(on_host(ours[-1]), on_host(theirs[-1]), **EXACT)


def test_the_model_is_its_own_after_training(device):
    trainer = trained([batch()] * 2)
    model = trainer.model
    assert "forward" not in vars(model.decoder)
    assert set(model.state_dict()) == set(build().state_dict())


def test_other_values_than_auto_true_and_false_are_refused(device):
    with pytest.raises(ValueError, match="train.cuda_graph must be"):
        trained([batch()], cuda_graph="always")
