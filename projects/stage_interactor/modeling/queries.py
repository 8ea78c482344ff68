"""The initial queries: what the cascade starts from, before it has seen the image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import boxes_to_xyzr


class InitialQueries(nn.Module):
    """N learned content vectors, each placed on the whole image.

    Only the content is learned, and layer-normalised (without affine) before use; every position
    starts as the whole image and is not a parameter.

    Args:
        num_queries: N (100 or 300 in the paper).
        embed_dim: D.
    """

    def __init__(self, *, num_queries: int = 100, embed_dim: int = 256):
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {num_queries}")
        self.num_queries = num_queries
        self.content = nn.Parameter(torch.randn(num_queries, embed_dim))

    def forward(self, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_sizes: (B, 2), height and width in pixels of each resized, unpadded image.

        Returns:
            content (B, N, D) and positions xyzr (B, N, 4) in pixels.
        """
        batch = image_sizes.shape[0]  # not len(): it stays a symbol when exported
        height, width = image_sizes.to(self.content.dtype).unbind(-1)
        origin = torch.zeros_like(width)
        whole_image = torch.stack((origin, origin, width, height), dim=-1)  # (B, 4) xyxy
        xyzr = boxes_to_xyzr(whole_image)[:, None].expand(batch, self.num_queries, 4)
        content = F.layer_norm(self.content, self.content.shape[-1:])
        return content.expand(batch, -1, -1), xyzr
