"""The ResNets for CIFAR-10 of He et al. (2015, section 4.2), of any depth 6n + 2, at any width.

    conv3x3 → BN → ReLU, three stages of n residual blocks (the second and third at half the
    resolution and twice the channels of the one before), global average pooling, a linear layer.

At width 16, 10 classes and 32x32 images: ResNet-20 has 272,474 parameters and 40.8 M
multiply-accumulates, ResNet-56 855,770 and 125.7 M. Where a block changes the shape, its shortcut
is a 1x1 convolution with BN (the paper's option B). The paper pads with zeros on CIFAR-10 (option
A: 269,722 and 853,018 parameters), but padding fixes the positions of channels, so that none of
them could be removed.
"""

from torch import Tensor, nn


class Projection(nn.Sequential):
    """conv1x1 without bias → BN; (N, i, H, W) → (N, o, H/stride, W/stride)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 1, stride, bias=False)
        self.bn = nn.BatchNorm2d(o)


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); (N, i, H, W) → (N, o, H/stride, ...)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.shortcut = nn.Identity() if (i, stride) == (o, 1) else Projection(i, o, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        out: Tensor = self.relu2(y)
        return out


class ResNet(nn.Module):
    """(N, 3, H, W) images → (N, classes) logits.

    Args:
        classes: number of classes.
        width: channels of the first stage; the others have 2 and 4 times as many.
        depth: 6n + 2 layers that have weights, shortcuts not counted.
    """

    def __init__(self, classes: int = 10, width: int = 16, depth: int = 20) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 8, 14, 20, ... (6n + 2), not {depth}")
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stage1 = _stage(width, width, depth // 6, stride=1)
        self.stage2 = _stage(width, 2 * width, depth // 6, stride=2)
        self.stage3 = _stage(2 * width, 4 * width, depth // 6, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.linear(self.flatten(self.pool(x)))
        return logits


def _stage(i: int, o: int, blocks: int, stride: int) -> nn.Sequential:
    """(N, i, H, W) → (N, o, H/stride, W/stride); the first block is the one that strides."""
    return nn.Sequential(Block(i, o, stride), *(Block(o, o, 1) for _ in range(blocks - 1)))
