"""AdaMixer with ResNet-101."""

from ..common.backbones import RESNET101
from .adamixer_r50 import model

model.backbone.update(RESNET101)
