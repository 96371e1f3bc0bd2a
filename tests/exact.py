"""Checks that cuts are exact: start a compressor, kill rows, cut, and compare all outputs.

To kill a row is to set its bit depth to 0. `trained_on_words` cuts by training instead.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from networks import kill, randomise_norms
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress import Compressor, Schedule
from selfcompress.graph.liveness import settle_statistics
from selfcompress.report import LayerReport


def started(model: nn.Module, x: Any, **options: Any) -> Compressor:
    """Return a compressor of `model` in double precision, and randomise the batch norms.

    The warning that torch.fx cannot trace the model is ignored.
    """
    torch.manual_seed(0)
    model.double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.fx cannot trace")
        compressor = Compressor(model, x, 0.01, **{"bits": 8} | options)
    randomise_norms(model)
    return compressor


@torch.no_grad()
def kill_some(compressor: Compressor, seed: int) -> None:
    """Kill about a third of the rows of every layer, so that some channels become exactly zero.

    About 60 % of the biases of layers become 0, and all biases of batch norms 0 or negative.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in compressor.layers.items():
        rows = len(layer.rows)
        dead = torch.randperm(rows, generator=generator)[: (rows + 1) // 3]
        kill(compressor.model, name, dead)
        if layer.bias is not None:
            layer.bias[torch.rand(len(layer.bias), generator=generator) < 0.6] = 0
    for norm in compressor.model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.bias is not None:
            norm.bias.copy_(-norm.bias.abs())


def computed(model: nn.Module, x: Any, training: bool) -> list[Tensor]:
    """Return all tensors that a copy of `model` outputs in training or evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        y = copy.deepcopy(model).train(training)(*(x if isinstance(x, tuple) else (x,)))
    return [leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, Tensor)]


def check_exact(
    compressor: Compressor, x: Any, modes: tuple[bool, ...] = (False, True), shrinks: bool = True
) -> None:
    """Kill rows and cut, twice, and assert that no output changes.

    Also assert that the report gives a reason for every layer that cannot lose all channels.

    Args:
        x: the input, or a tuple of inputs.
        modes: the modes to compare outputs in; True is training, False evaluation.
        shrinks: whether every row that has died must be gone after the cut.
    """
    for seed in (1, 2):
        kill_some(compressor, seed)
        settle_statistics(compressor.graph, compressor.model)
        before = [computed(compressor.model, x, mode) for mode in modes]
        rows = {n: int(m.live_rows().sum()) for n, m in compressor.layers.items()}
        assert compressor.cut()
        for name, layer in compressor.layers.items():
            assert len(layer.rows) <= max(1, rows[name]) or not shrinks, name
        for mode, want in zip(modes, before, strict=True):
            got = computed(compressor.model, x, mode)
            for a, b in zip(got, want, strict=True):
                scale = max(float(b.abs().max()), 0.1)
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * scale)
    for entry in compressor.report().layers:
        assert entry.why or entry.removable == entry.channels, entry.name


def reported(compressor: Compressor) -> dict[str, LayerReport]:
    """Return the compressor's report on each layer, by name."""
    return {layer.name: layer for layer in compressor.report().layers}


def images(*shape: int) -> Tensor:
    """Return a fixed random float64 tensor of `shape`, or of (4, 3, 8, 8) if none is given."""
    shape = shape or (4, 3, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained_on_words(build: Callable[[], nn.Module], gamma: float) -> tuple[Compressor, float]:
    """Train a network for 300 steps on sentences of six words, out of 50, and finish it.

    The class of a sentence is how many of the first ten words are in it: none, one, or more.

    Returns:
        The compressor, and the network's accuracy on the training sentences.
    """
    torch.manual_seed(0)
    model = build()
    tokens = torch.randint(50, (256, 6))
    labels = (tokens < 10).sum(1).clamp(max=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    compressor = Compressor(model, tokens[:8], gamma, bits=8, schedule=Schedule(300))
    for _ in range(300):
        loss = F.cross_entropy(model(tokens), labels) + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compressor.step(optimizer)
    compressor.finish([tokens], optimizer)
    return compressor, float((model(tokens).argmax(1) == labels).float().mean())
