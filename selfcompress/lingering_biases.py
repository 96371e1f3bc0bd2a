"""Biases that are all that dead rows have left: driven to zero, so that their channels fall silent.

A channel goes when what its readers see is exactly 0. Where every row behind it is dead, what they
see follows from biases alone.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.liveness import analyse

_STEP = 0.01  # how far one step drives a bias: the proximal step of the paper's L1 loss


class LingeringBiases:
    """The entries of biases, and of norms' biases, that only dead rows stand behind.

    Args:
        graph: of the network, as it is now.
        model: the network.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.positions: dict[str, Tensor] = {}

    def look(self) -> None:
        """Find those of now."""
        self.load(_lingering(self.graph, self.model))

    @torch.no_grad()
    def shrink(self) -> None:
        """Bring those that were found a step nearer to zero."""
        for name, positions in self.positions.items():
            bias = self.model.get_parameter(name)
            bias[positions] = F.softshrink(bias[positions], _STEP)

    def load(self, positions: Mapping[str, Tensor]) -> None:
        """Take up what `positions` was."""
        self.positions = {
            name: entries.to(self.model.get_parameter(name).device)
            for name, entries in positions.items()
        }


@torch.no_grad()
def clear_lingering(graph: ChannelGraph, model: nn.Module) -> None:
    """Have all of them at zero at once, as they will be in the end."""
    left_over = True
    while left_over:  # where one goes, the next may have nothing else to hold
        left_over = False
        for name, positions in _lingering(graph, model).items():
            bias = model.get_parameter(name)
            left_over |= bool(bias[positions].any())
            bias[positions] = 0


def _lingering(graph: ChannelGraph, model: nn.Module) -> dict[str, Tensor]:
    """By parameter: (entries,) int64, where it has such a bias. One that is frozen stays."""
    lingering = analyse(graph, model).lingering
    return {
        name: torch.from_numpy(positions)
        for name, positions in lingering.items()
        if model.get_parameter(name).requires_grad
    }
