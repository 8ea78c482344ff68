"""The pictures of the quick start: drawn by a program, with boxes that are right to the pixel."""

from .dataset import generate_shapes, load_shapes
from .scene import CLASS_NAMES, draw_scene

__all__ = ["CLASS_NAMES", "draw_scene", "generate_shapes", "load_shapes"]
