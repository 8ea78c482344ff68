"""What a query does with its samples: dynamic mixing that reuses the filters of earlier stages.

Shapes: P = K * Q sampling points in K groups of Q, Dc = D / G channels of one of G groups. All
filters and all mixing are per (query, group); the paper's indices for both are left out.

In the formulas M and S are a stage's own channel and spatial filter, b_M and b_S their biases, X
the samples, A the mixed points, U those after static mixing, Y the result. LN2 is a layer norm
without affine over points and channels together: ``mix_channels`` is ReLU(LN2(X M + b_M)), with M
blended with a stored filter if one is given; ``project_mixed_points`` is the linear layer that ends
a mixing, of Y = ReLU(LN2(S A + b_S)), with the blend of a stored filter stacked under S if given.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..ops import mix_channels, mix_statically, norm_relu, project_mixed_points
from .layers import xavier_linear, zero_linear
from .sampling import group_points

STATIC_MIXING = ("none", "channel", "spatial", "channel_spatial")


class Filters(NamedTuple):
    """The dynamic filters that a stage generated itself, before any blending."""

    channel: Tensor  # M, (B, N, G, Dc, Dc)
    spatial: Tensor  # S, (B, N, G, R, P); R = P_out, or P_out / 2 on a stage that reuses


class StaticMixing(nn.Module):
    """Lightweight learned layers between two dynamic mixings (section A, Code 1; Table 2).

    Args:
        kind: ``"channel_spatial"`` is Code 1: one linear layer over the Q * Dc values inside each
            point group and one over the K * Dc values across the groups. ``"spatial"`` has the same
            two layers over the points alone, equal for all channels; ``"channel"`` one layer over
            the Dc channels, equal for all points; ``"none"`` adds nothing.
        num_points: P.
        group_dim: Dc.
    """

    def __init__(self, kind: str, *, num_points: int, group_dim: int):
        super().__init__()
        if kind not in STATIC_MIXING:
            raise ValueError(f"static_mixing must be one of {STATIC_MIXING}, got {kind!r}")
        self.kind = kind
        self.grid = group_points(num_points)  # K, Q
        across, within = self.grid
        if kind == "channel":
            self.channel = zero_linear(group_dim, group_dim)
        elif kind != "none":
            width = group_dim if kind == "channel_spatial" else 1
            self.within = zero_linear(within * width, within * width)
            self.across = zero_linear(across * width, across * width)

    def forward(self, points: Tensor, residual: Tensor) -> Tensor:
        """U = residual + I1 + I2 (Code 1), from points and residual of (..., P, Dc); same shape."""
        if self.kind == "none":
            return residual
        if self.kind == "channel":
            return residual + self.channel(points)
        if self.kind == "spatial":
            grid = points.unflatten(-2, self.grid)  # (..., K, Q, Dc)
            within = self.within(grid.transpose(-1, -2)).transpose(-1, -2)
            across = self.across(grid.transpose(-1, -3)).transpose(-1, -3)
            return residual + (within + across).flatten(-3, -2)
        within, across = ((layer.weight, layer.bias) for layer in (self.within, self.across))
        return mix_statically(points, residual, self.grid, within, across)


class ChannelReuse(nn.Module):
    """One more channel mixing, with a filter that an earlier stage generated.

    ``A <- ReLU(LN2(U M~ + b))`` where U is A after static mixing and M~ blends this stage's filter
    M_i towards the stored M_j by two gate vectors: ``M~ = M_i + (u v^T) * (M_j - M_i)``.

    Args:
        embed_dim, num_groups, num_points: D, G, P.
        static_mixing: kind of :class:`StaticMixing`.
        dynamic: False leaves the dynamic filter out, ``A <- ReLU(LN2(U))`` (Table 1, "static").
    """

    def __init__(
        self, *, embed_dim: int, num_groups: int, num_points: int, static_mixing: str, dynamic: bool
    ):
        super().__init__()
        group_dim = embed_dim // num_groups
        self.num_groups = num_groups
        self.static = StaticMixing(static_mixing, num_points=num_points, group_dim=group_dim)
        self.dynamic = dynamic
        if dynamic:
            # All gates start at 1/2.
            self.gates = zero_linear(embed_dim, num_groups * 2 * group_dim)
            self.bias = zero_linear(embed_dim, num_groups * group_dim, zero_bias=False)

    def forward(
        self, points: Tensor, residual: Tensor, content: Tensor, own: Tensor, stored: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            points, residual: A and what static mixing is added to, (B, N, G, P, Dc).
            content: (B, N, D).
            own, stored: M_i and M_j, (B, N, G, Dc, Dc).

        Returns:
            A and U, both (B, N, G, P, Dc).
        """
        mixed = self.static(points, residual)
        if not self.dynamic:
            return norm_relu(mixed), mixed
        gates = self.gates(content).sigmoid().unflatten(-1, (self.num_groups, 2, -1))
        bias = self.bias(content).unflatten(-1, (self.num_groups, -1))
        # u and v are the rows' and the columns' gates, (B, N, G, Dc) each.
        return mix_channels(mixed, own, bias, stored, gates.unbind(-2)), mixed


