"""The operations that take the time. Nothing here knows of the rest of the project."""

from .mixing import blend_filters, norm_relu
from .sampling import sample_pyramid

__all__ = ["blend_filters", "norm_relu", "sample_pyramid"]
