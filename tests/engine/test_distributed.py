"""Several processes train as one: gloo on the CPU."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checks.processes import leave
from checks.small import random_image, tiny_model
from torch.nn.parallel import DistributedDataParallel

from stage_interactor.engine import ModelEma, NonFiniteError, Trainer
from stage_interactor.engine.buffers import agree_on_buffers


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
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
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


def join(rank, port, processes):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)


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
