"""Several processes train as one: gloo on the CPU."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checks.small import random_image, tiny_model
from torch.nn.parallel import DistributedDataParallel


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
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", [(3, 1, 2, 4), (5, 3, 0, 0)], ids=["objects", "none_on_one"])
def test_two_processes_with_half_the_batch_give_the_gradients_of_one(counts, tmp_path, free_port):
    expected = gradients(build(), images_with(counts))
    mp.spawn(work, args=(free_port, counts, tmp_path / "grads.pt"), nprocs=2)
    actual = torch.load(tmp_path / "grads.pt")
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
