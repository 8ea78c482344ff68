"""Linear layers: on a CPU by oneDNN, whose products of a few hundred rows are faster.

PyTorch hands float32 products to MKL, which on many processors reaches half of oneDNN's speed on
the wide layers here, 100 to 300 queries and 256 to 49,152 features. In bfloat16, where both take
oneDNN, adding the bias in the product saves a pass.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import runs_reference

# Smaller products take so little time that the difference does not show.
_SMALLEST_PRODUCT = 2**24


def linear(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``features @ weight.T + bias``, as :func:`torch.nn.functional.linear`.

    Args:
        features: (..., in).
        weight: (out, in).
        bias: (out,), or None.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else features.dtype
    if (
        not torch.compiler.is_compiling()
        and dtype == weight.dtype  # autocast remembers what it casts, and casts once
        and features.device.type == "cpu"
        and features.numel() * len(weight) >= _SMALLEST_PRODUCT
        and onednn_computes_in(dtype)
        and not runs_reference(features.device)
    ):
        rows = features.flatten(0, -2).to(dtype)
        return linear_op(rows, weight, bias).unflatten(0, features.shape[:-1])
    return F.linear(features, weight, bias)


@functools.cache
def onednn_computes_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and this CPU has products in ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def onednn_linear(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without gradient, for matrices, which may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(features, weight, bias, "none", [], "")


def matrix_product(dtype: torch.dtype) -> Callable[..., Tensor]:
    """What computes :func:`linear` of matrices without gradient fastest on a CPU."""
    return onednn_linear if dtype == torch.float32 and onednn_computes_in(dtype) else F.linear


@torch.library.custom_op("stage_interactor::linear", mutates_args=(), device_types="cpu")
def linear_op(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """features (rows, in), weight (out, in), bias (out,) to (rows, out)."""
    return onednn_linear(features, weight, bias)


@linear_op.register_fake
def _(features, weight, bias):
    return features.new_empty(features.shape[0], weight.shape[0])


def _save(ctx, inputs, output):
    features, weight, bias = inputs
    ctx.save_for_backward(features, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    features, weight = ctx.saved_tensors
    needs_features, needs_weight, needs_bias = ctx.needs_input_grad
    grad_features = onednn_linear(grad, weight.t()) if needs_features else None
    grad_weight = None
    if needs_weight:
        grad_weight = matrix_product(grad.dtype)(grad.t(), features.t())
    grad_bias = grad.sum(0) if needs_bias and ctx.has_bias else None
    return grad_features, grad_weight, grad_bias


linear_op.register_autograd(_backward, setup_context=_save)
