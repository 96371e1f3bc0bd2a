"""The DAWNbench ResNet-9 (David Page's CIFAR-10 network), at any width.

    conv3x3 → BN [→ MaxPool2] → ReLU, as prep, layer1 + residual, layer2, layer3 + residual,
    then global max-pooling, a linear layer without bias, and a factor of 0.125 on the logits.

At width 64 and 32x32 images: 6,573,120 parameters, 379.3 M multiply-accumulates. The last pooling
is global rather than 4x4, which is the same thing at 32x32 and lets images be of any size ≥ 8.
"""

from collections.abc import Mapping

from torch import Tensor, nn


class ConvBlock(nn.Sequential):
    """conv3x3 without bias → BN [→ MaxPool2] → ReLU; (N, i, H, W) → (N, o, H or H/2, ...).

    Pooling after the ReLU would give the same numbers, but the ReLU would see four times as many.
    """

    def __init__(self, i: int, o: int, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(o)
        if pool:
            self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()


class Residual(nn.Module):
    """x + block(block(x)), with no ReLU after the sum; `hidden` channels between the blocks."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.block1 = ConvBlock(channels, hidden)
        self.block2 = ConvBlock(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.block2(self.block1(x))
        return y


class ResNet9(nn.Module):
    """(N, 3, H, W) images → (N, classes) logits.

    Args:
        classes: number of classes.
        width: channels of the first layer; the others have 2, 4 and 8 times as many.
        widths: instead of `width`, the output channels of each convolution by name ("prep.conv",
            "layer1.conv", "res1.block1.conv", ...), such as `widths_end` in a run's summary. The
            second convolution of a residual has the width of its trunk: an entry for it is ignored.
    """

    def __init__(
        self, classes: int = 10, width: int = 64, widths: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        w = {
            "prep.conv": width,
            "layer1.conv": 2 * width,
            "res1.block1.conv": 2 * width,
            "layer2.conv": 4 * width,
            "layer3.conv": 8 * width,
            "res3.block1.conv": 8 * width,
        }
        unknown = set(widths or {}) - w.keys() - {"res1.block2.conv", "res3.block2.conv", "linear"}
        if unknown:
            raise ValueError(f"widths: the network has no convolution {min(unknown)!r}")
        w |= dict(widths or {})
        self.prep = ConvBlock(3, w["prep.conv"])
        self.layer1 = ConvBlock(w["prep.conv"], w["layer1.conv"], pool=True)
        self.res1 = Residual(w["layer1.conv"], w["res1.block1.conv"])
        self.layer2 = ConvBlock(w["layer1.conv"], w["layer2.conv"], pool=True)
        self.layer3 = ConvBlock(w["layer2.conv"], w["layer3.conv"], pool=True)
        self.res3 = Residual(w["layer3.conv"], w["res3.block1.conv"])
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(w["layer3.conv"], classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res1(self.layer1(self.prep(x)))
        x = self.res3(self.layer3(self.layer2(x)))
        logits: Tensor = 0.125 * self.linear(self.flatten(self.pool(x)))
        return logits