class SpatialReuse(nn.Module):
    """Gates by which the previous stage's spatial filter is blended with this stage's (Fig. 1).

    The blend is stacked under this stage's own filter.

    Args:
        embed_dim, num_groups, num_points: D, G, P.
        num_rows: R, rows of this stage's own filter; as many are taken of the previous one.
    """

    def __init__(self, *, embed_dim: int, num_groups: int, num_points: int, num_rows: int):
        super().__init__()
        self.num_groups = num_groups
        self.num_rows = num_rows
        self.row_gates = zero_linear(embed_dim, num_groups * num_rows)
        self.point_gates = zero_linear(embed_dim, num_groups * num_points)

    def forward(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """From content (B, N, D) the gates of rows (B, N, G, R) and of points (B, N, G, P)."""
        rows = self.row_gates(content).sigmoid().unflatten(-1, (self.num_groups, -1))
        points = self.point_gates(content).sigmoid().unflatten(-1, (self.num_groups, -1))
        return rows, points


class CascadeMixing(nn.Module):
    """Channel mixing, one more for each reused filter, then spatial mixing (section A, Fig. 1).

    Args:
        embed_dim: D.
        num_groups: G.
        num_points: P.
        out_points: P_out, rows of the whole spatial filter.
        num_reused: reuse steps, one for each of the latest stored filters; 0 for none. A stage that
            reuses generates P_out / 2 spatial rows itself and takes the rest from its predecessor.
        static_mixing: kind of :class:`StaticMixing` before each reused filter.
        dynamic_reuse: False keeps the static layers of each step but reuses no filter, and all
            P_out spatial rows are the stage's own (Table 1, "static" alone).
        residual: what static mixing is added to: ``"current"``, the features that enter it
            (Code 1), or ``"carried"``, a residual that starts as the samples and collects every
            static mixing (the release).
        bias: whether dynamic mixing has generated biases b_M and b_S (AdaMixer has none). The
            reuse steps' biases stay.
        zero_output: whether the layer that ends the mixing starts with zero weights; in AdaMixer it
            starts from Xavier.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_groups: int = 4,
        num_points: int = 32,
        out_points: int = 128,
        num_reused: int = 0,
        static_mixing: str = "channel_spatial",
        dynamic_reuse: bool = True,
        residual: str = "current",
        bias: bool = True,
        zero_output: bool = True,
    ):
        super().__init__()
        if residual not in ("current", "carried"):
            raise ValueError(f"residual must be 'current' or 'carried', got {residual!r}")
        if num_reused and static_mixing == "none" and not dynamic_reuse:
            raise ValueError(
                "static_mixing='none' with dynamic_reuse=False leaves nothing in a reuse step: set "
                "first_reusing_stage=None for a cascade without both (Table 1, first row)"
            )
        if num_reused and static_mixing == "none" and residual == "carried":
            raise ValueError(
                "a carried residual (variant='release') is made by static mixing: with "
                "static_mixing='none' use variant='supplement'"
            )
        reuses = num_reused > 0 and dynamic_reuse
        if reuses and out_points % 2:
            raise ValueError(f"out_points must be even to reuse spatial filters, got {out_points}")
        group_dim = embed_dim // num_groups
        num_rows = out_points // 2 if reuses else out_points
        self.num_groups = num_groups
        self.residual = residual
        self.channel_shape = (group_dim, group_dim)
        self.spatial_shape = (num_rows, num_points)

        sizes = dict(embed_dim=embed_dim, num_groups=num_groups, num_points=num_points)
        weights = group_dim * group_dim + num_rows * num_points
        biases = group_dim + out_points
        # Section J: zero weights, so that every query starts with the same filters and biases.
        self.generator = zero_linear(embed_dim, num_groups * weights, zero_bias=False)
        self.bias_generator = (
            zero_linear(embed_dim, num_groups * biases, zero_bias=False) if bias else None
        )
        self.channel_reuse = nn.ModuleList(
            ChannelReuse(**sizes, static_mixing=static_mixing, dynamic=dynamic_reuse)
            for _ in range(num_reused)
        )
        self.spatial_reuse = SpatialReuse(**sizes, num_rows=num_rows) if reuses else None
        mixed_dim = num_groups * out_points * group_dim
        self.out = (
            zero_linear(mixed_dim, embed_dim, zero_bias=False)
            if zero_output
            else xavier_linear(mixed_dim, embed_dim)
        )
        self.norm = nn.LayerNorm(embed_dim)

    def generate(self, content: Tensor) -> Filters:
        """This stage's own filters from content (B, N, D)."""
        weights = self.generator(content).unflatten(-1, (self.num_groups, -1))
        shapes = self.channel_shape, self.spatial_shape
        parts = weights.split([rows * columns for rows, columns in shapes], -1)
        return Filters(*(part.unflatten(-1, shape) for part, shape in zip(parts, shapes)))

    def forward(
        self, sampled: Tensor, content: Tensor, stored: Sequence[Filters] = ()
    ) -> tuple[Tensor, Filters]:
        """
        Args:
            sampled: X, (B, N, G, P, Dc).
            content: (B, N, D).
            stored: filters of earlier stages, oldest first; the last ``num_reused`` are reused.

        Returns:
            new content (B, N, D) and this stage's own filters.
        """
        reused = stored[len(stored) - len(self.channel_reuse) :]
        own = self.generate(content)
        channel_bias = spatial_bias = None
        if self.bias_generator is not None:
            biases = self.bias_generator(content).unflatten(-1, (self.num_groups, -1))
            channel_bias = biases[..., : self.channel_shape[1]]  # b_M, (B, N, G, Dc)
            spatial_bias = biases[..., self.channel_shape[1] :]  # b_S, (B, N, G, P_out)

        points = mix_channels(sampled, own.channel, channel_bias)  # A
        carried = sampled
        for step, filters in zip(self.channel_reuse, reused, strict=True):
            residual = carried if self.residual == "carried" else points
            points, carried = step(points, residual, content, own.channel, filters.channel)

        previous = gates = None
        if self.spatial_reuse is not None:
            previous = stored[-1].spatial[..., : self.spatial_shape[0], :]  # (B, N, G, R, P)
            gates = self.spatial_reuse(content)
        mixed = project_mixed_points(self.out, points, own.spatial, spatial_bias, previous, gates)
        return self.norm(content + mixed), own
