"""Where a query looks: 3D sampling points (supplement, section B and Code 2; Table 3)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import Pyramid, sample_pyramid
from .geometry import box_size, full_precision
from .layers import ExactLinear


def group_points(num_points: int) -> tuple[int, int]:
    """Splits P points into K groups of Q: K = 2^floor(log2 sqrt(P)), Q = P / K (sections A, J).

    Raises:
        ValueError: if P is not a power of two.
    """
    if num_points < 1 or num_points & (num_points - 1):
        raise ValueError(f"the number of sampling points must be a power of two, got {num_points}")
    num_groups = 2 ** ((num_points.bit_length() - 1) // 2)
    return num_groups, num_points // num_groups


class PointSampler(nn.Module):
    """Base of the samplers: from points to features. Subclasses say how points are generated.

    A point has a position (x, y) and a scale z in the pyramid. Level l is weighted by
    ``softmax_l(-(z - log2(stride_l) - level_shift)^2 / 2)``.

    Args:
        embed_dim: D, the width of content and of every feature level.
        num_groups: G; group g reads channels g * D/G to (g + 1) * D/G.
        num_points: P points of each group.
        strides: of the feature levels.
        level_shift: z of the points that level l is for, above log2 of its stride. 1 in
            StageInteractor (8-pixel structures on stride 4), 0 in AdaMixer.
    """

    level_z: Tensor

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_groups: int = 4,
        num_points: int = 32,
        strides: Sequence[int] = (4, 8, 16, 32),
        level_shift: float = 1.0,
    ):
        super().__init__()
        if embed_dim % num_groups:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_groups {num_groups}")
        self.num_groups = num_groups
        self.point_groups, self.points_per_group = group_points(num_points)
        self.strides = tuple(strides)
        level_z = [math.log2(stride) + level_shift for stride in strides]
        self.register_buffer("level_z", torch.tensor(level_z), persistent=False)

    def points(self, content: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        """Points of content (B, N, D) at xyzr (B, N, 4): xy (B, N, G, K, Q, 2) in pixels from the
        image's upper left corner, z (B, N, G, K, Q)."""
        raise NotImplementedError

    def level_weights(self, z: Tensor) -> Tensor:
        """Weights (..., levels) that sum to 1 for points of scale z (...)."""
        # Levels first: processors are fast at long rows, and slow at rows of four numbers.
        distance = z - self.level_z.view(-1, *[1] * z.dim())
        return (-0.5 * distance.square()).softmax(0).movedim(0, -1)

    def forward(self, features: Pyramid, content: Tensor, xyzr: Tensor) -> Tensor:
        """
        Args:
            features: of levels (B, D, H_l, W_l).
            content: (B, N, D).
            xyzr: (B, N, 4).

        Returns:
            sampled features X, (B, N, G, P, D/G); point (k, j) is number k * Q + j.

        Raises:
            ValueError: for other levels than the sampler was built for.
        """
        if len(features) != len(self.strides):
            raise ValueError(
                f"the sampler was built for levels of strides {self.strides} but got "
                f"{len(features)} levels: set model.decoder.strides to the backbone's"
            )
        with torch.autocast(content.device.type, enabled=False):  # coordinates: full precision
            xy, z = self.points(full_precision(content), xyzr)
            weights = self.level_weights(z)
        return sample_pyramid(features, xy.flatten(3, 4), weights.flatten(3, 4), self.strides)


class TwoStageSampler(PointSampler):
    """Code 2: K outer offsets p1, and around each of them Q inner offsets p2.

    Point (k, j) lies at ``xy + (w, h) * (p1_k.xy + 2^(p1_k.z) * p2_j.xy)`` with the scale
    ``z + p1_k.z + p2_j.z``.

    Args:
        inner_offsets: ``"per_group"``, each channel group has its own p2 (Code 2), or
            ``"shared"``, one p2 for all groups, its first point started at 0 (the release).
    """

    def __init__(self, *, embed_dim: int = 256, inner_offsets: str = "per_group", **kwargs):
        super().__init__(embed_dim=embed_dim, **kwargs)
        inner_groups = {"per_group": self.num_groups, "shared": 1}.get(inner_offsets)
        if inner_groups is None:
            raise ValueError(
                f"inner_offsets must be 'per_group' or 'shared', got {inner_offsets!r}"
            )
        self.outer = ExactLinear(embed_dim, self.num_groups * self.point_groups * 3)
        self.inner = ExactLinear(embed_dim, inner_groups * self.points_per_group * 3)

        # Section J: zero weights, so that at the start every query looks at the same fixed points
        # of its box; xy from U(-0.5, 0.5) and U(-0.5 / sqrt 2, 0.5 / sqrt 2), z from 0.
        for layer, spread in ((self.outer, 0.5), (self.inner, 0.5 / math.sqrt(2))):
            nn.init.zeros_(layer.weight)
            nn.init.uniform_(layer.bias, -spread, spread)
            layer.bias.data.view(-1, 3)[:, 2] = 0.0
        if inner_offsets == "shared":
            self.inner.bias.data[:3] = 0.0

    def points(self, content: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        batch, num_queries, _ = content.shape
        outer = self.outer(content).view(batch, num_queries, self.num_groups, -1, 1, 3)
        inner = self.inner(content).view(batch, num_queries, -1, 1, self.points_per_group, 3)
        size, centre = box_size(xyzr), xyzr[..., :2]
        offsets = outer[..., :2] + outer[..., 2:].exp2() * inner[..., :2]  # (B, N, G, K, Q, 2)
        xy = centre[:, :, None, None, None] + size[:, :, None, None, None] * offsets
        z = xyzr[:, :, None, None, None, 2] + outer[..., 2] + inner[..., 2]
        return xy, z


class VanillaSampler(PointSampler):
    """AdaMixer's sampler: every point has its own offset (Table 3, "vanilla" and "group-init.").

    Args:
        init: ``"uniform"``, the xy offsets start from U(-0.5, 0.5); ``"grouped"``, they start where
            the two-stage sampler's points start, K outer plus Q inner offsets.
        initial_dz: the z offset that all points start with: -1 in AdaMixer with its level_shift of
            0, which chooses the same levels as 0 with a level_shift of 1.
    """

    def __init__(
        self, *, embed_dim: int = 256, init: str = "uniform", initial_dz: float = 0.0, **kwargs
    ):
        super().__init__(embed_dim=embed_dim, **kwargs)
        groups, outer, inner = self.num_groups, self.point_groups, self.points_per_group
        self.offsets = ExactLinear(embed_dim, groups * outer * inner * 3)
        nn.init.zeros_(self.offsets.weight)
        bias = self.offsets.bias.data.view(groups, outer, inner, 3)
        if init == "uniform":
            bias[..., :2].uniform_(-0.5, 0.5)
        elif init == "grouped":
            spread = 0.5 / math.sqrt(2)
            bias[..., :2] = torch.empty(groups, outer, 1, 2).uniform_(-0.5, 0.5)
            bias[..., :2] += torch.empty(groups, 1, inner, 2).uniform_(-spread, spread)
        else:
            raise ValueError(f"init must be 'uniform' or 'grouped', got {init!r}")
        bias[..., 2] = initial_dz

    def points(self, content: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        layout = (self.num_groups, self.point_groups, self.points_per_group, 3)
        offsets = self.offsets(content).unflatten(-1, layout)  # (B, N, G, K, Q, 3)
        size, centre = box_size(xyzr), xyzr[..., :2]
        xy = centre[:, :, None, None, None] + size[:, :, None, None, None] * offsets[..., :2]
        return xy, xyzr[:, :, None, None, None, 2] + offsets[..., 2]
