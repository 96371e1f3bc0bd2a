"""Dead channels that stay for a while: torch is slow at odd widths and at gaps among channels."""

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from selfcompress.graph.channels import ChannelGraph, Node
from selfcompress.graph.ops import Kind
from selfcompress.graph.removable import removable
from selfcompress.layers.placing import few_gaps, layout_of

FAST_MULTIPLE = 16
"""Of channels, where channels are last."""


def fast_multiple(model: nn.Module) -> int:
    """The multiple of channels that tensors should have, by how weights of convolutions lie.

    Where every channel lies by itself, as usual, any width is fast.
    """
    layouts = {layout_of(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
    return 1 if layouts <= {torch.contiguous_format} else FAST_MULTIPLE


def without_what_is_fast(
    graph: ChannelGraph,
    model: nn.Module,
    rows: dict[str, np.ndarray],
    removed: np.ndarray,
    multiple: int,
) -> np.ndarray:
    """`removed`, (number of ids,) bool, without channels that make a network faster where they are.

    Args:
        rows: module name → (rows,) bool, the rows that stay.
        multiple: of channels, which tensors have then if they can, and if above 1, batch norms
            and depthwise convolutions read just the channels that they make.
    """
    through = graph.of_kind(Kind.NORM, Kind.GROUPED)
    through = [node for node in through if model.get_submodule(node.module).keeps_places]
    while True:
        free = _may_be_kept(graph, through)
        kept = _aligned(graph, removed, through, free)
        kept = _rounded_up(graph, kept, through, free, multiple)
        kept = removable(graph, kept, rows, model)
        in_vain = _misaligned(graph, kept, through)
        if not in_vain:
            return kept
        through = [node for node in through if node not in in_vain]


def _rounded_up(
    graph: ChannelGraph, removed: np.ndarray, through: list[Node], free: np.ndarray, multiple: int
) -> np.ndarray:
    """As much of `removed` as leaves tensors a multiple of `multiple` channels, or all they have.

    More of them may be dead than alive. That is still faster: where a batch norm's channels are
    no multiple of 16, the threads that sum them up share cache lines. Nodes `through` which
    channels go make all that they read, unless more than half of that is dead.
    """
    kept = removed.copy()
    nodes = {node.name: node for node in through}
    for name, ids in graph.ids.items():  # in order of execution
        if len(np.unique(ids)) < len(ids) or not free[ids].all():
            continue
        if name in nodes:
            read = ~kept[graph.reads(nodes[name])]
            if 2 * (read & removed[ids]).sum() <= read.sum():
                kept[ids[read]] = False
                continue
        gone = ids[kept[ids]]
        kept[gone[: (len(gone) - len(ids)) % multiple]] = False
    return kept


def _aligned(
    graph: ChannelGraph, removed: np.ndarray, through: list[Node], free: np.ndarray
) -> np.ndarray:
    """As much of `removed` as leaves nodes the channels that they make, where few are gone.

    Else what they make would have to be put into its places.
    """
    removed = removed.copy()
    for node in through:
        reads, makes = removed[graph.reads(node)], removed[graph.ids[node.name]]
        gaps = graph.reads(node)[reads & ~makes]
        if free[gaps].all() and few_gaps(len(gaps), int((~makes).sum())):
            removed[gaps] = False
    return removed


def _misaligned(graph: ChannelGraph, removed: np.ndarray, through: list[Node]) -> list[Node]:
    """Those of some nodes that will not read just the channels that they make."""
    return [n for n in through if (removed[graph.reads(n)] != removed[graph.ids[n.name]]).any()]


def _may_be_kept(graph: ChannelGraph, through: list[Node]) -> np.ndarray:
    """(number of ids,) bool: those that may stay in their places though they are dead.

    Not what layers left in float or grouped convolutions read or make, which would compute with
    it and train it; but what depthwise ones among `through` do, whose rows go with their channels.
    """
    free = np.ones_like(graph.removed)
    for node in graph.of_kind(Kind.LAYER, Kind.GROUPED):
        grouped = node.kind is Kind.GROUPED and node not in through
        if grouped or node.module not in graph.origin:
            free[graph.reads(node)] = free[graph.ids[node.name]] = False
    return free
