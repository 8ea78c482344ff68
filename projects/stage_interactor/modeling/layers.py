"""Linear layers by how they start, and one that is exact."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`stage_interactor.ops.linear`, faster on a CPU."""

    def forward(self, features: Tensor) -> Tensor:
        return linear(features, self.weight, self.bias)


class ExactLinear(nn.Linear):
    """For coordinates: float32 products stay so where others are TF32, with 10 bits of fraction.

    TF32 would move a point by up to a pixel in 1000. What is chosen for all products
    (``train.float32_precision``) cannot be changed for one of them; double precision is not
    concerned, and these products are small.
    """

    def forward(self, features: Tensor) -> Tensor:
        if features.device.type != "cuda" or features.dtype != torch.float32:
            return super().forward(features)
        if not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() == "highest":
            return super().forward(features)
        bias = None if self.bias is None else self.bias.double()
        return F.linear(features.double(), self.weight.double(), bias).float()


def xavier_linear(in_features: int, out_features: int) -> Linear:
    """Xavier-uniform weight, PyTorch's default bias: where the paper leaves the start open."""
    layer = Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def zero_linear(in_features: int, out_features: int, *, zero_bias: bool = True) -> Linear:
    """A layer whose output does not depend on its input until it has learned to.

    With ``zero_bias`` it adds nothing, or its sigmoid is 1/2; otherwise it gives PyTorch's default
    bias, the same for every query.
    """
    layer = Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    if zero_bias:
        nn.init.zeros_(layer.bias)
    return layer
