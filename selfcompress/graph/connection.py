"""Find which rows have to keep bits, so that the network's output still depends on its input."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.ops import Kind
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.quantizer import fit_exponent


class Connection:
    """Keeps enough rows alive for the network's output to depend on its input.

    Args:
        graph: the channel graph of the network, as it is now.
        layers: the network's quantised layers by name.
        min_channels: how many rows of every layer keep bits at least (all, if it has fewer).
    """

    def __init__(
        self, graph: ChannelGraph, layers: Mapping[str, QuantizedLayer], min_channels: int
    ) -> None:
        self.graph, self.layers, self.min_channels = graph, layers, min_channels
        self._vital: tuple[set[str] | None, set[str]] = (
            None,
            set(),
        )  # (names of layers without rows, names of those that must keep a row then)

    @torch.no_grad()
    def keep(self) -> None:
        """Give bits back to rows of layers with too few live ones.

        Too few are fewer than `min_channels`; or none, if the output depends on the layer.
        """
        depths: list[Tensor] = [layer.bit_depth for layer in self.layers.values()]
        # Read all depths at once, since every read from a GPU waits for it.
        live = (torch.cat(depths) > 0).numpy(force=True)
        dead: set[str] = set()
        ends = np.cumsum([len(depth) for depth in depths])
        for (name, layer), rows in zip(self.layers.items(), np.split(live, ends[:-1]), strict=True):
            count = int(rows.sum())
            least = min(self.min_channels, len(layer.rows))
            # A layer without any rows lost them in a cut: the network is connected without it.
            if count == 0 and least == 0 and len(layer.rows):
                if connected(self.graph, dead | {name} | self._empty()):
                    dead.add(name)
                else:
                    least = 1
            if count < least:
                _revive(layer, least - count)

    def least_rows(self) -> list[int]:
        """Return how many rows each layer has to keep with bits until the next cut, in order.

        That is `min_channels`, but at least one (as far as the layer has rows), except in layers
        without which, all together, the output still depends on the input. These are collected
        greedily, anew whenever a cut has left other layers without rows.
        """
        empty = self._empty()
        if self._vital[0] != empty:
            gone = set(empty)
            for name in self.layers:
                if connected(self.graph, gone | {name}):
                    gone.add(name)
            self._vital = empty, self.layers.keys() - gone
        return [
            min(max(self.min_channels, int(name in self._vital[1])), len(layer.rows))
            for name, layer in self.layers.items()
        ]

    def _empty(self) -> set[str]:
        return {name for name, layer in self.layers.items() if len(layer.rows) == 0}


def connected(graph: ChannelGraph, without: set[str]) -> bool:
    """Return whether the output still depends on the input when the outputs of `without` don't.

    False if one of these modules is in no trace, as it is not known what depends on it.
    """
    if without - {node.module for node in graph.nodes}:
        return False
    reached: set[str] = set()
    for node in graph.nodes:
        if node.kind is Kind.INPUT or (
            node.module not in without and any(i in reached for i in node.inputs)
        ):
            reached.add(node.name)
    return all(node.name in reached for node in graph.of_kind(Kind.OUTPUT))


def _revive(layer: QuantizedLayer, count: int) -> None:
    """Give 2 bits to those `count` dead rows of a layer that have the largest weights (L2)."""
    norms = layer.weight_by_row().flatten(1).norm(dim=1)
    strongest = norms.masked_fill(layer.live_rows(), -1).topk(count).indices
    layer.bit_depth[strongest] = 2  # with 1 bit there is no level above zero
    weight = layer.weight_by_row()[strongest]
    layer.exponent[strongest] = fit_exponent(weight, layer.bit_depth[strongest])
