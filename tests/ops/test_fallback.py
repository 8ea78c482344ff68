"""Kernels that cannot start, and limits of devices that are not here."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from checks.operations import relative_error

triton_errors = pytest.importorskip("triton.runtime.errors")

from stage_interactor.ops import (  # noqa: E402
    fallback,
    map_norm,
    map_norm_triton,
    mixing,
    mixing_triton,
    sampling,
    sampling_triton,  # noqa: E402
    shift_relu,
    shift_relu_triton,
)

CANNOT_START = [
    triton_errors.OutOfResources(83968, 65536, "shared memory"),
    triton_errors.PTXASError("ptxas fatal"),
    RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    RuntimeError("PassManager::run failed"),
    subprocess.CalledProcessError(1, ["gcc"]),
    FileNotFoundError(2, "No such file or directory", "gcc"),
]
REAL = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ValueError("at most 6 feature levels can be sampled, got 7"),
]


@pytest.fixture(autouse=True)
def nothing_has_failed_yet(monkeypatch):
    monkeypatch.setattr(fallback, "_failed", set())


def on_cuda(op, *inputs):
    """What an operator does on CUDA, here with tensors on the CPU."""
    return op._backend_fns["cuda"](*inputs)


def raising(error, calls):
    def launch(*inputs, **sizes):
        calls.append(error)
        raise error

    return launch


def mixing_inputs(kind):
    torch.manual_seed(0)
    shape = (16, 16) if kind == "channels" else (32, 16)
    out = shape[0] * (2 if kind == "points" else 1)
    make = lambda *size: torch.randn(3, *size)  # noqa: E731
    gates = [make(side).sigmoid() for side in shape]
    return [make(16, 16), make(*shape) / 4, make(out), make(*shape) / 4, *gates]


@pytest.mark.parametrize("error", CANNOT_START, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["channels", "points"])
def test_mixing_goes_on_without_a_kernel_that_cannot_start(monkeypatch, caplog, kind, error):
    op, backward_op = (getattr(mixing, f"mix_{kind}{end}_op") for end in ("", "_backward"))
    inputs, calls = mixing_inputs(kind), []
    expected = op(*inputs)
    wanted = backward_op(torch.ones_like(expected), *inputs)
    for name in (f"mix_{kind}", f"mix_{kind}_backward"):
        monkeypatch.setattr(mixing_triton, name, raising(error, calls))
    for _ in range(3):
        assert relative_error(on_cuda(op, *inputs), expected) < 1e-6
        given = on_cuda(backward_op, torch.ones_like(expected), *inputs)
        assert all(relative_error(ours, theirs) < 1e-6 for ours, theirs in zip(given, wanted))
    assert len(calls) == 2, "tried again"
    told = [record for record in caplog.records if "cannot start" in record.message]
    assert len(told) == 2 and all(type(error).__name__ in record.message for record in told)


@pytest.mark.parametrize("error", REAL, ids=lambda error: str(error)[:30])
def test_a_real_error_is_told(monkeypatch, error):
    calls = []
    monkeypatch.setattr(mixing_triton, "mix_channels", raising(error, calls))
    monkeypatch.setattr(sampling_triton, "sample_forward", raising(error, calls))
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)[:20].replace("[", r"\[")):
            on_cuda(mixing.mix_channels_op, *mixing_inputs("channels"))
        with pytest.raises(type(error)):
            on_cuda(sampling.sample_op, *sampling_inputs())
    assert len(calls) == 4


def sampling_inputs():
    torch.manual_seed(0)
    xy = torch.rand(2, 3, 2, 8, 2) * 40 - 4
    weights = torch.rand(2, 3, 2, 8, 2).softmax(-1)
    return torch.randn(2, 80 + 20, 2 * 16), xy, weights, [8, 10, 4, 5], [4.0, 8.0]


@pytest.mark.parametrize("needs_value", [True, False])
def test_sampling_goes_on_without_a_kernel_that_cannot_start(monkeypatch, caplog, needs_value):
    inputs, calls = sampling_inputs(), []
    expected = sampling.sample_op(*inputs)
    gradient = torch.randn_like(expected)
    wanted = sampling.sample_backward_op(gradient, *inputs, needs_value)
    for name in ("sample_forward", "sample_backward"):
        monkeypatch.setattr(sampling_triton, name, raising(CANNOT_START[0], calls))
    for _ in range(2):
        assert torch.equal(on_cuda(sampling.sample_op, *inputs), expected)
        given = on_cuda(sampling.sample_backward_op, gradient, *inputs, needs_value)
        for ours, theirs in zip(given, wanted):
            assert ours.shape == theirs.shape and relative_error(ours, theirs) < 1e-6
    assert len(calls) == 2
    assert sum("cannot start" in record.message for record in caplog.records) == 2


def test_a_kernel_that_fails_in_one_stage_leaves_the_gradient_of_the_others(monkeypatch):
    """What the kernel has added up and what is added up without it are one gradient."""
    inputs = sampling_inputs()
    value = inputs[0]
    gradient = torch.randn(2, 3, 2, 8, 16)
    once = sampling.sample_backward_op(gradient, *inputs, True)[0]
    collected = sampling.FeatureGradient()
    collected.backward_on_cuda(gradient, *inputs)
    monkeypatch.setattr(sampling_triton, "sample_backward", raising(CANNOT_START[0], []))
    collected.backward_on_cuda(gradient, *inputs)
    assert relative_error(collected.total(value), 2 * once) < 1e-6


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_results_must_be_the_same_each_time_the_kernel_adds_nothing(
    monkeypatch, deterministic, dtype
):
    """The features' gradient has the bits of the CPU's, summed in an order of its own."""
    value, *points = sampling_inputs()
    value = value.to(dtype)
    gradient = torch.randn(2, 3, 2, 8, 16).to(dtype)
    wanted = sampling.sample_backward_op(gradient, value, *points, True)
    launch, targets = sampling_triton.sample_backward, []

    def watched(*inputs, **sizes):
        targets.append(inputs[6])
        return launch(*inputs)

    monkeypatch.setattr(sampling_triton, "sample_backward", watched)
    given = on_cuda(sampling.sample_backward_op, gradient, value, *points, True)
    assert torch.equal(given[0], wanted[0]) and targets == [None]
    limit = 1e-5 if dtype == torch.float32 else 1e-2  # on a CPU pixels' weights have its precision
    assert all(relative_error(a, b) < limit for a, b in zip(given[1:], wanted[1:]))
    collected = sampling.FeatureGradient()
    for _ in range(2):
        collected.backward_on_cuda(gradient, value, *points)
    again = sampling.FeatureGradient()
    for _ in range(2):
        again.backward_on_cuda(gradient, value, *points)
    assert torch.equal(collected.total(value), again.total(value)) and targets == [None] * 5


def test_sizes_on_the_device_and_the_same_gradient_each_time_exclude_each_other(deterministic):
    value, xy, weights, _, strides = sampling_inputs()
    gradient, map_sizes = torch.randn(2, 3, 2, 8, 16), torch.tensor([[8, 10], [4, 5]]).int()
    inputs = gradient, value, xy, weights, [], strides
    with pytest.raises(ValueError, match="pass them as numbers"):
        sampling_triton.sample_backward(*inputs, torch.zeros_like(value), map_sizes)
    sampling_triton.sample_backward(*inputs, None, map_sizes)


def device(monkeypatch, capability, shared):
    """A CUDA device with these limits, for tensors that say they lie there."""
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared * 1024
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def there(*shape, dtype):
    return SimpleNamespace(shape=torch.Size(shape), dtype=dtype, device=torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("capability", "shared", "dtype", "points", "expected"),
    [
        ((7, 5), 64, torch.float16, 64, True),
        ((7, 5), 64, torch.float32, 64, True),
        ((7, 5), 64, torch.bfloat16, 64, False),  # no products of bfloat16
        ((8, 0), 163, torch.bfloat16, 64, True),
        ((8, 6), 99, torch.float32, 128, True),
        ((7, 5), 64, torch.float32, 128, False),  # two factors of 32 KiB and a step's results
        ((9, 0), 227, torch.bfloat16, 64, True),
        ((12, 0), 32, torch.float32, 64, False),  # a device with less than there is today
    ],
)
def test_the_limits_of_the_device_are_asked(
    monkeypatch, capability, shared, dtype, points, expected
):
    device(monkeypatch, capability, shared)
    own = there(12, 64, points, dtype=dtype)
    assert mixing_triton.supports(there(12, points, 64, dtype=dtype), own) is expected


@pytest.mark.parametrize(
    "error", CANNOT_START[:1] + REAL[:1], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("kind", ["shift_relu", "map_norm"])
def test_maps_go_on_without_a_kernel_that_cannot_start(monkeypatch, kind, error):
    torch.manual_seed(0)
    maps, residual = (torch.randn(2, 8, 3, 5).double() for _ in range(2))
    vectors = torch.rand(8).double(), torch.randn(8).double()
    module, apply, plain, tensors = {
        "shift_relu": (
            shift_relu_triton,
            lambda x, shift, other: shift_relu._ShiftReLU.apply(x.clone(), shift, other),
            lambda x, shift, other: (x + shift[:, None, None] + other).relu(),
            (maps, vectors[0], residual),
        ),
        "map_norm": (
            map_norm_triton,
            lambda x, weight, bias: map_norm._GroupNorm.apply(x, weight, bias, 4, 1e-5),
            lambda x, weight, bias: torch.nn.functional.group_norm(x, 4, weight, bias, 1e-5),
            (maps, *vectors),
        ),
    }[kind]
    calls = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(module, name, raising(error, calls))
    if error in REAL:
        with pytest.raises(type(error)):
            apply(*tensors)
        return
    found = []
    for way in (apply, plain):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = way(*leaves)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert len(calls) == 2
    torch.testing.assert_close(*found)
