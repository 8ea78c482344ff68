"""Every fast operation against the reference in float64: inputs, tolerances, comparisons.

Plain functions, so that tests/ops and tools/check_cuda.py run the same ones.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stage_interactor.ops import (
    group_norm,
    mix_channels,
    mix_points,
    mix_statically,
    sample_pyramid,
    use_ops,
)
from stage_interactor.ops.shift_relu import shift_relu

# Largest relative error (norm of the difference over norm of the reference) of results and of
# gradients, by the precision that is computed in.
TOLERANCE = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (5e-6, 5e-5),
    torch.float16: (3e-3, 2e-2),
    torch.bfloat16: (2e-2, 1.5e-1),
}
STRIDES = (4, 8, 16, 32)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 1e-12 else 1.0)


def undecided(actual: Tensor, expected: Tensor) -> Tensor:
    """Values that rounding has moved over ReLU's kink, where its gradient jumps from 0 to 1.

    That the results differ little there is checked already. One such value of 12,288, which a blend
    of filters rounded to float16 moves, makes 2e-2 of relative error in the gradients, all others
    together 3e-4; the reference in float16 has as many.
    """
    moved = (actual > 0) != (expected > 0).to(actual.device)
    assert moved.double().mean() < 1e-2, "results of wrong sign"
    return moved


def leaves_of(tensors: Sequence[Tensor | tuple[Tensor, ...] | None]) -> list[Tensor]:
    flat: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, tuple):
            flat += tensor
        elif tensor is not None:
            flat.append(tensor)
    return flat


def compare(
    operation: Callable[..., Tensor],
    inputs: Sequence,
    dtype: torch.dtype,
    device: str,
    keep: Sequence[int] = (),
    rectified: bool = False,
) -> None:
    """Results and gradients of the fast operation in dtype against the reference in float64.

    Args:
        operation: called with the inputs.
        inputs: tensors, tuples of tensors, or None, in float64; they may have any strides.
        dtype, device: of the fast operation.
        keep: which inputs stay in float32 at least, whatever dtype is.
        rectified: the operation ends with a ReLU.
    """

    def convert(value, target: torch.dtype):
        if value is None:
            return None
        if isinstance(value, tuple):
            return tuple(convert(part, target) for part in value)
        # In the strides of the original: a copy of its storage, seen in the same way.
        moved = torch.empty_strided(value.shape, value.stride(), dtype=target, device=device)
        return moved.copy_(value).requires_grad_()

    # Both sides get the values that dtype can hold: its rounding is not the operation's.
    def rounded(value, index: int):
        if value is None:
            return None
        if isinstance(value, tuple):
            return tuple(rounded(part, index) for part in value)
        target = torch.promote_types(dtype, torch.float32) if index in keep else dtype
        result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return result.copy_(value.to(target).double())

    inputs = [rounded(value, index) for index, value in enumerate(inputs)]
    exact = [convert(value, torch.float64) for value in inputs]
    fast = [
        convert(value, torch.promote_types(dtype, torch.float32) if index in keep else dtype)
        for index, value in enumerate(inputs)
    ]
    with use_ops("reference"):
        expected = operation(*exact)
    with use_ops("fast"):
        actual = operation(*fast)
    assert actual.shape == expected.shape
    assert actual.dtype == dtype, f"{actual.dtype} from inputs of {dtype}"
    result_limit, gradient_limit = TOLERANCE[dtype]
    error = relative_error(actual, expected)
    assert error <= result_limit, f"result: relative error {error:.1e}"
    gradient = torch.randn(expected.shape, dtype=torch.float64).to(dtype).double()
    if rectified:
        gradient[undecided(actual, expected).cpu()] = 0
    wanted = torch.autograd.grad(expected, leaves_of(exact), gradient.to(device))
    given = torch.autograd.grad(actual, leaves_of(fast), gradient.to(device, dtype))
    for index, (ours, theirs) in enumerate(zip(given, wanted)):
        error = relative_error(ours, theirs)
        assert error <= gradient_limit, f"gradient {index}: relative error {error:.1e}"


def sampling_inputs(case: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Maps, xy and level weights, in float64, of one kind."""
    torch.manual_seed(sum(map(ord, case)))
    batch, queries, groups, points, group_dim = 2, 5, 2, 8, 32
    height, width = 96, 160
    if case == "odd sizes":
        queries, groups, points, group_dim, height, width = 3, 3, 5, 33, 77, 131
    if case == "one pixel":
        height, width = 4, 4
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    maps = [torch.randn(batch, groups * group_dim, *shape).double() for shape in shapes]
    span = torch.tensor([width, height], dtype=torch.float64)
    xy = torch.rand(batch, queries, groups, points, 2, dtype=torch.float64) * span
    # Away from where two pixels meet: there the gradient jumps, and rounding chooses the side.
    # The finest level's pixels meet at odd multiples of 2, the others' at some of those too.
    xy = (xy / 4).floor() * 4 + 0.5 + 3.0 * torch.rand_like(xy)
    xy = torch.where((xy % 4 - 2).abs() < 0.05, xy + 0.2, xy)
    weights = torch.rand(batch, queries, groups, points, len(STRIDES)).double().softmax(-1)
    if case == "borders":  # less than a pixel of some level beyond the image, or just inside
        edge = torch.randint(0, 2, xy.shape).double() * span
        xy = edge + torch.randn_like(xy) * 3
        xy = torch.where((xy % 2).abs() < 0.05, xy + 0.3, xy)
    if case == "outside":
        xy = xy + torch.tensor([3.0, -2.0]) * span * torch.randint(0, 2, xy.shape)
        xy[0, 0, 0, 0] = torch.tensor([1e12, -1e12])
    if case == "one level":
        weights = torch.nn.functional.one_hot(weights.argmax(-1), len(STRIDES)).double()
    if case == "not contiguous":
        xy = xy.transpose(1, 3).contiguous().transpose(1, 3)
        weights = weights.flip(-1).movedim(0, -1).contiguous().movedim(-1, 0)
        maps = [level.to(memory_format=torch.channels_last) for level in maps]
    return maps, xy, weights


