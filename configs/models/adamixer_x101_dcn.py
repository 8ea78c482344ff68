"""AdaMixer with ResNeXt-101 32x4d with deformable convolutions."""

from ..common.backbones import RESNEXT101_DCN
from .adamixer_r50 import model

model.backbone.update(RESNEXT101_DCN)
