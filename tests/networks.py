"""Small networks that the tests quantise, kill rows of and cut, and helpers for that.

To kill a row is to set its bit depth to 0.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from selfcompress import Compressor
from selfcompress.convert import quantize_layers
from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.follow import channel_graph
from selfcompress.graph.liveness import analyse, settle_statistics
from selfcompress.graph.planner import plan_cut
from selfcompress.layers.quantized import quantized_layers
from selfcompress.surgery import Plan, apply_plan


@contextlib.contextmanager
def copied(always: bool) -> Iterator[None]:
    """Within the block, if `always`, layers copy channels instead of computing with zeros.

    Without it small networks compute missing channels as zeros, which costs less than copying.
    """
    with pytest.MonkeyPatch.context() as patch:
        if always:
            patch.setattr("selfcompress.layers.placing._FEW_GAPS", (0, 0.0))
        yield


def block(i: int, o: int, bias: bool = False) -> nn.Sequential:
    """conv3x3 → BN → ReLU."""
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=bias), nn.BatchNorm2d(o), nn.ReLU())


class Head(nn.Module):
    """Global max-pooling and a linear layer, as in ResNet-9."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.linear = nn.Linear(channels, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 0.125 * self.linear(torch.flatten(self.pool(x), 1))
        return y


class Chain(nn.Module):
    """Two conv-BN-ReLU blocks and a head."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 6, bias), block(6, 7, bias), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(self.a(x)))
        return y


class Residual(nn.Module):
    """x + block(block(x)), with a ReLU before the sum or after it."""

    def __init__(self, relu_after: bool) -> None:
        super().__init__()
        self.stem = block(3, 6)
        self.one = block(6, 5)
        self.two = block(5, 6)
        if relu_after:
            self.two[2] = nn.Identity()
        self.after = nn.ReLU() if relu_after else nn.Identity()
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(self.after(x + self.two(self.one(x))))
        return y


class PreActivation(nn.Module):
    """x + conv(relu(bn(x))): a norm and an addition read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.head = nn.Conv2d(6, 6, 3, padding=1, bias=False), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(x + self.conv(torch.relu(self.bn(x))))
        return y


class Biased(nn.Module):
    """Convolutions with biases and no batch norm, followed by `activation` and by GELU.

    GELU has f(0) = 0; `activation` may have another f(0), as a sigmoid does.
    """

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, stride=2)
        self.act, self.gelu, self.head = activation(), nn.GELU(), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gelu(self.b(self.act(self.a(x)))))
        return y


class Cat(nn.Module):
    """Two branches that are concatenated; one is also read by a layer whose output is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = block(3, 5), block(5, 4), block(5, 3)
        self.join, self.extra, self.head = block(7, 6), block(4, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        left = self.left(x)
        joined = self.join(torch.cat([left, self.right(x)], dim=1))
        y: Tensor = self.head(joined + self.extra(left))
        return y


class Flat(nn.Module):
    """A linear layer that reads every pixel: flatten leaves it 2x2 features per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool = block(3, 6), nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.hidden, self.relu, self.out = nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.relu(self.hidden(self.flatten(self.pool(self.a(x))))))
        return y


class Grouped(nn.Module):
    """A grouped convolution between two ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 6), nn.Conv2d(6, 6, 3, groups=3), block(6, 4)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.c(torch.relu(self.b(self.a(x)))))
        return y


class Depthwise(nn.Module):
    """An inverted residual block with squeeze-excitation.

    Its depthwise convolution has two rows per channel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = block(3, 4), block(4, 6)
        self.deep = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.BatchNorm2d(12))
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project, self.norm = nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu_(self.deep(self.expand(x)))
        gate = self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        x = x + self.norm(self.project(y * torch.sigmoid(gate)))
        z: Tensor = self.head(x)
        return z


class Shuffled(nn.Module):
    """Two halves of the channels, one of which goes through a block, then cat and shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.right, self.more = block(3, 8), block(4, 4), block(8, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([left, self.right(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)
        y: Tensor = self.head(self.more(x))
        return y


class Written(nn.Module):
    """A view with hard-coded sizes, so that the channels it reads cannot be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(3, 6), block(6, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(self.a(x).view(-1, 2, 3, 8, 8).flatten(1, 2)))
        return y


class Transformer(nn.Module):
    """A vision transformer of one block, with hand-written attention and layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.scale = (
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Parameter(torch.ones(8)),
        )
        self.position, self.linear = nn.Parameter(torch.randn(1, 4, 8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        n, t, c = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        x = x + self.proj(attended)
        x = x + self.scale * self.down(F.gelu(self.up(self.norm(x))))
        y: Tensor = self.linear(x.mean(1))
        return y


class Sequences(nn.Module):
    """A 1D network: Conv1d, BatchNorm1d, a PReLU with a slope per channel, ConvTranspose1d."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.act = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.PReLU(6)
        self.up, self.last = nn.ConvTranspose1d(6, 5, 3, stride=2), nn.Conv1d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.relu(self.up(self.act(self.norm(self.a(x.flatten(2)))))))
        return y.mean(2)