SAMPLING_CASES = (
    "random", "borders", "outside", "one level", "one pixel", "odd sizes", "not contiguous",
)  # fmt: skip


def check_sampling(case: str, dtype: torch.dtype, device: str) -> None:
    maps, xy, weights = sampling_inputs(case)

    def sample(xy: Tensor, weights: Tensor, *levels: Tensor) -> Tensor:
        return sample_pyramid(levels, xy, weights, STRIDES)

    compare(sample, [xy, weights, *maps], dtype, device, keep=(0, 1))


def mixing_inputs(case: str) -> tuple[Callable[..., Tensor], list]:
    """An operation and its inputs in float64."""
    kind, *options = case.split(", ")
    torch.manual_seed(sum(map(ord, case)))
    leading, points, width, rows = (2, 3, 2), 32, 32, 64
    if "odd sizes" in options:
        leading, points, width, rows = (1, 3, 1), 15, 33, 7
    if "paper" in options:
        points, width, rows = 32, 64, 64
    if "paper's first stage" in options:
        points, width, rows = 64, 64, 128

    def make(*shape: int) -> Tensor:
        return torch.randn(*leading, *shape, dtype=torch.float64)

    def gate(size: int) -> Tensor:
        gates = make(2, size).sigmoid()
        return gates[..., 0, :] if "not contiguous" in options else gates[..., 0, :].clone()

    if kind == "static":
        grid = (4, points // 4)
        sides = grid[1] * width, grid[0] * width
        within, across = (
            (torch.randn(side, side).double() / side**0.5, torch.randn(side).double())
            for side in sides
        )
        operation = lambda a, r, w, c: mix_statically(a, r, grid, w, c)  # noqa: E731
        return operation, [make(points, width), make(points, width), within, across]
    operation, shape, out = {
        "channels": (mix_channels, (width, width), width),
        "points": (mix_points, (rows, points), rows),
    }[kind]
    own, stored = make(*shape) / shape[1] ** 0.5, make(*shape) / shape[1] ** 0.5
    if "not contiguous" in options:  # as parts of what one layer generates
        size = own[0, 0, 0].numel()
        both = torch.cat((own.flatten(-2), stored.flatten(-2)), -1)
        own, stored = (part.unflatten(-1, shape) for part in both.split(size, -1))
    reuses = "reuse" in options
    if reuses and kind == "points":
        out *= 2
    inputs = [make(points, width), own, None if "no bias" in options else make(out)]
    if reuses:
        inputs += [stored, (gate(shape[0]), gate(shape[1]))]
    return operation, inputs


MIXING_CASES = tuple(
    f"{kind}{options}"
    for kind in ("channels", "points")
    for options in (
        "", ", no bias", ", reuse", ", reuse, no bias", ", reuse, not contiguous",
        ", reuse, odd sizes", ", paper's first stage", ", reuse, paper",
    )
) + ("static",)  # fmt: skip


def check_mixing(case: str, dtype: torch.dtype, device: str) -> None:
    operation, inputs = mixing_inputs(case)
    if device == "cuda" and "paper" in case and dtype != torch.float64:
        from stage_interactor.ops.mixing_triton import supports

        points, own = (tensor.flatten(0, -3).to(dtype) for tensor in inputs[:2])
        assert supports(points, own), "the kernels do not take the paper's sizes"
    compare(operation, inputs, dtype, device, rectified=not case.startswith("static"))


MAP_CASES: dict[str, Callable[..., Tensor]] = {
    "group norm": lambda maps, weight, bias: group_norm(maps, 8, weight, bias, 1e-5).to(maps.dtype),
    "shift and ReLU": lambda maps, shift: shift_relu(maps.clone(), shift),
    "shift, residual and ReLU": lambda maps, shift, other: shift_relu(maps.clone(), shift, other),
}


def check_maps(case: str, dtype: torch.dtype, device: str) -> None:
    """Of maps in channels_last."""
    torch.manual_seed(sum(map(ord, case)))
    maps, other = (
        torch.randn(2, 72, 33, 41).double().to(memory_format=torch.channels_last) for _ in range(2)
    )
    weight, bias = torch.rand(72).double() + 0.5, torch.randn(72).double()
    rest = {"group norm": (weight, bias), "shift and ReLU": (bias,)}.get(case, (bias, other))
    vectors = [index for index, value in enumerate((maps, *rest)) if value.dim() == 1]
    compare(MAP_CASES[case], (maps, *rest), dtype, device, vectors, rectified="ReLU" in case)


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """All checks of operations for a device, named."""
    precisions = [torch.float64, torch.float32, torch.bfloat16]
    if device != "cpu":
        precisions.append(torch.float16)
    for dtype in precisions:
        for case in SAMPLING_CASES:
            name = f"sampling, {case}, {dtype}"
            yield name, lambda case=case, dtype=dtype: check_sampling(case, dtype, device)
        for case in MAP_CASES:
            name = f"{case}, {dtype}"
            yield name, lambda case=case, dtype=dtype: check_maps(case, dtype, device)
        for case in MIXING_CASES:
            name = f"mixing {case}, {dtype}"
            yield name, lambda case=case, dtype=dtype: check_mixing(case, dtype, device)
