"""Linear layers: on a CPU in float32 by oneDNN, whose products of a few hundred rows are faster.

PyTorch hands float32 products to MKL, which on many processors reaches half of oneDNN's speed on
the wide layers here, 100 to 300 queries and 256 to 49,152 features.
"""

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
    if (
        not torch.compiler.is_compiling()
        and features.dtype == weight.dtype == torch.float32
        and features.device.type == "cpu"
        and features.numel() * len(weight) >= _SMALLEST_PRODUCT
        and torch.backends.mkldnn.is_available()
        and not runs_reference(features.device)
        and not torch.is_autocast_enabled("cpu")
    ):
        return linear_op(features.flatten(0, -2), weight, bias).unflatten(0, features.shape[:-1])
    return F.linear(features, weight, bias)


def onednn_linear(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without gradient, for float32 matrices, which may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(features, weight, bias, "none", [], "")


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
        # oneDNN is the slower one where the result has many more rows than columns.
        wide = weight.shape[0] <= weight.shape[1]
        grad_weight = onednn_linear(grad.t(), features.t()) if wide else grad.t() @ features
    grad_bias = grad.sum(0) if needs_bias and ctx.has_bias else None
    return grad_features, grad_weight, grad_bias


linear_op.register_autograd(_backward, setup_context=_save)
