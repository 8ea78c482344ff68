"""The CUDA kernels, on Triton's interpreter where there is no GPU, against the CPU operators.

The interpreter cannot multiply bfloat16 matrices; mixing in bfloat16 is checked on CUDA only, by
test_operations.py.
"""

import pytest
import torch
from checks.operations import mixing_inputs, relative_error, undecided

pytest.importorskip("triton")

from stage_interactor.ops import (  # noqa: E402
    map_norm,
    map_norm_triton,
    mixing,
    mixing_triton,
    sampling,
    sampling_triton,
    shift_relu,
    shift_relu_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES, STRIDES = [15, 21, 8, 11, 4, 6, 2, 3], [4.0, 8.0, 16.0, 32.0]


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
@pytest.mark.parametrize("group_dim", [16, 24])
def test_sampling(dtype, limit, group_dim):
    torch.manual_seed(0)
    batch, queries, groups, points = 2, 3, 2, 8
    exact = torch.promote_types(dtype, torch.float32)
    pixels = sum(h * w for h, w in zip(SIZES[0::2], SIZES[1::2]))
    value = torch.randn(batch, pixels, groups * group_dim).to(dtype)
    xy = torch.rand(batch, queries, groups, points, 2, dtype=exact)
    xy = xy * torch.tensor([110.0, 90.0]).to(exact) - 15  # some outside
    xy[0, 0, 0, 0] = torch.tensor([1e9, -1e9])
    weights = torch.rand(batch, queries, groups, points, 4, dtype=exact).softmax(-1)
    inputs = value, xy, weights, SIZES, STRIDES
    expected = sampling.sample_op(*inputs)
    gradient = torch.randn_like(expected)
    wanted = sampling.sample_backward_op(gradient, *inputs, True)

    there = [on_device(value) for value in inputs]
    actual = sampling_triton.sample_forward(*there)
    assert actual.dtype == dtype and relative_error(actual, expected) < limit
    # What other stages have collected stays.
    collected = torch.ones(value.shape, dtype=exact, device=DEVICE)
    given = sampling_triton.sample_backward(on_device(gradient), *there, collected)
    assert relative_error(collected - 1, wanted[0]) < 3 * limit
    for ours, theirs in zip(given, wanted[1:]):
        assert relative_error(ours, theirs) < limit
    without_value = sampling_triton.sample_backward(on_device(gradient), *there, None)
    for ours, theirs in zip(without_value, given):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("behind", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_read_on_the_device_give_the_same_bits(dtype, behind):
    """And what lies behind the maps in the buffer, here NaN, is not read and gets no gradient."""
    torch.manual_seed(0)
    pixels = sum(h * w for h, w in zip(SIZES[0::2], SIZES[1::2]))
    value = torch.randn(2, pixels + behind, 2 * 16, device=DEVICE).to(dtype)
    value[:, pixels:] = float("nan")
    xy = torch.rand(2, 3, 2, 8, 2, device=DEVICE) * 130 - 15
    weights = torch.rand(2, 3, 2, 8, 4, device=DEVICE).softmax(-1)
    gradient = torch.randn(2, 3, 2, 8, 16, device=DEVICE).to(dtype)
    map_sizes = torch.tensor(SIZES, dtype=torch.int32, device=DEVICE).view(4, 2)
    results = []
    for sizes, on_device, length in ((SIZES, None, pixels), ([], map_sizes, pixels + behind)):
        inputs = value[:, :length].contiguous(), xy, weights, sizes, STRIDES
        collected = torch.zeros(2, length, 32, device=DEVICE)
        out = sampling_triton.sample_forward(*inputs, on_device)
        grads = sampling_triton.sample_backward(gradient, *inputs, collected, on_device)
        assert not collected[:, pixels:].any()
        results.append((out, *grads, collected[:, :pixels]))
    for numbers, read in zip(*results):
        assert torch.equal(numbers, read) and numbers.isfinite().all()


def test_sizes_of_a_wrong_form_are_told():
    value = torch.randn(1, 10, 32, device=DEVICE)
    xy, weights = value.new_zeros(1, 1, 2, 4, 2), value.new_zeros(1, 1, 2, 4, 2)
    for wrong in (torch.zeros(2, 2), torch.zeros(3, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"int32 of \(2, 2\)"):
            sampling_triton.sample_forward(value, xy, weights, [], [4.0, 8.0], wrong)


def test_sampling_of_no_queries():
    value = torch.randn(1, 10, 32, device=DEVICE)
    xy, weights = value.new_zeros(1, 0, 2, 4, 2), value.new_zeros(1, 0, 2, 4, 2)
    inputs = value, xy, weights, [2, 4, 1, 2], [4.0, 8.0]
    assert sampling_triton.sample_forward(*inputs).shape == (1, 0, 2, 4, 16)
    grads = sampling_triton.sample_backward(value.new_zeros(1, 0, 2, 4, 16), *inputs, None)
    assert [grad.shape for grad in grads] == [xy.shape, weights.shape]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("reuses", [True, False], ids=["reuse", "no reuse"])
@pytest.mark.parametrize("kind", ["channels", "points"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 3e-3)], ids=str
)
def test_mixing(dtype, limit, kind, reuses, bias):
    torch.manual_seed(0)
    pairs, points, width, rows = 3, 32, 16, 64
    shape = (width, width) if kind == "channels" else (rows, points)
    # As in the decoder: own filters are one part of what a layer generates, gates a row of two.
    own = torch.randn(pairs, shape[0] * shape[1] + 5)[:, : shape[0] * shape[1]].unflatten(1, shape)
    stored = torch.randn(pairs, 2 * shape[0], shape[1])[:, : shape[0]]
    gates = [torch.rand(pairs, 2, size)[:, 0] for size in shape]
    out = shape[0] * (2 if reuses and kind == "points" else 1)
    inputs = [torch.randn(pairs, points, width), own / 4, torch.randn(pairs, out) if bias else None]
    inputs += [stored / 4, *gates] if reuses else [None] * 3
    inputs = [value if value is None else value.to(dtype) for value in inputs]
    # Half precision is compared with the exact result of the same numbers.
    exact = [value if value is None else value.float() for value in inputs]
    expected = getattr(mixing, f"mix_{kind}_op")(*exact)
    gradient = torch.randn_like(expected).to(dtype)
    wanted = getattr(mixing, f"mix_{kind}_backward_op")(gradient.float(), *exact)

    there = [on_device(value) for value in inputs]
    assert mixing_triton.supports(there[0], there[1])
    actual = getattr(mixing_triton, f"mix_{kind}")(*there)
    assert actual.dtype == dtype and relative_error(actual, expected) < limit
    given = getattr(mixing_triton, f"mix_{kind}_backward")(on_device(gradient), *there)
    assert len(given) == len(wanted) == 6
    for ours, theirs in zip(given, wanted):
        assert ours.shape == theirs.shape
        if ours.numel():
            assert relative_error(ours, theirs) < 10 * limit


def test_gradients_in_float16_are_off_by_rounding_alone():
    """Of a case in which the rounded blend of filters moves a value over ReLU's kink."""
    points, own, _, stored, gates = mixing_inputs("channels, reuse, no bias")[1]
    points, own, stored = (tensor.flatten(0, 2).half() for tensor in (points, own, stored))
    inputs = [points, own, None, stored, *(gate.flatten(0, 2).half() for gate in gates)]
    exact = [value if value is None else value.double() for value in inputs]
    expected = mixing.mix_channels_op(*exact)
    moved = undecided(
        mixing_triton.mix_channels(*(on_device(value) for value in inputs)).cpu(), expected
    )
    torch.manual_seed(0)
    gradient = torch.randn_like(expected).half().masked_fill(moved, 0)
    wanted = mixing.mix_channels_backward_op(gradient.double(), *exact)
    given = mixing_triton.mix_channels_backward(
        on_device(gradient), *(on_device(value) for value in inputs)
    )
    for ours, theirs in zip(given, wanted):
        assert not ours.numel() or relative_error(ours, theirs) < 1e-3


def test_shapes_that_the_mixing_kernels_cannot_take_are_named():
    own = torch.randn(2, 16, 16)
    assert mixing_triton.supports(torch.randn(2, 32, 16), own)
    assert not mixing_triton.supports(torch.randn(2, 8, 16), own)  # points
    assert not mixing_triton.supports(torch.randn(2, 48, 16), own)  # no power of two
    assert not mixing_triton.supports(torch.randn(2, 32, 16), own.double())


@pytest.mark.parametrize("adds", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (1, 300, 3, 4), (2, 64, 40, 50), (0, 8, 4, 4)])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
def test_shift_and_relu(dtype, limit, shape, adds, monkeypatch):
    monkeypatch.setattr(shift_relu_triton, "_PROGRAMS", 4)  # each takes several tiles
    torch.manual_seed(0)
    exact = torch.promote_types(dtype, torch.float32)
    layout = dict(memory_format=torch.channels_last)
    maps, residual, grad = (torch.randn(shape).to(dtype).contiguous(**layout) for _ in range(3))
    residual = residual if adds else None
    shift = torch.randn(shape[1], dtype=exact)
    expected = shift_relu._plain(
        maps.to(exact), shift, None if residual is None else residual.to(exact)
    )
    there = [on_device(value) for value in (maps, shift, residual)]
    shift_relu_triton.forward(*there)
    assert relative_error(there[0], expected) < limit
    wanted = shift_relu._plain_backward(grad.to(exact), there[0].cpu())
    given = shift_relu_triton.backward(on_device(grad), there[0])
    assert given[0].dtype == dtype and given[1].dtype == exact
    assert given[0].stride() == there[0].stride()
    for ours, theirs in zip(given, wanted):
        assert relative_error(ours, theirs) < 10 * limit


def test_a_shift_in_half_precision_is_added_in_float32():
    maps = torch.full((1, 16, 2, 2), 1.0).bfloat16().contiguous(memory_format=torch.channels_last)
    residual, shift = torch.full_like(maps, -1.0), torch.full((16,), 0.001).bfloat16()
    shift_relu_triton.forward(on_device(maps), on_device(shift), on_device(residual))
    if DEVICE == "cpu":
        assert maps.unique().tolist() == pytest.approx([0.001], rel=1e-2)


def test_what_is_not_a_number_stays_so_behind_shift_and_relu():
    maps = torch.full((1, 4, 2, 2), float("nan"), device=DEVICE)
    maps = maps.contiguous(memory_format=torch.channels_last)
    shift_relu_triton.forward(maps, torch.zeros(4, device=DEVICE), None)
    assert maps.isnan().all()
    assert shift_relu_triton.backward(torch.ones_like(maps), maps)[1].tolist() == [4.0] * 4


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 24, 5, 7), 3), ((1, 256, 20, 30), 32), ((2, 20, 9, 9), 20), ((3, 64, 1, 1), 4),
     ((0, 8, 4, 4), 2)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
