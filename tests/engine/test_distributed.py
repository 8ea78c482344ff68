"""Several processes train as one: gloo on the CPU."""

import copy
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from checks import processes
from checks.processes import join, leave
from checks.small import random_image, tiny_model
from torch.nn.parallel import DistributedDataParallel

from stage_interactor.config import load_config
from stage_interactor.engine import ModelEma, NonFiniteError, Trainer
from stage_interactor.engine.buffers import agree_on_buffers
from stage_interactor.engine.process import distributed


def gradients(model, images):
    model.train()
    sum(model(images).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def images_with(counts):
    # One size: batches are padded alike however they are split.
    return [random_image(count, (64, 64), seed=index) for index, count in enumerate(counts)]


def build():
    torch.manual_seed(0)
    return tiny_model().double()


def work(rank, port, counts, path):
    join(rank, port, 2)
    wrapped = DistributedDataParallel(build(), find_unused_parameters=False)
    half = images_with(counts)[rank * len(counts) // 2 : (rank + 1) * len(counts) // 2]
    for _ in range(2):  # a parameter without gradient makes the second pass fail
        wrapped.zero_grad()
        wrapped.train()
        sum(wrapped(half).values()).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in wrapped.module.named_parameters()}, path)
    leave()


@pytest.mark.parametrize(
    "counts",
    [(3, 1, 2, 4), (5, 3, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0)],
    ids=["objects", "none_on_one", "one_object", "none"],
)
def test_two_processes_with_half_the_batch_give_the_gradients_of_one(counts, tmp_path, free_port):
    expected = gradients(build(), images_with(counts))
    mp.spawn(work, args=(free_port, counts, tmp_path / "grads.pt"), nprocs=2)
    actual = torch.load(tmp_path / "grads.pt")
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def accumulate(rank, port, path):
    join(rank, port, 2)
    counts = (3, 1, 2, 4, 0, 5)
    wrapped = DistributedDataParallel(moved(build()))
    data = images_with(counts)[rank * 3 : rank * 3 + 3]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    trainer = Trainer(wrapped, [data] * 2, optimizer, accumulation_steps=2)
    trainer.train(0, 2)
    if rank == 0:
        torch.save({n: p.grad for n, p in wrapped.module.named_parameters()}, path)
    leave()


def moved(model):
    """Boxes that differ, so that rounding does not decide on matches."""
    torch.manual_seed(1)
    for stage in model.decoder.stages:
        torch.nn.init.normal_(stage.head.box_out.weight, std=0.1)
    return model


def test_processes_and_parts_together_give_the_gradients_of_one_batch(tmp_path, free_port):
    expected = gradients(moved(build()), images_with((3, 1, 2, 4, 0, 5)))
    mp.spawn(accumulate, args=(free_port, tmp_path / "grads.pt"), nprocs=2)
    actual = torch.load(tmp_path / "grads.pt")
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


# What a training may be, beside several processes.
KINDS = {
    "plain": {},
    "parts": dict(accumulation_steps=2),
    "bfloat16": dict(amp={"enabled": True}),
    "float16": dict(amp={"enabled": True, "dtype": "float16"}),  # which skips steps at first
    "recompute": dict(decoder=dict(recompute_mixing=True)),
    "unused": dict(ddp=dict(find_unused_parameters=True), unused=True),
    "unused_parts": dict(ddp=dict(find_unused_parameters=True), unused=True, accumulation_steps=2),
    "compressed": dict(ddp=dict(fp16_compression=True)),
    "small_buckets": dict(ddp=dict(bucket_cap_mb=0.001), accumulation_steps=2),
}


