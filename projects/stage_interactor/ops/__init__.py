"""The operations that take the time, each a fast form and a reference behind one function.

Nothing here knows of the rest of the project.
"""

from .backend import current_ops, use_ops
from .dense import linear
from .focal import focal_loss
from .map_norm import group_norm
from .mixing import mix_channels, mix_points, project_mixed_points
from .reference import norm_relu
from .sampling import Pyramid, sample_pyramid
from .static_mixing import mix_statically

__all__ = [
    "Pyramid",
    "current_ops",
    "focal_loss",
    "group_norm",
    "linear",
    "mix_channels",
    "mix_points",
    "mix_statically",
    "norm_relu",
    "project_mixed_points",
    "sample_pyramid",
    "use_ops",
]
