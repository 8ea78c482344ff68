"""StageInteractor with ResNet-101."""

from ..common.backbones import RESNET101
from .stage_interactor_r50 import model

model.backbone.update(RESNET101)
