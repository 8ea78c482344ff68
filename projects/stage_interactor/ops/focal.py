"""Sigmoid focal loss with its gradient in one go."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import sigmoid_focal_loss

from .backend import runs_reference

# So many values at a time pass through all steps: they stay in the cache.
_CHUNK = 2**16


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss, summed over all but the first axis.

    Args:
        logits: (L, ...).
        labels: 0 or 1, in the shape and precision of ``logits``.
        alpha: weight of the ones; that of the zeros is 1 - alpha.
        gamma: exponent of the focusing term.

    Returns:
        (L,), differentiable by ``logits``.
    """
    if runs_reference(logits.device):
        return sigmoid_focal_loss(logits, labels, alpha, gamma).flatten(1).sum(1)
    return _FocalLoss.apply(logits, labels, alpha, gamma)


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        grads = torch.empty_like(logits, memory_format=torch.contiguous_format)
        loss = logits.new_zeros(len(logits))
        rows = logits.flatten(1), labels.flatten(1), grads.flatten(1)
        width = rows[0].shape[1]
        step = max(_CHUNK // len(logits), 1) if logits.device.type == "cpu" else max(width, 1)
        for start in range(0, width, step):
            value, label, grad = (row[:, start : start + step] for row in rows)
            sign = (2 * label).sub_(1)
            log_p = F.logsigmoid(value * sign)  # of the label's own probability p
            p = log_p.exp()
            focus = (1 - p).pow_(gamma)
            # alpha for ones and 1 - alpha for zeros, without looking at each
            weight = torch.addcmul(focus * 0.5, focus, sign, value=alpha - 0.5)
            loss -= torch.linalg.vecdot(weight, log_p)
            # d/dx of -(1 - p)^gamma log p, x being the logit of p
            slope = torch.addcmul(p, p, log_p, value=gamma).sub_(1)
            torch.mul(slope.mul_(sign), weight, out=grad)
        ctx.save_for_backward(grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (grads,) = ctx.saved_tensors
        return grads * grad.view(-1, *[1] * (grads.dim() - 1)), None, None, None
