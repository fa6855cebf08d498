"""The small residual network that generates prompts in the PGN paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._register import transformed
from .sizes import require_sizes


class ResNet10(nn.Module):
    """Images (B, in_chans, H, W) to numbers (B, out_features).

    3x3 convolution of stride 2, batch norm, ReLU, 3x3 max-pool of stride 2; groups of residual
    blocks, from the second on each at half the size and twice the channels; global average; linear.

    Args:
        out_features: P * K for a generator of P prompts over K library tokens.
        channels: channels of the first group.
        groups: number of groups; the last has ``channels * 2 ** (groups - 1)`` channels.
        blocks_per_group: residual blocks in each group.
        max_pool: the max-pool after the first convolution; False leaves it out.
        in_chans: channels of the images.

    Source: Loedeman et al., arXiv:2210.06466, official code, ``pgn_models/resnet.py``.
    """

    def __init__(
        self,
        out_features: int,
        *,
        channels: int = 16,
        groups: int = 4,
        blocks_per_group: int = 1,
        max_pool: bool = True,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        require_sizes(
            channels=channels, groups=groups, blocks_per_group=blocks_per_group, in_chans=in_chans
        )
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1) if max_pool else nn.Identity(),
        )
        self.blocks = nn.Sequential()
        width = channels
        for group in range(groups):
            for block in range(blocks_per_group):
                halves = group > 0 and block == 0
                self.blocks.append(_ResidualBlock(width, 2 * width if halves else width))
                width = 2 * width if halves else width
        self.head = nn.Linear(width, out_features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, out_features)."""
        if images.device.type == "cpu" and not transformed():  # torch.func.vmap knows no layouts
            # channels_last is 1.8 times as fast; not in training, where torch's batch norm sums its
            # statistics so roughly in this layout that activations are off by 2e-4 and gradients
            # by 1e-2
            images = images.contiguous(
                memory_format=torch.contiguous_format if self.training else torch.channels_last
            )
        x = self.blocks(self.stem(images))
        return self.head(x.mean(dim=(2, 3)))


class _ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, then ReLU. Where the channels double the size halves,
    and the shortcut is a 1x1 convolution with bias and without batch norm, as in the official
    code (He et al. use the opposite of both)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = stride = 1 if in_channels == out_channels else 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        # The stride is taken here: torch 2.15's weight gradient of a strided 1x1 convolution in
        # channels_last writes past its memory on two threads and more.
        x = self.shortcut(x[:, :, :: self.stride, :: self.stride])
        return F.relu(self.norm2(self.conv2(y)) + x)
