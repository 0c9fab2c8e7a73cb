"""The image encoder: a residual network with group norm."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.ops import group_norm


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with what follows it, as one op: ``activation(norm(input) + residual)``."""

    def __init__(self, num_groups: int, num_channels: int, *, activation: str = "none") -> None:
        """``activation``: ``none`` or ``relu``."""
        super().__init__(num_groups, num_channels)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W] in the memory format of ``input``; ``residual`` as ``input``."""
        return group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            activation=self.activation,
            residual=residual,
        )


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution with a stride, which visits every ``stride``-th pixel and nothing else."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H / stride, W / stride]."""
        if self.in_channels % 16 == 0:
            return super().forward(input)
        # oneDNN's strided backward writes out of bounds for other numbers of channels_last channels (2.14).
        step = self.stride[0]
        return F.conv2d(input[:, :, ::step, ::step], self.weight)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2015, Figure 2)."""

    def __init__(self, channels: int, out: int, stride: int, groups: int) -> None:
        """``stride`` is that of the first convolution."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = GroupNorm(groups, out, activation="relu")
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = GroupNorm(groups, out, activation="relu")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            conv = Pointwise(channels, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, GroupNorm(groups, out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, out, H / stride, W / stride]."""
        y: Tensor = self.conv2(self.norm1(self.conv1(x)))
        out: Tensor = self.norm2(y, residual=self.shortcut(x))
        return out


class ImageEncoder(nn.Module):
    """Images [B, channels, H, W] -> (sequence [B, H' W', dim], lengths [B]), dim = width * 2^(stages - 1).

    Give it channels_last batches: the memory format is kept from end to end. Weights stay contiguous, as
    FSDP2 wants its parameters; giving them the other layout at each call costs about 1 % of a step.
    """

    def __init__(self, channels: int, width: int, depths: Sequence[int], *, groups: int, stem: str) -> None:
        """See ``mmfast.models.ImageResNet``."""
        super().__init__()
        large = stem == "large"
        self.stem = nn.Conv2d(
            channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False
        )
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        self.norm = GroupNorm(groups, width, activation="relu")
        blocks: list[nn.Module] = []
        self.dim = width
        for stage, depth in enumerate(depths):
            out = width * 2**stage
            for i in range(depth):
                blocks.append(ResidualBlock(self.dim, out, 2 if stage and i == 0 else 1, groups))
                self.dim = out
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """``lengths``: 1, or 0 where there is no image; such a row's pixels are not looked at."""
        x = torch.where(lengths[:, None, None, None] > 0, x, 0.0)
        # Norm and ReLU keep the order of a channel's pixels, so pooling first changes the norm's statistics
        # alone, and leaves both a quarter of the pixels to work on.
        x = self.norm(self.pool(self.stem(x)))
        x = self.blocks(x)
        x = x.flatten(2).transpose(1, 2).clone()  # [B, H' W', dim]; FSDP2 warns of outputs that are views
        return x, lengths * x.shape[1]
