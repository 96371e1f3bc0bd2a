"""MobileNetV2 (Sandler et al. 2018) with the strides of small images, at any width.

    conv3x3 → BN → ReLU6, seventeen inverted residuals, conv1x1 → BN → ReLU6,
    then global average pooling and a linear layer.

The first convolution and the second stage do not stride: 32x32 images shrink to 4x4 rather than to
1x1. At width 32 and 10 classes: 2,236,682 parameters (as torchvision's for 10 classes: strides have
none) and, at 32x32, 88.0 M multiply-accumulates. Other widths scale all channels alike, also the
last 1280, and round to whole channels rather than to multiples of eight.
"""

from torch import Tensor, nn

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""By stage: expansion, channels at width 32, blocks, stride of the first block."""


class ConvBlock(nn.Sequential):
    """conv without bias → BN → ReLU6; (N, i, H, W) → (N, o, H/stride, W/stride)."""

    def __init__(self, i: int, o: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.relu = nn.ReLU6()


class InvertedResidual(nn.Module):
    """conv1x1 to expand, depthwise conv3x3, conv1x1 to project (no ReLU); plus x if shapes match.

    (N, i, H, W) → (N, o, H/stride, W/stride), with i * expansion channels in between.
    """

    def __init__(self, i: int, o: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = i * expansion
        self.expand = ConvBlock(i, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvBlock(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Conv2d(hidden, o, 1, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.project(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """(N, 3, H, W) images → (N, classes) logits.

    Args:
        classes: number of classes.
        width: channels of the first layer; all others scale with it.
    """

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.first = ConvBlock(3, width, 3)
        blocks = []
        i = width
        for expansion, channels, count, first_stride in STAGES:
            o = _scaled(channels, width)
            for index in range(count):
                blocks.append(InvertedResidual(i, o, 1 if index else first_stride, expansion))
                i = o
        self.blocks = nn.Sequential(*blocks)
        last = _scaled(1280, width)
        self.last = ConvBlock(i, last, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.first(x)))
        logits: Tensor = self.linear(self.flatten(self.pool(x)))
        return logits


def _scaled(channels: int, width: int) -> int:
    return max(1, round(channels * width / 32))