def trainer_of(rank, views, ddp=None, decoder=None, unused=False, **kwargs):
    """Of a kind, with the configs' options; gradients are views of buckets, or not."""
    torch.manual_seed(0)
    model = moved(tiny_model(**decoder or {}))
    if unused:
        model.backbone.classifier = torch.nn.Linear(3, 3)
    cfg = load_config("configs/quickstart.py")
    cfg.train.device = "cpu"
    cfg.train.ddp.update(ddp or {})
    cfg.train.ddp.gradient_as_bucket_view &= views
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a key that PyTorch calls by another name now
        wrapped = distributed(cfg, model)
    assert not wrapped.broadcast_buffers
    assert wrapped.gradient_as_bucket_view == views
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    counts = (3, 1, 2, 4, 0, 5, 1, 2)
    data = [
        images_with(counts[step:] + counts[:step])[rank * 4 : rank * 4 + 4] for step in range(4)
    ]
    clip = {"enabled": True, "params": {"max_norm": 1.0}}
    trainer = Trainer(wrapped, data, optimizer, clip_grad=clip, **kwargs)
    trainer.register_hooks([ModelEma(model, 0.9)])
    if trainer.grad_scaler.is_enabled():  # or it would skip all of the few steps
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13)
    return trainer


def train_each_kind(rank, port, folder):
    join(rank, port, 2)
    for name, kind in KINDS.items():
        ends = []
        for views in (True, False):
            trainer = trainer_of(rank, views, **kind)
            trainer.train(0, 4)
            ends.append(trainer.model.module.state_dict())
        resumed, first = (trainer_of(rank, True, **kind) for _ in range(2))
        first.train(0, 2)
        resumed.model.module.load_state_dict(first.model.module.state_dict())
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        batches = resumed.data_loader
        resumed.reset_data_loader(lambda batches=batches: batches[2:])
        resumed.train(2, 4)
        ends.append(resumed.model.module.state_dict())
        if rank == 0:
            torch.save((ends, trainer.steps), folder / f"{name}.pt")
    leave()


@pytest.fixture(scope="module")
def ends_of_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    mp.spawn(train_each_kind, args=(processes.free_port(), folder), nprocs=2)
    return {name: torch.load(folder / f"{name}.pt") for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_buckets_train_to_the_same_weights_and_resume_to_them(kind, ends_of_kinds):
    (views, copies, resumed), steps = ends_of_kinds[kind]
    assert steps > 0
    torch.manual_seed(0)
    begun = moved(tiny_model()).state_dict()
    assert any(not torch.equal(views[key], value) for key, value in begun.items())
    for key in views:
        assert torch.equal(views[key], copies[key]), key
        assert torch.equal(views[key], resumed[key]), key


class Normed(torch.nn.Module):
    def __init__(self, neck):
        super().__init__()
        self.neck = neck
        self.norm = torch.nn.BatchNorm2d(16)
        self.register_buffer("calls", torch.tensor(0.1))  # a constant

    def forward(self, features):
        return [self.norm(level) for level in self.neck(features)]


def fail(rank, port, folder):
    join(rank, port, 3)
    torch.manual_seed(0)
    model = tiny_model()
    model.neck = Normed(model.neck)
    good, bad = images_with((1, 2)), images_with((3, 4))
    for image in good:
        image["image"] = image["image"] + 10 * rank  # other statistics on every process
    if rank == 1:
        bad[1]["image"] = torch.full((3, 64, 64), torch.inf)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(wrapped, iter([good, bad]), optimizer, accumulation_steps=2)
    trainer.train(0, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="iteration 1: .*image1.jpg"):
        trainer.train(1, 2)
    after = {key: value.clone() for key, value in model.state_dict().items()}
    average = ModelEma(model, 0.9).average.module
    agree_on_buffers(model, average)
    torch.save((before, after, model.state_dict(), average.state_dict()), folder / f"{rank}.pt")
    leave()


def test_a_failure_of_one_process_is_one_of_all_and_leaves_no_trace_on_any(tmp_path, free_port):
    mp.spawn(fail, args=(free_port, tmp_path), nprocs=3)
    before, after, agreed, averages = zip(*(torch.load(tmp_path / f"{r}.pt") for r in range(3)))
    statistics = [f"neck.norm.{name}" for name in ("running_mean", "running_var")]
    for key in before[0]:
        for rank in range(3):
            assert torch.equal(before[rank][key], after[rank][key]), key
            assert torch.equal(agreed[rank][key], agreed[0][key]), key
            assert torch.equal(averages[rank][key], agreed[0][key]), key
        if key in statistics:
            mean = torch.stack([state[key] for state in after]).mean(0)
            assert not torch.equal(after[0][key], after[1][key])
            torch.testing.assert_close(agreed[0][key], mean)
        else:
            assert torch.equal(agreed[0][key], after[0][key]), key
