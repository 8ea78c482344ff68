"""From the backbone's channels to the decoder's."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..ops import group_norm


class MapNorm(nn.GroupNorm):
    """A group norm in full precision, as on CUDA, where autocast sees to it.

    In bfloat16 a CPU's backward pass takes five times as long.
    """

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class ChannelMapper(nn.Module):
    """One 1x1 convolution a level, then one group norm that all levels share, as in AdaMixer.

    Neither paper mentions the norm; the releases of both have it, and their checkpoints need it.

    Args:
        in_channels: of every level, finest first.
        out_channels: D.
        norm_groups: groups of the group norm; None leaves it out.
        in_features: names of the levels in the backbone's output; None takes all, in its order.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        out_channels: int = 256,
        norm_groups: int | None = 32,
        in_features: Sequence[str] | None = None,
    ):
        super().__init__()
        if norm_groups is not None and out_channels % norm_groups:
            raise ValueError(
                f"the neck's {out_channels} channels (model.decoder.embed_dim) cannot be split "
                f"into model.neck.norm_groups={norm_groups} groups; choose a divisor, or null for "
                "no norm"
            )
        self.in_features = None if in_features is None else tuple(in_features)
        self.convs = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in in_channels)
        for conv in self.convs:
            nn.init.xavier_uniform_(conv.get_parameter("weight"))
            nn.init.zeros_(conv.get_parameter("bias"))
        self.norm = nn.Identity() if norm_groups is None else MapNorm(norm_groups, out_channels)

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Per level (B, in_channels_l, H_l, W_l) to (B, D, H_l, W_l)."""
        names = self.in_features or tuple(features)
        if len(names) != len(self.convs):
            raise ValueError(
                f"the neck has {len(self.convs)} levels but the backbone gives {list(names)}"
            )
        missing = [name for name in names if name not in features]
        if missing:
            raise ValueError(
                f"the neck looks for {missing} (model.neck.in_features), the backbone gives "
                f"{list(features)}"
            )
        widths = [features[name].shape[1] for name in names]
        ours = [conv.get_parameter("weight").shape[1] for conv in self.convs]
        if widths != ours:
            raise ValueError(
                f"the neck is built for levels of {ours} channels, the backbone gives {widths}: "
                f"set model.neck.in_channels={widths}"
            )
        return [self.norm(conv(features[name])) for name, conv in zip(names, self.convs)]
