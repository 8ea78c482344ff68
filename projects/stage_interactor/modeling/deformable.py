"""Deformable convolutions in residual networks (Dai et al., 2017), for the paper's ResNeXt-101."""

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d


class DeformableConv2d(DeformConv2d):
    """A convolution that shifts its taps by offsets that a second convolution predicts.

    Starts as the plain convolution: the offsets are zero-initialised. All channels share one set of
    offsets (one deformable group), ordered (tap, (y, x)) as in torchvision and in mmcv.

    Args:
        conv: the convolution to replace; its weights are taken over.
    """

    def __init__(self, conv: nn.Conv2d):
        shape: dict = dict(
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            groups=conv.groups,
            bias=conv.bias is not None,
            **shape,
        )
        self.load_state_dict(conv.state_dict())
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.conv_offset = nn.Conv2d(conv.in_channels, 2 * taps, **shape)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        # Offsets are positions in pixels: too fine for half precision.
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.weight.dtype)
            return super().forward(features, self.conv_offset(features))


def make_deformable(stage: nn.Module) -> None:
    """Replaces the middle convolution of every bottleneck in a stage, in place.

    Those that stride as well: the paper's network never falls back to a plain convolution.

    Raises:
        ValueError: if the stage has no bottleneck with a middle convolution ``conv2``.
    """
    bottlenecks = [
        (module, conv)
        for module in stage.modules()
        if hasattr(module, "conv3") and isinstance(conv := module.conv2, nn.Conv2d)
    ]
    if not bottlenecks:
        raise ValueError(
            "deformable convolutions take the place of the 3x3 convolutions (conv2) of bottleneck "
            "blocks as in ResNet-50 or ResNeXt; this backbone has none (model.backbone."
            "deformable_strides)"
        )
    for block, conv in bottlenecks:
        block.conv2 = DeformableConv2d(conv)
