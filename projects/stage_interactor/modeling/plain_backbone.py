"""A plain vision transformer as backbone, with ViTDet's simple feature pyramid."""

from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .backbone import (
    LAYOUTS,
    STRIDES,
    as_tuples,
    choose_layout,
    create_network,
    find_levels,
    require_any_size,
)
from .pretrained import BackboneError

PATCH = 16  # pixels: the one stride of the network's maps
# For whoever named a network that does not serve.
_WORKING = "vit_*_patch16_* (DINOv3, MAE, CLIP, SigLIP, AugReg), deit_*, deit3_*"
# Those of timm that take images of one size unless they are told otherwise.
_FIXED_BY_DEFAULT = ("vit", "test_vit", "deit", "eva02_", "flexivit")


class _NormedMap(FeatureGetterNet):
    """The map behind the network's own last norm: what is meant to be read of DINOv3 and CLIP."""

    def __init__(self, model: nn.Module, **kwargs: Any):
        super().__init__(model, norm=True, **kwargs)


class _RotaryOfAnySize(RotaryEmbeddingDinoV3):
    """DINOv3's rotary positions, computed where the network is, in an exported graph for any size.

    timm's are the same to the bit, but made on the CPU, of sizes that a graph takes for constants.
    """

    def get_embed(self, shape: list[int] | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Sines and cosines (H * W, 2 * D) of a map of ``shape`` (H, W)."""
        if shape is None or args or any(value is not None for value in kwargs.values()):
            return super().get_embed(shape, *args, **kwargs)
        device = self.get_buffer("periods").device
        centres = [(torch.arange(size, device=device) + 0.5) / size for size in shape]  # 0 to 1
        grid = 2 * torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1) - 1
        return torch.cat(self._get_pos_embed_from_coords(grid.flatten(0, 1)), dim=-1)

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether a module is timm's as DINOv3 has it, without random shifts and scales."""
        return (
            type(module) is RotaryEmbeddingDinoV3
            and not module.aug_active
            and module.normalize_coords == "separate"
            and module.grid_offset == 0
            and module.grid_indexing == "ij"
        )


def _level(width: int, stride: int, out_channels: int) -> nn.Sequential:
    """One level of the pyramid: the map (B, width, H, W) at another stride."""
    half, quarter = width // 2, width // 4
    layers: dict[int, tuple[int, list[nn.Module]]] = {
        4: (
            quarter,
            [
                nn.ConvTranspose2d(width, half, 2, stride=2),
                LayerNorm2d(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ],
        ),
        8: (half, [nn.ConvTranspose2d(width, half, 2, stride=2)]),
        16: (width, []),
        32: (width, [nn.MaxPool2d(2)]),
    }
    channels, resampling = layers[stride]
    return nn.Sequential(
        *resampling,
        nn.Conv2d(channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


class PlainBackbone(nn.Module):
    """A timm vision transformer with maps of stride 16, and a pyramid made of its last one.

    The pyramid is ViTDet's (Li et al., 2022, section 3 and appendix A.2): deconvolutions for the
    strides 8 and 4, the map itself for 16, pooling for 32; then a 1x1 and a 3x3 convolution, each
    with a layer norm. Unlike there the map is that behind the network's own last norm, and
    attention is global in all blocks, both as in pretraining. ``train.freeze=[backbone.network]``
    leaves the network as it is and trains the pyramid.

    Args:
        name: a timm vision transformer with patches of 16 pixels, for images of any size.
        pretrained, weights: as those of :class:`TimmBackbone`.
        out_channels: of every level: the neck's ``in_channels``.
        channels_last: memory layout of the convolutions, as :class:`TimmBackbone`'s.
        kwargs: for ``timm.create_model``, such as ``drop_path_rate``.

    Raises:
        BackboneError: the network is unknown, has another stride, takes images of one size only, or
            its pretrained weights cannot be had.
    """

    def __init__(
        self,
        *,
        name: str = "vit_small_patch16_dinov3",
        pretrained: bool = True,
        weights: str | None = None,
        out_channels: int = 256,
        channels_last: bool | str = "auto",
        **kwargs: Any,
    ):
        super().__init__()
        self.strides = STRIDES
        self.channels = [out_channels] * len(STRIDES)
        if name.startswith(_FIXED_BY_DEFAULT):
            kwargs = {"dynamic_img_size": True} | kwargs
        last = {"out_indices": (-1,), "feature_cls": _NormedMap}
        if given := sorted(last.keys() & kwargs.keys()):
            raise BackboneError(
                f"PlainBackbone takes the last map of {name!r}: leave out model.backbone.{given[0]}"
            )
        kwargs = as_tuples(kwargs) | last
        _, (width,), meta = find_levels(name, (PATCH,), _WORKING, **kwargs)
        require_any_size(name, meta, [width], (PATCH,), _WORKING)
        if width % 4:
            raise BackboneError(
                f"{name!r} has {width} channels (model.backbone.embed_dim); the pyramid needs a "
                "multiple of 4"
            )
        self.network = create_network(name, pretrained, weights, **kwargs)
        for module in self.network.modules():
            if _RotaryOfAnySize.replaces(module):
                module.__class__ = _RotaryOfAnySize  # timm lets nobody hand in positions
        self.pyramid = nn.ModuleList(_level(width, stride, out_channels) for stride in STRIDES)
        self.layout = None if channels_last == "auto" else LAYOUTS[bool(channels_last)]
        if self.layout:
            self.to(memory_format=self.layout)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), H and W multiples of 32, to maps (B, out_channels, H / stride, W /
        stride) by name, finest first."""
        layout = choose_layout(images, self.layout)
        last = self.network(images.contiguous(memory_format=layout))[-1]
        last = last.contiguous(memory_format=layout)
        return {f"stride{stride}": level(last) for stride, level in zip(STRIDES, self.pyramid)}
