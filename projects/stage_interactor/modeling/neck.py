"""From the backbone's channels to the decoder's."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class ChannelMapper(nn.Module):
    """One 1x1 convolution a level, without norm, as in AdaMixer.

    Args:
        in_channels: of every level, finest first.
        out_channels: D.
        in_features: names of the levels in the backbone's output; None takes all, in its order.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        out_channels: int = 256,
        in_features: Sequence[str] | None = None,
    ):
        super().__init__()
        self.in_features = None if in_features is None else tuple(in_features)
        self.convs = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in in_channels)
        for conv in self.convs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Per level (B, in_channels_l, H_l, W_l) to (B, D, H_l, W_l)."""
        names = self.in_features or tuple(features)
        if len(names) != len(self.convs):
            raise ValueError(
                f"the neck has {len(self.convs)} levels but the backbone gives {list(names)}"
            )
        return [conv(features[name]) for name, conv in zip(names, self.convs)]
