"""A small vision transformer (Dosovitskiy et al. 2020) for small images, at any width.

    patches → tokens, plus a learnt position, six blocks of x + attention(norm(x)) and
    x + mlp(norm(x)), a last norm, the mean over tokens, a linear layer.

At width 192, 10 classes and 32x32 images (64 patches of 4x4): 2,693,194 parameters, 170.5 M
multiply-accumulates in its layers and 9.4 M in attention. That is DeiT-Ti (Touvron et al. 2020:
width 192, 3 heads, 12 blocks) with half its blocks. Tokens are averaged; there is no class token.
With train.py's SGD it learns at a peak learning rate of 0.1, not at 0.4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 6
HEAD_WIDTH = 64  # channels of a head, where that divides the width
MLP_RATIO = 4


class PatchEmbedding(nn.Module):
    """(N, 3, size, size) images → (N, patches, width) tokens."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        # Eight patches a side, or more where the image does not divide into eight.
        patch = _largest_divisor(size, at_most=size // 8)
        self.conv = nn.Conv2d(3, width, patch, patch)
        # With a standard deviation of 0.02, as usual, instead of 1, training takes long to make use
        # of where a patch lies.
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.conv(x).flatten(2).transpose(1, 2) + self.position
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention; (N, tokens, width) → the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        y = F.scaled_dot_product_attention(self._split(q), self._split(k), self._split(v))
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """(N, tokens, width) → (N, heads, tokens, width / heads)."""
        heads: Tensor = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return heads


class MLP(nn.Sequential):
    """linear → GELU → linear, with `hidden` channels between; (N, tokens, width) → the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)


class Block(nn.Module):
    """Attention, then an MLP, each on normed tokens and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, MLP_RATIO * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """(N, 3, image_size, image_size) images → (N, classes) logits.

    Args:
        classes: number of classes.
        width: channels of a token.
        image_size: pixels; at least 8. Positions are learnt, so other sizes are refused.
    """

    def __init__(self, classes: int = 10, width: int = 192, image_size: int = 32) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, not {image_size}")
        heads = _largest_divisor(width, at_most=max(1, width // HEAD_WIDTH))
        self.embedding = PatchEmbedding(width, image_size)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.blocks(self.embedding(x)))
        logits: Tensor = self.linear(tokens.mean(1))
        return logits


def _largest_divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if number % d == 0)
