"""What a training step asks of a GPU: it must not wait for Python, nor Python for it."""

import pytest
import step_cost
from checks.stand_in_device import stand_in_device

# Before anything was done about it: operations of a step of 16 and of 8 images.
BEFORE = {"quickstart.py": 2964, "stage_interactor_r50_100q_12ep.py": 6708}
# Without views and what asks for memory.
LAUNCHES = {"quickstart.py": 560, "stage_interactor_r50_100q_12ep.py": 820}


@pytest.mark.parametrize("config", BEFORE)
def test_a_step_asks_for_few_operations_and_waits_for_two(config):
    costs = step_cost.step_cost(f"configs/{config}", 3, (64, 64), cuda_graph=True)
    assert len(costs["operations"]) <= 0.36 * BEFORE[config]
    assert len(costs["launches"]) <= LAUNCHES[config]
    assert len(costs["waits"]) == 2  # the matching; then all that is to be known of the step
    matching, losses = costs["waits"]
    assert "matcher.py" in matching and "trainer.py" in losses
    # The images with their objects; sizes of the maps, matches, which stages label which.
    assert len(costs["transfers"]) == 4
    largest, *others = sorted(costs["transfers"], reverse=True)
    assert largest >= 3 * 3 * 64 * 64 and sum(others) < 10_000


def test_computed_operation_by_operation_it_waits_no_more():
    costs = step_cost.step_cost("configs/quickstart.py", 3, (64, 64), cuda_graph=False)
    assert len(costs["waits"]) == 2 and len(costs["transfers"]) == 3
    assert len(costs["operations"]) <= 0.97 * BEFORE["quickstart.py"]


def test_the_stand_in_sees_what_waits():
    import torch

    with stand_in_device() as device:
        values = torch.arange(6.0, device="cuda:0")
        for read in (
            lambda: values.sum().item(),
            lambda: values.cpu(),
            lambda: values.tolist(),
            lambda: values.nonzero(),
            lambda: values[values > 2],
            lambda: bool(values.any()),
            lambda: torch.ones(3).to("cuda:0"),
            lambda: values.to("cpu", torch.float64),
        ):
            device.reset()
            read()
            assert len(device.waits) == 1
        device.reset()
        torch.ones(3).pin_memory().to("cuda:0", non_blocking=True)
        assert (values.mul(2) + 1).float().sum().device.type == "cuda"
        assert not device.waits and device.uploads == [12]
        with pytest.raises(RuntimeError, match="tensors of the host and of the device"):
            values + torch.ones(6)