def test_group_norm(dtype, limit, shape, groups, monkeypatch):
    monkeypatch.setattr(map_norm_triton, "_PARTS", 4)  # each sums several tiles
    monkeypatch.setattr(map_norm_triton, "_TILE", 1024)
    torch.manual_seed(0)
    layout = dict(memory_format=torch.channels_last)
    # Far from zero beside their deviation, as sums of squares do not like it.
    maps = (30 + torch.randn(shape)).to(dtype).contiguous(**layout)
    grad = torch.randn(shape).to(dtype).contiguous(**layout)
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    exact = [value.double().requires_grad_() for value in (maps, weight, bias)]
    expected = torch.nn.functional.group_norm(exact[0], groups, *exact[1:], 1e-5)
    wanted = torch.autograd.grad(expected, exact, grad.double())

    there = [on_device(value) for value in (maps, weight, bias)]
    out, statistics = map_norm_triton.forward(*there, groups, 1e-5)
    assert out.dtype == dtype and out.stride() == there[0].stride()
    assert relative_error(out, expected) < limit
    given, sums = map_norm_triton.backward(on_device(grad), *there[:2], statistics)
    assert given.dtype == dtype and given.stride() == there[0].stride()
    for ours, theirs in zip((given, sums[1], sums[0]), wanted):
        assert relative_error(ours, theirs) < 100 * limit
    # What takes their place where they cannot start.
    plain = map_norm._plain_forward(maps, weight, bias, groups, 1e-5)
    assert relative_error(plain[0], expected) < 50 * limit
    assert relative_error(plain[1], statistics) < 1e-4
    other = map_norm._plain_backward(grad, maps, weight, plain[1])
    for ours, theirs in zip((other[0], other[1][1], other[1][0]), wanted):
        assert relative_error(ours, theirs) < 100 * limit


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)])
def test_group_norm_of_no_pixels_has_no_gradient(shape):
    maps = on_device(torch.randn(shape)).contiguous(memory_format=torch.channels_last)
    weight = on_device(torch.randn(8))
    out, statistics = map_norm_triton.forward(maps, weight, weight, 2, 1e-5)
    for _ in range(20):  # what memory holds is not always seen at once
        filled = on_device(torch.full((2, 2, 8), 7.0))
        del filled
        given, sums = map_norm_triton.backward(out, maps, weight, statistics)
        assert given.shape == shape and sums.shape == (2, 8) and not sums.any()
