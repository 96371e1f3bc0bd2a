"""Drive "lingering" biases to zero: those that alone still keep a channel from being removed.

A channel can be removed once the layers that read it see exactly 0. If all rows that contribute to
it have lost their bits, they see a constant that depends on biases only. An entry of a bias (of a
layer or a batch norm) that makes such a constant non-zero is called lingering.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.liveness import analyse

_STEP = 0.01  # change of a bias per step: the proximal step of the paper's L1 loss


class LingeringBiases:
    """Finds lingering entries of the biases of layers and norms, and shrinks them step by step.

    Args:
        graph: the channel graph of `model`, which is kept up to date as it is cut.
        model: the network.

    Attributes:
        positions: name of a bias → (entries,) int64: the entries found to be lingering.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.positions: dict[str, Tensor] = {}

    def look(self) -> None:
        """Find the biases that are lingering now, and track these from now on."""
        self.load(_lingering(self.graph, self.model))

    @torch.no_grad()
    def shrink(self) -> None:
        """Move the tracked biases towards zero by at most `_STEP`, in place."""
        for name, positions in self.positions.items():
            bias = self.model.get_parameter(name)
            bias[positions] = F.softshrink(bias[positions], _STEP)

    def load(self, positions: Mapping[str, Tensor]) -> None:
        """Track the given entries, such as what `positions` was when the state was saved."""
        self.positions = {
            name: entries.to(self.model.get_parameter(name).device)
            for name, entries in positions.items()
        }


@torch.no_grad()
def clear_lingering(graph: ChannelGraph, model: nn.Module) -> None:
    """Set all lingering biases of `model` to zero in place, where training would bring them."""
    left_over = True
    while left_over:  # once some are zero, others may have become lingering
        left_over = False
        for name, positions in _lingering(graph, model).items():
            bias = model.get_parameter(name)
            left_over |= bool(bias[positions].any())
            bias[positions] = 0


def _lingering(graph: ChannelGraph, model: nn.Module) -> dict[str, Tensor]:
    """Return name of a bias → (entries,) int64 that are lingering; frozen biases are left out."""
    lingering = analyse(graph, model).lingering
    return {
        name: torch.from_numpy(positions)
        for name, positions in lingering.items()
        if model.get_parameter(name).requires_grad
    }
