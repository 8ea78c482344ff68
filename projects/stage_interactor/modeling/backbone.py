"""Backbones from timm."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STRIDES = (4, 8, 16, 32)


def _create(name: str, strides: Sequence[int], pretrained: bool, **kwargs: Any) -> nn.Module:
    """A timm feature extractor with maps of these strides, or the reason in plain words."""
    if not timm.is_model(name.split(".")[0]):
        similar = timm.list_models(f"*{name[:6]}*")[:5]
        raise ValueError(f"timm has no model {name!r} (backbone.name); similar: {similar}")
    with torch.device("meta"):
        whole = timm.create_model(name, features_only=True, pretrained=False, **kwargs)
    available = list(whole.feature_info.reduction())
    if not set(strides) <= set(available):
        raise ValueError(
            f"{name!r} gives feature maps of strides {available}; the detector needs {strides}"
        )
    kwargs["out_indices"] = [whole.feature_info.out_indices[available.index(s)] for s in strides]
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


def timm_channels(name: str, strides: Sequence[int] = STRIDES, **kwargs: Any) -> list[int]:
    """Channels of a timm network's maps at the strides: the neck's ``in_channels``."""
    with torch.device("meta"):
        return _create(name, tuple(strides), pretrained=False, **kwargs).feature_info.channels()


class TimmBackbone(nn.Module):
    """A timm network as feature extractor, frozen as the recipe of DETR-like detectors says.

    Args:
        name: any timm model with maps at the strides.
        pretrained: ImageNet weights from the Hugging Face hub or its cache.
        strides: of the maps, finest first; layers after the last one are left out.
        freeze_norm: BatchNorms keep their running statistics also in training; their weights
            still learn.
        frozen_stages: 0 trains everything; 1 freezes the stem and the stage of the finest map, 2
            also the next one, and so on.
        kwargs: for ``timm.create_model``, such as ``drop_path_rate``.
    """

    def __init__(
        self,
        *,
        name: str = "resnet50",
        pretrained: bool = True,
        strides: Sequence[int] = STRIDES,
        freeze_norm: bool = True,
        frozen_stages: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.network = _create(name, self.strides, pretrained, **kwargs)
        self.channels = self.network.feature_info.channels()
        self.freeze_norm = freeze_norm
        if not 0 <= frozen_stages <= len(self.strides):
            raise ValueError(
                f"frozen_stages must be 0 to {len(self.strides)}, got {frozen_stages}"
            )
        self.frozen = self._modules_up_to(frozen_stages)
        for module in self.frozen:
            module.requires_grad_(False)

    def _modules_up_to(self, num_stages: int) -> list[nn.Module]:
        """The network's first modules, up to the one that makes level ``num_stages``."""
        if num_stages == 0:
            return []
        last = self.network.feature_info.module_name()[num_stages - 1]
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
        return {f"stride{stride}": level for stride, level in zip(self.strides, maps)}
