"""Detect where a forward() computes with the number of channels of a layer, which a cut changes.

To torch.fx such a number is a constant: nothing in a trace says where it came from.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn
from torch.utils import _pytree as pytree

from selfcompress.graph.products import product_of, weight_of
from selfcompress.layers.batch_norms import PlacedBatchNorm
from selfcompress.layers.kinds import FLOAT_LAYERS
from selfcompress.layers.placing import Placed
from selfcompress.layers.quantized import QuantizedLayer

_OF_INPUTS, _OF_OUTPUTS = (
    ("in_channels", "in_features"),
    ("out_channels", "out_features", "embedding_dim"),
)
_OF_NORMS = ("num_features", "running_mean", "running_var")
_OF_GROUPS = ("groups",)  # their number falls when a group loses its last row


class Width(int):
    """A number that was read from a layer; its identity tells it from equal numbers.

    Attributes:
        name: the name of the attribute that it is the value of.
    """

    name = ""


class Read(NamedTuple):
    """Attribute `name` of `layer` was read, and was `value`."""

    layer: nn.Module
    name: str
    value: Any


@contextmanager
def noting_widths(module: nn.Module) -> Iterator[list[Read]]:
    """Inside, record reads of the widths, statistics and groups of layers and norms in `module`.

    For this, each of them gets a subclass of its class in which these attributes are properties,
    except layers left in float of a user's subclass, as forward() may ask for their class.
    """
    reads: list[Read] = []
    kinds = {
        layer: type(layer)
        for layer in module.modules()
        if isinstance(layer, Placed) or type(layer) in FLOAT_LAYERS
    }
    try:
        for layer, kind in kinds.items():
            names = _OF_NORMS if isinstance(layer, PlacedBatchNorm) else _OF_INPUTS + _OF_OUTPUTS
            there = (vars(layer) | layer._buffers).keys() & {*names}
            if isinstance(layer, QuantizedLayer) and layer.grouped:
                there |= {*_OF_GROUPS}
            body = {"__module__": kind.__module__} | {n: _noted(n, reads) for n in there}
            layer.__class__ = type(kind.__name__, (kind,), body)
        yield reads
    finally:
        for layer, kind in kinds.items():
            layer.__class__ = kind


def _noted(name: str, reads: list[Read]) -> Any:
    def get(layer: nn.Module) -> Any:
        value = (vars(layer) | layer._buffers)[name]
        if isinstance(value, int):
            value = Width(value)
            value.name = name
        reads.append(Read(layer, name, value))
        return value

    return property(get)


def kept_whole(
    reads: Sequence[Read], nodes: Sequence[torch.fx.Node], module: nn.Module
) -> set[str]:
    """Return the names of norms and grouped convolutions in `module` that must keep all rows.

    forward() has read the width or statistics of these norms, or the groups of these convolutions,
    which a cut would change. Groups that it only passes to the convolution function do not count.
    """
    given = [product.groups for product in map(product_of, nodes) if product]
    layers = {
        read.layer
        for read in reads
        if read.name in _OF_NORMS
        or (read.name in _OF_GROUPS and all(read.value is not groups for groups in given))
    }
    return {name for name, layer in module.named_modules() if layer in layers}


def frozen_by_widths(
    reads: Sequence[Read], nodes: Sequence[torch.fx.Node], module: nn.Module
) -> dict[torch.fx.Node, str]:
    """Return the nodes that keep their channels, since forward() reads how many there are → why.

    Two uses of a width do not count. If a tensor is flattened to as many numbers as a layer reads,
    both are cut alike. And if what a layer has made is shaped by the layer's own width, that number
    is a constant of the trace, for which the channels keep their places, while their rows can go.
    """
    found: dict[torch.fx.Node, str] = {}
    calls = {node: layer for node in nodes if (layer := _called(node, module))}
    for layer, name, value in reads:
        if name not in _OF_INPUTS + _OF_OUTPUTS:
            continue
        shaped = next((node for node in nodes if _shapes_to(node, value)), None)
        if shaped is not None and (name in _OF_INPUTS or _is_made_by(layer, shaped, calls)):
            continue
        names = {part: at for at, part in module.named_modules()}
        for node, called in calls.items():
            if called is layer:
                seen = node.all_input_nodes if name in _OF_INPUTS else [node]
                found |= dict.fromkeys(seen, f"forward() reads {names[layer]}.{name}")
    return found


def _called(node: torch.fx.Node, module: nn.Module) -> nn.Module | None:
    """Return the module that a node calls, or whose weight it multiplies with; None if neither."""
    if node.op == "call_module":
        return module.get_submodule(str(node.target))
    weight = weight_of(node)
    return None if weight is None else module.get_submodule(str(weight.target).rpartition(".")[0])


def _shapes_to(node: torch.fx.Node, width: int) -> bool:
    """Return whether `node` is a view or reshape to a shape with the very object `width` in it."""
    is_view = node.op == "call_method" and node.target in ("view", "reshape")
    if not is_view and node.target is not torch.reshape:
        return False
    return any(leaf is width for leaf in pytree.tree_leaves((node.args, node.kwargs)))


def _is_made_by(
    layer: nn.Module, node: torch.fx.Node, calls: dict[torch.fx.Node, nn.Module]
) -> bool:
    """Return whether `node` reads what `layer` made, with no other layer in between."""
    while node.args and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
        if isinstance(calls.get(node), (Placed, *FLOAT_LAYERS)):
            return calls[node] is layer
    return False
