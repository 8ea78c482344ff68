"""AdaMixer with Swin-S."""

from ..common.backbones import SWIN_S
from .adamixer_r50 import model

model.backbone.update(SWIN_S)
