"""Random networks with rows killed at random, and what they compute.

To kill a row is to set its bit depth to 0.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from random_networks import build, source
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from selfcompress import Compressor
from selfcompress.graph.liveness import constants, settle_statistics
from selfcompress.graph.ops import Kind
from selfcompress.layers.batch_norms import PlacedBatchNorm


@contextlib.contextmanager
def told(seed: int, own_classes: bool = False) -> Iterator[None]:
    """Add the seed and the network's source to any exception that is raised in the block."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"seed {seed}:\n{source(seed, own_classes)}")
        raise


def compressed(seed: int, own_classes: bool = False) -> Compressor:
    """Return the compressor of a random network, one layer of which may be left in float."""
    generator = torch.Generator().manual_seed(seed)
    model, x = build(seed, own_classes)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    some = int(torch.randint(len(layers), (), generator=generator))
    exclude = [layers[some]] if len(layers) > 1 and below(0.15, 1, generator) else []
    multiple = 1 + seed % 3
    compressor = Compressor(model, x, gamma=0.0, bits=8, exclude=exclude, multiple=multiple)
    model.double()  # the formats too, so that their gradients are exact
    return compressor


def below(chance: float, n: int, generator: torch.Generator) -> Tensor:
    """Return (n,) bool, each True with probability `chance`."""
    return torch.rand(n, generator=generator) < chance


@torch.no_grad()
def kill_at_random(compressor: Compressor, seed: int, settle: bool = True) -> None:
    """Kill between none and all of the rows of every layer; negate some biases, and zero others.

    Args:
        settle: whether to call `avoid_ties`, and then set the statistics of batch norms that read
            constants, as a cut does.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in compressor.layers.values():
        chance = (0.0, 0.3, 0.7, 1.0)[int(torch.randint(4, (), generator=generator))]
        layer.bit_depth[below(chance, len(layer.bit_depth), generator)] = 0
        if layer.bias is not None:
            layer.bias[below(0.4, len(layer.bias), generator)] *= -1
            layer.bias[below(0.5, len(layer.bias), generator)] = 0
    for norm in compressor.model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            norm.bias[below(0.3, len(norm.bias), generator)] *= -1
            norm.bias[below(0.3, len(norm.bias), generator)] = 0
    # As a cut does first: rows that quantise to zeros lose their bits, and some get theirs back if
    # the output would not depend on the input any more.
    for name, idle in compressor.idle.still().items():
        compressor.layers[name].bit_depth[idle] = 0
    compressor.connection.keep()
    if settle:
        avoid_ties(compressor)
        settle_statistics(compressor.graph, compressor.model)


@torch.no_grad()
def hold_norms(compressor: Compressor, seed: int) -> None:
    """Mark all batch norms as held in eval mode in training, and randomise their statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, norm in compressor.model.named_modules():
        if isinstance(norm, _BatchNorm):
            compressor.graph.eval_norms.add(name)
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.normal_(generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)


Before = Callable[[_BatchNorm, Tensor, Tensor], Tensor | None]


@contextlib.contextmanager
def watched_norms(compressor: Compressor, before: Before) -> Iterator[None]:
    """Within the block, call `before(norm, x, known)` before every batch norm.

    It may return a tensor, which replaces the norm's input x. `known` is (channels of x,) bool:
    whether the channel is known to be constant.
    """

    def with_known(known: Tensor) -> Any:
        return lambda norm, args: before(norm, args[0], known)

    graph, model = compressor.graph, compressor.model
    constant = constants(graph, model)
    # Nothing is known of the input of a norm that the graph does not follow.
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    known = {name: np.zeros(_width(norm), bool) for name, norm in norms.items()}
    for node in graph.of_kind(Kind.NORM, Kind.OWN_NORM):
        if sum(other.module == node.module for other in graph.nodes) == 1:
            of_input = constant[node.inputs[0]][graph.sources[node.name][0]]
            known[node.module] = ~np.isnan(of_input)
    hooks = [
        norm.register_forward_pre_hook(with_known(torch.from_numpy(known[name])))
        for name, norm in norms.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def _width(norm: _BatchNorm) -> int:
    """Return the number of channels of the norm's input."""
    return norm.in_width if isinstance(norm, PlacedBatchNorm) else norm.num_features


def avoid_ties(compressor: Compressor) -> None:
    """Set biases of 0 to 0.125 in batch norms whose input channel is constant, but not known to be.

    Such an entry would output about ±1e-17 instead of 0, and a ReLU after it depends on the sign.
    If a channel is known to be constant, its entry is not computed after the cut. But before the
    cut it still is, in evaluation, and a maximum may be taken of its output and a 0: in networks
    with maxima, these biases are set as well.
    """
    maxima = any("max" in step.node.name for step in compressor.graph.steps)

    def before(norm: _BatchNorm, x: Tensor, known: Tensor) -> None:
        if norm.affine:
            every = torch.arange(x.shape[1])
            columns = norm.columns if isinstance(norm, PlacedBatchNorm) else every
            low, high = x.index_select(1, columns).transpose(0, 1).flatten(1).aminmax(dim=1)
            minded = ~known[columns] | maxima
            norm.bias[(high - low < 1e-6) & minded & (norm.bias == 0)] = 0.125

    with watched_norms(compressor, before):
        compute(compressor, training=True)


Result = tuple[list[Tensor], dict[str, Tensor]]


def compute(compressor: Compressor, training: bool) -> Result:
    """Return all outputs, and parameter name → its gradient of an arbitrary loss.

    Modes and buffers are restored afterwards.
    """
    model = compressor.model
    was_training = model.training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    tree = model(compressor.example_input)
    outputs = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    weighted = [
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
        for y in outputs
        if y.requires_grad  # without any live row, outputs are constant
    ]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, Tensor] = {}
    if weighted:
        # Not .backward(): the compressor's hooks would drop the gradients of the formats.
        loss = torch.stack(weighted).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.train(was_training)
    return [y.detach() for y in outputs], gradients
