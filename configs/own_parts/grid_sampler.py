"""A sampler of one's own. In a module, since saved configs name a class by where it is imported."""

import torch
from torch import Tensor

from stage_interactor.modeling import PointSampler
from stage_interactor.modeling.geometry import box_size


class GridSampler(PointSampler):
    """The same regular grid of K x Q points over every query's box, at the query's own scale.

    Args:
        extent: width and height of the grid, in those of the box.
        sizes: of the stage, for :class:`PointSampler`.
    """

    def __init__(self, *, extent: float = 1.0, **sizes):
        super().__init__(**sizes)
        y = (torch.arange(self.point_groups) + 0.5) / self.point_groups - 0.5
        x = (torch.arange(self.points_per_group) + 0.5) / self.points_per_group - 0.5
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (K, Q, 2)
        self.register_buffer("offsets", extent * grid, persistent=False)

    def points(self, content: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        position = xyzr[:, :, None, None, None].expand(-1, -1, self.num_groups, 1, 1, -1)
        xy = position[..., :2] + box_size(position) * self.offsets  # (B, N, G, K, Q, 2)
        return xy, position[..., 2].expand(xy.shape[:-1])
