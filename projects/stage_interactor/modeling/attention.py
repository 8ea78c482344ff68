"""Self-attention between queries, aware of how their boxes overlap."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import intersection_over_foreground, xyzr_to_boxes
from .layers import xavier_linear


class OverlapAttention(nn.Module):
    """Multi-head self-attention with the additive bias ``tau_h * log(IoF + 1e-7)`` (AdaMixer).

    A head with a large tau attends to queries whose boxes contain its own; tau = 0 ignores boxes.

    Args:
        embed_dim: D, divisible by ``num_heads``.
        num_heads: attention heads; each learns its own tau, started from U(0, 4).
    """

    def __init__(self, *, embed_dim: int = 256, num_heads: int = 8):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = xavier_linear(embed_dim, 3 * embed_dim)
        self.proj = xavier_linear(embed_dim, embed_dim)
        self.tau = nn.Parameter(torch.empty(num_heads).uniform_(0.0, 4.0))
        self.norm = nn.LayerNorm(embed_dim)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, queries: Tensor, xyzr: Tensor) -> Tensor:
        """Content with position embedding added (B, N, D) and positions (B, N, 4) to (B, N, D)."""
        batch, num_queries, embed_dim = queries.shape
        qkv = self.qkv(queries).view(batch, num_queries, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        heads = F.scaled_dot_product_attention(query, key, value, self.bias(xyzr).to(query.dtype))
        attended = heads.transpose(1, 2).reshape(batch, num_queries, embed_dim)
        return self.norm(queries + self.proj(attended))

    def bias(self, xyzr: Tensor) -> Tensor:
        """What positions (B, N, 4) add to the attention, (B, heads, N, N), in full precision."""
        iof = intersection_over_foreground(xyzr_to_boxes(xyzr))  # (B, N, N)
        return (iof + 1e-7).log()[:, None] * self.tau[:, None, None]