class Volumes(nn.Module):
    """A 3D network: Conv3d, BatchNorm3d, ConvTranspose3d."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.up, self.last = nn.ConvTranspose3d(6, 5, 2, stride=2), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(torch.relu(self.norm(self.a(x[:, None]))), (1, 2, 2))
        y: Tensor = self.last(torch.tanh(self.up(x)).mean((2, 3, 4)))
        return y


class NormAct(nn.BatchNorm2d):
    """A user's batch norm class like timm's: it calls F.batch_norm, then an activation."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        out = F.batch_norm(input, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.silu(out)


class NormRelu(nn.BatchNorm2d):
    """A user's batch norm class that calls torch's forward(), then ReLU in place."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


class OwnNorms(nn.Module):
    """A residual block with batch norms of users' own classes."""

    def __init__(self, first: type[nn.BatchNorm2d] = NormAct) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), first(6)
        self.inner = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), NormRelu(8), nn.Conv2d(8, 6, 1))
        self.last, self.head = NormAct(6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y: Tensor = self.head(self.last(x + self.inner(x)))
        return y


class Untraceable(Chain):
    """A chain whose control flow depends on the data, so that torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def excluded_chain() -> nn.Module:
    """Return a chain; quantise it with `exclude=("b.0",)`."""
    return Chain(bias=True)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "chain": (Chain, ()),
    "chain-biased": (lambda: Chain(bias=True), ()),
    "residual": (lambda: Residual(relu_after=False), ()),
    "residual-relu-after": (lambda: Residual(relu_after=True), ()),
    "pre-activation": (PreActivation, ()),
    "biased": (Biased, ()),
    "biased-sigmoid": (lambda: Biased(nn.Sigmoid), ()),
    "no-activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 5, 1), Head(5)),
        (),
    ),
    "cat": (Cat, ()),
    "flat": (Flat, ()),
    "grouped": (Grouped, ()),
    "excluded": (excluded_chain, ("b.0",)),
    "depthwise": (Depthwise, ()),
    "shuffled": (Shuffled, ()),
    "written": (Written, ()),
    "transformer": (Transformer, ()),
    "sequences": (Sequences, ()),
    "volumes": (Volumes, ()),
    "own norms": (OwnNorms, ()),
}
"""Name → how to build the network, and which layers to exclude from quantisation."""


@dataclass
class Cut:
    """A quantised network with its channel graph and an input; its methods plan and apply cuts."""

    model: nn.Module
    graph: ChannelGraph
    x: Tensor

    def settle(self) -> None:
        settle_statistics(self.graph, self.model)

    def plan(self, multiple: int = 1) -> Plan:
        return plan_cut(self.graph, self.model, analyse(self.graph, self.model), multiple)

    def apply(self, plan: Plan, *optimizers: Optimizer) -> None:
        """Apply `plan` to the model and bring the graph up to date."""
        apply_plan(plan, self.model, optimizers)
        self.graph.shrink(plan.removed, plan.silent, plan.rows, plan.columns)

    def cut(self, *optimizers: Optimizer) -> Plan:
        """Settle statistics, plan a cut, apply it, and return the plan."""
        self.settle()
        plan = self.plan()
        self.apply(plan, *optimizers)
        return plan


def prepare(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Cut:
    """Return one of NETWORKS, quantised at 8 bits, with random batch norms."""
    torch.manual_seed(seed)
    build, exclude = NETWORKS[name]
    model = build()
    quantize_layers(model, bits=8, exclude=exclude)
    model.to(dtype)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    randomise_norms(model)
    return Cut(model, channel_graph(model, x), x)


@torch.no_grad()
def randomise_norms(model: nn.Module) -> None:
    """Set the affine parameters and statistics of every batch norm to random numbers."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)


@torch.no_grad()
def kill(model: nn.Module, layer: str, rows: Any) -> None:
    """Set the bit depth of `rows` of `layer` to 0."""
    quantized_layers(model)[layer].bit_depth[rows] = 0


def outputs(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    """Return what `model` computes in one mode; then restore its buffers and modes."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    with torch.no_grad():
        y: Tensor = model(x)
    for module, mode in modes.items():
        module.training = mode
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return y


def count(model: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def compressor_of(model: nn.Module, x: Tensor, gamma: float = 0.01, **options: Any) -> Compressor:
    """Return a compressor of `model`, whose batch norms are randomised afterwards."""
    compressor = Compressor(model, x, gamma, **{"bits": 4} | options)
    randomise_norms(model)
    return compressor
