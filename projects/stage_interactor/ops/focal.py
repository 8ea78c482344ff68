"""Sigmoid focal loss with its gradient in one go."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import sigmoid_focal_loss

from .backend import runs_reference

# So many values at a time pass through all steps: they stay in the cache.
_CHUNK = 2**17


def focal_loss(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, weights: Tensor | None = None
) -> Tensor:
    """Sigmoid focal loss, summed over all but the first axis.

    Args:
        logits: (L, ...).
        labels: boolean, in the shape of ``logits``; few of them are true.
        alpha: weight of the true ones; that of the others is 1 - alpha.
        gamma: exponent of the focusing term.
        weights: (C,), of the values along the last axis; 1 by default.

    Returns:
        (L,), differentiable by ``logits``.
    """
    if runs_reference(logits.device):
        loss = sigmoid_focal_loss(logits, labels.to(logits), alpha, gamma)
        return (loss if weights is None else loss * weights.to(loss)).flatten(1).sum(1)
    return _FocalLoss.apply(logits, labels, alpha, gamma, weights)


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: Tensor, labels: Tensor, alpha: float, gamma: float, weights: Tensor | None
    ) -> Tensor:
        # The loss of a true label is that of a false one at the opposite logit.
        slopes = torch.empty_like(logits, memory_format=torch.contiguous_format)
        loss = logits.new_zeros(len(logits))
        rows = logits.flatten(1), labels.flatten(1), slopes.flatten(1)
        width = rows[0].shape[1]
        step = max(_CHUNK // len(logits), 1) if logits.device.type == "cpu" else max(width, 1)
        parts = [row.split(step, 1) for row in rows]
        if weights is not None:
            of_values = weights.to(logits).expand(logits.shape[1:]).reshape(1, -1)
            parts.append(of_values.split(step, 1))
        for value, label, slope, *of_class in zip(*parts):
            true = label.to(value.dtype)
            sign = 1 - 2 * true
            value = value * sign
            weight = (1 - alpha) + (2 * alpha - 1) * true
            p = value.sigmoid()
            log_loss = F.softplus(value, threshold=40.0)  # -log(1 - p); exact in float64 too
            focus = p.pow(gamma).mul_(weight)
            for factor in of_class:
                focus.mul_(factor)
            loss += torch.linalg.vecdot(focus, log_loss)
            derivative = torch.addcmul(p, 1 - p, log_loss, value=gamma).mul_(focus)
            torch.mul(derivative, sign, out=slope)
        ctx.save_for_backward(slopes)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (slopes,) = ctx.saved_tensors
        return slopes * grad.view(-1, *[1] * (slopes.dim() - 1)), None, None, None, None
