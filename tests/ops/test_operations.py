"""The fast operations on this machine's devices against the reference in float64."""

import pytest
import torch
from checks import operations as operation_checks
from checks.operations import STRIDES, relative_error, sampling_inputs
from torchvision.ops import sigmoid_focal_loss

from stage_interactor.ops import Pyramid, dense, focal_loss, linear, sample_pyramid, use_ops
from stage_interactor.ops.dense import linear_op
from stage_interactor.ops.map_norm import group_norm
from stage_interactor.ops.mixing import mix_channels_op, mix_points_op
from stage_interactor.ops.sampling import sample_op
from stage_interactor.ops.static_mixing import mix_statically_op

DEVICES = ["cpu", "cuda"]
CHECKS = [(f"{device}: {name}", device, check)
          for device in DEVICES for name, check in operation_checks.checks(device)]  # fmt: skip


@pytest.fixture(autouse=True)
def small_sizes_too(monkeypatch):
    monkeypatch.setattr("stage_interactor.ops.backend._SMALLEST_WIDTH", 1)
    monkeypatch.setattr("stage_interactor.ops.dense._SMALLEST_PRODUCT", 1)


@pytest.mark.parametrize(
    ("device", "check"),
    [pytest.param(device, check, id=name) for name, device, check in CHECKS],
)
def test_the_fast_operation_gives_what_the_reference_gives(device, check):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check()


# Their samples have the precision of the coordinates, whatever that of the features.
NARROW = [(name, check) for name, device, check in CHECKS
          if device == "cpu" and not ("sampling" in name and "bfloat16" in name)]  # fmt: skip


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in NARROW])
def test_so_it_does_for_groups_of_few_channels(monkeypatch, check):
    monkeypatch.setattr("stage_interactor.ops.backend._SMALLEST_WIDTH", 2**20)
    check()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 128])
def test_the_norm_of_maps_in_each_layout(width, dtype, layout):
    maps = torch.randn(2, width, 3, 5, dtype=dtype).to(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(width, requires_grad=True) for _ in range(2))
    normed = group_norm(maps, 4, weight, bias, 1e-5)
    exact = [tensor.detach().double().requires_grad_() for tensor in (maps, weight, bias)]
    wanted = torch.nn.functional.group_norm(exact[0], 4, *exact[1:], 1e-5)
    assert normed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradient = torch.randn(maps.shape, dtype=normed.dtype)
    given = torch.autograd.grad(normed, (maps, weight, bias), gradient)
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(
        (normed, *given), (wanted, *torch.autograd.grad(wanted, exact, gradient.double()))
    ):
        assert relative_error(ours, theirs) < limit


@pytest.mark.parametrize("images", [1, 2])
def test_the_norm_of_one_pixel_is_its_bias_however_many_images_there_are(images):
    """Of one channel a group: the coarsest map of a picture of 32 pixels."""
    maps = torch.randn(images, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 8, dtype=torch.float64)
    normed = group_norm(maps, 8, weight, bias, 1e-5)
    torch.testing.assert_close(normed[:, :, 0, 0], bias.expand(images, -1))
    normed.sum().backward()
    assert maps.grad.abs().max() < 1e-9


def test_a_wrong_operation_is_seen():
    """The comparison itself: an error of a thousandth fails."""
    operation, inputs = operation_checks.mixing_inputs("channels")
    from stage_interactor.ops import current_ops

    def wrong(*tensors):
        return operation(*tensors) * (1.001 if current_ops() == "fast" else 1.0)

    with pytest.raises(AssertionError, match="result: relative error"):
        operation_checks.compare(wrong, inputs, torch.float32, "cpu")


def test_gradients_of_sampling_by_finite_differences():
    torch.manual_seed(0)
    value = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)  # 2 x 3 pixels, 2 groups
    xy = (torch.rand(1, 2, 2, 2, 2).double() * 8 + 0.3).requires_grad_()
    weights = torch.rand(1, 2, 2, 2, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *tensors: sample_op(*tensors, [2, 3], [4.0]), (value, xy, weights)
    )


@pytest.mark.parametrize("reuses", [False, True])
@pytest.mark.parametrize("op", [mix_channels_op, mix_points_op], ids=["channels", "points"])
def test_gradients_of_mixing_by_finite_differences(op, reuses):
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(2, *shape).double().requires_grad_()  # noqa: E731
    rows = 3 if op is mix_channels_op else 2
    columns = 3 if op is mix_channels_op else 4
    inputs = [make(4, 3), make(rows, columns), make(rows * (2 if reuses and rows == 2 else 1))]
    inputs += [make(rows, columns), make(rows), make(columns)] if reuses else [None] * 3
    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (sample_op, lambda: (torch.randn(1, 10, 4, requires_grad=True), torch.rand(1, 2, 2, 3, 2),
                             torch.rand(1, 2, 2, 3, 2), [2, 4, 1, 2], [4.0, 8.0])),
        (mix_channels_op, lambda: (torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 3, 3),
                                   None, None, None, None)),
        (mix_points_op, lambda: (torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 2, 4),
                                 torch.randn(2, 4), torch.randn(2, 2, 4), torch.rand(2, 2),
                                 torch.rand(2, 4))),
        (mix_statically_op, lambda: (torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3),
                                     2, torch.randn(6, 6), torch.randn(6), torch.randn(6, 6),
                                     torch.randn(6))),
        (linear_op, lambda: (torch.randn(5, 4, requires_grad=True), torch.randn(3, 4), None)),
    ],
    ids=["sample", "mix_channels", "mix_points", "mix_statically", "linear"],
)  # fmt: skip
def test_operators_are_what_torch_compile_expects_of_them(op, inputs):
    tensors = [
        value.requires_grad_() if isinstance(value, torch.Tensor) else value for value in inputs()
    ]
    torch.library.opcheck(op, tensors)


