"""Which rows have to keep bits, so that the network's output still depends on its input."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.ops import Kind
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.quantizer import fit_exponent


class Connection:
    """Keeps the output connected with the input.

    Args:
        graph: of the network, as it is now.
        layers: its quantised layers by name.
        min_channels: rows of every layer that keep bits at the least (all, if it has fewer).
    """

    def __init__(
        self, graph: ChannelGraph, layers: Mapping[str, QuantizedLayer], min_channels: int
    ) -> None:
        self.graph, self.layers, self.min_channels = graph, layers, min_channels
        self._vital: tuple[set[str] | None, set[str]] = (
            None,
            set(),
        )  # empty layers → those that must keep a row then

    @torch.no_grad()
    def keep(self) -> None:
        """Let no layer fall below `min_channels`, or die whole if the output hangs on it."""
        depths: list[Tensor] = [layer.bit_depth for layer in self.layers.values()]
        # Read at once: a GPU is waited for whenever something is read.
        live = (torch.cat(depths) > 0).numpy(force=True)
        dead: set[str] = set()
        ends = np.cumsum([len(depth) for depth in depths])
        for (name, layer), rows in zip(self.layers.items(), np.split(live, ends[:-1]), strict=True):
            count = int(rows.sum())
            least = min(self.min_channels, len(layer.rows))
            # An empty layer lost its rows in a cut, so the network is connected without it.
            if count == 0 and least == 0 and len(layer.rows):
                if connected(self.graph, dead | {name} | self._empty()):
                    dead.add(name)
                else:
                    least = 1
            if count < least:
                _revive(layer, least - count)

    def least_rows(self) -> list[int]:
        """How many rows of every layer keep bits until the next cut, for the output to depend on.

        Layers that can all go together may go whole, as many as are found in their order; every
        other keeps a row. The next cut looks at what has gone.
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
    """Whether the output still depends on the input when these modules' outputs don't.

    Of modules that are in no trace that cannot be said, so it is not.
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
    """Give bits again to those dead rows of a layer that have the largest weights."""
    norms = layer.weight_by_row().flatten(1).norm(dim=1)
    strongest = norms.masked_fill(layer.live_rows(), -1).topk(count).indices
    layer.bit_depth[strongest] = 2  # one bit has no level above zero
    weight = layer.weight_by_row()[strongest]
    layer.exponent[strongest] = fit_exponent(weight, layer.bit_depth[strongest])
