"""VGG-16 with batch norm for small images (Simonyan & Zisserman 2014), at any width.

    conv3x3 → BN → ReLU, thirteen times, with max-pooling between the five stages,
    then global max-pooling and one linear layer instead of the paper's three.

At width 64, 10 classes and 32x32 images: 14,724,042 parameters, 313.2 M multiply-accumulates. (The
14,728,266 that are often quoted have a bias in each convolution, which batch norm makes useless.)
The last pooling is global rather than 2x2, which is the same thing at 32x32, and the others round
up, so that images may be of any size.
"""

from torch import Tensor, nn

STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
"""By stage: how many convolutions, and how many times `width` channels each of them has."""


class ConvBlock(nn.Sequential):
    """conv3x3 without bias → BN → ReLU; (N, i, H, W) → (N, o, H, W)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.relu = nn.ReLU()


class VGG16(nn.Module):
    """(N, 3, H, W) images → (N, classes) logits.

    Args:
        classes: number of classes.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        i = 3
        for blocks, times in STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for _ in range(blocks):
                layers.append(ConvBlock(i, times * width))
                i = times * width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(i, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.flatten(self.pool(self.features(x))))
        return logits