def test_the_gradient_of_the_features_is_collected_over_all_stages():
    maps, xy, weights = sampling_inputs("random")
    for level in maps:
        level.requires_grad_()

    def gradients(ops: str, stages: int) -> list[torch.Tensor]:
        with use_ops(ops):
            pyramid = Pyramid(maps)
            total = sum(
                (sample_pyramid(pyramid, xy + 3.0 * stage, weights, STRIDES) ** 2).sum()
                for stage in range(stages)
            )
            # Twice through one graph: nothing of the first pass may be left for the second.
            torch.autograd.grad(total, maps, retain_graph=True)
            return torch.autograd.grad(total, maps)

    for stages in (1, 3):
        for ours, theirs in zip(gradients("fast", stages), gradients("reference", stages)):
            assert relative_error(ours, theirs) < 1e-12


def test_what_an_unfinished_backward_pass_has_left_is_not_added_to_the_next():
    maps, xy, weights = sampling_inputs("random")
    for tensor in (*maps, xy):
        tensor.requires_grad_()
    pyramid = Pyramid(maps)
    total = (sample_pyramid(pyramid, xy, weights, STRIDES) ** 2).sum()
    torch.autograd.grad(total, [xy], retain_graph=True)  # never reaches the features
    given = torch.autograd.grad(total, maps)
    with use_ops("reference"):
        total = (sample_pyramid(maps, xy, weights, STRIDES) ** 2).sum()
        wanted = torch.autograd.grad(total, maps)
    for ours, theirs in zip(given, wanted):
        assert relative_error(ours, theirs) < 1e-12


def test_coordinates_that_are_not_finite_reach_the_result_and_nothing_else():
    maps, xy, weights = sampling_inputs("random")
    clean = sample_pyramid(maps, xy, weights, STRIDES)
    xy[1, 2, 0, 3, 0] = float("nan")
    sampled = sample_pyramid(maps, xy, weights, STRIDES)
    assert sampled[1, 2, 0, 3].isnan().all()
    sampled[1, 2, 0, 3] = clean[1, 2, 0, 3]
    torch.testing.assert_close(sampled, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3, 200), (600, 40), (2, 3, 4, 64)])
def test_linear_layers_and_their_gradients(shape, dtype, monkeypatch):
    monkeypatch.setattr(dense, "_SMALLEST_PRODUCT", 0)
    torch.manual_seed(0)
    half = dtype == torch.bfloat16
    features = torch.randn(*shape, requires_grad=True)
    for size in (16, 500):  # the gradient of the weight goes two ways
        weight = torch.randn(size, shape[-1], dtype=dtype, requires_grad=True)
        for bias in (None, torch.randn(size, dtype=dtype, requires_grad=True)):
            leaves = [features, weight] + ([] if bias is None else [bias])
            gradient = torch.randn(*shape[:-1], size, dtype=dtype)
            with torch.autocast("cpu", dtype, enabled=half):
                ours = linear(features, weight, bias)
                theirs = torch.nn.functional.linear(features, weight, bias)
            assert ours.dtype == dtype
            assert relative_error(ours, theirs) < (1e-2 if half else 1e-6)
            for given, wanted in zip(
                torch.autograd.grad(ours, leaves, gradient),
                torch.autograd.grad(theirs, leaves, gradient),
            ):
                assert given.dtype == wanted.dtype
                assert relative_error(given, wanted) < (1e-2 if half else 1e-5)


@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_focal_loss_and_its_gradient(gamma):
    torch.manual_seed(0)
    logits = torch.randn(3, 50, 7).double() * 5
    logits[0, 0, :4] = torch.tensor([-60.0, 60.0, -700.0, 700.0])
    logits.requires_grad_()
    labels = torch.rand(3, 50, 7) < 0.1
    scale = torch.tensor([1.0, -2.0, 0.5]).double()
    ours = focal_loss(logits, labels, 0.25, gamma)
    theirs = sigmoid_focal_loss(logits, labels.double(), 0.25, gamma).sum((1, 2))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (given,) = torch.autograd.grad(ours, logits, scale)
    (wanted,) = torch.autograd.grad(theirs, logits, scale)
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-12)


def test_a_name_that_no_operations_have_is_refused():
    with pytest.raises(ValueError, match="must be one of .* got 'quick'"), use_ops("quick"):
        pass
