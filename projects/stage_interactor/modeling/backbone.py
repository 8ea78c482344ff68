"""Backbones from timm."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STRIDES = (4, 8, 16, 32)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """A timm feature extractor, with the reason in plain words when there is none."""
    if not timm.is_model(name.split(".")[0]):
        similar = timm.list_models(f"*{name[:6]}*")[:5]
        raise ValueError(f"timm has no model {name!r} (backbone.name); similar: {similar}")
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained, **kwargs)
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"The pretrained weights of {name!r} could not be loaded ({type(error).__name__}: "
            f"{error}). Without a network, put them into the Hugging Face cache (HF_HOME) "
            "beforehand, or start from a checkpoint with train.init_checkpoint=... "
            "model.backbone.pretrained=False, or train from scratch with "
            "model.backbone.pretrained=False alone."
        ) from error


def _level_indices(network: nn.Module, name: str) -> list[int]:
    """Which of the network's outputs have the strides 4, 8, 16 and 32."""
    strides = list(network.feature_info.reduction())
    if not set(STRIDES) <= set(strides):
        raise ValueError(
            f"{name!r} gives feature maps of strides {strides}; the detector needs {STRIDES}"
        )
    return [strides.index(stride) for stride in STRIDES]


def timm_channels(name: str) -> list[int]:
    """Channels of a timm network's maps at strides 4 to 32: the neck's ``in_channels``."""
    with torch.device("meta"):
        network = _create(name, pretrained=False)
    return [network.feature_info.channels()[index] for index in _level_indices(network, name)]


class TimmBackbone(nn.Module):
    """A timm network as feature extractor, frozen as the recipe of DETR-like detectors says.

    Args:
        name: any timm model with maps at strides 4, 8, 16 and 32.
        pretrained: ImageNet weights from the Hugging Face hub or its cache.
        freeze_norm: BatchNorms keep their running statistics also in training; their weights
            still learn.
        frozen_stages: 0 trains everything; 1 freezes the stem and the stage of stride 4, 2 also the
            next one, and so on.
        kwargs: for ``timm.create_model``, such as ``drop_path_rate``.
    """

    def __init__(
        self,
        *,
        name: str = "resnet50",
        pretrained: bool = True,
        freeze_norm: bool = True,
        frozen_stages: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        self.network = _create(name, pretrained, **kwargs)
        self.levels = _level_indices(self.network, name)
        self.channels = [self.network.feature_info.channels()[index] for index in self.levels]
        self.strides = STRIDES
        self.freeze_norm = freeze_norm
        if not 0 <= frozen_stages <= len(STRIDES):
            raise ValueError(f"frozen_stages must be 0 to {len(STRIDES)}, got {frozen_stages}")
        self.frozen = self._modules_up_to(frozen_stages)
        for module in self.frozen:
            module.requires_grad_(False)

    def _modules_up_to(self, num_stages: int) -> list[nn.Module]:
        """The network's first modules, up to the one that makes level ``num_stages``."""
        if num_stages == 0:
            return []
        last = self.network.feature_info.module_name()[self.levels[num_stages - 1]]
        modules = []
        for name, module in self.network.named_children():
            modules.append(module)
            if name == last.replace(".", "_"):
                return modules
        raise ValueError(
            f"frozen_stages={num_stages} is not known for this backbone: its stages are "
            f"{[name for name, _ in self.network.named_children()]}, looked for {last!r}; set "
            "model.backbone.frozen_stages=0"
        )

    def train(self, mode: bool = True) -> "TimmBackbone":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to maps (B, C_l, H / stride, W / stride) by name, finest first."""
        maps = self.network(images)
        return {f"stride{stride}": maps[index] for stride, index in zip(self.strides, self.levels)}
