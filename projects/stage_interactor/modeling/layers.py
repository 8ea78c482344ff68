"""Linear layers by how they start."""

from torch import nn


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """Xavier-uniform weight, PyTorch's default bias: everything the paper does not name."""
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def zero_linear(in_features: int, out_features: int, *, zero_bias: bool = True) -> nn.Linear:
    """A layer that adds nothing, or whose sigmoid is 1/2, until it has learned to."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    if zero_bias:
        nn.init.zeros_(layer.bias)
    return layer
