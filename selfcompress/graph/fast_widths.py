"""Keep some dead channels in place: torch is slow at odd widths and at gaps among channels.

Masks named `removed` or `kept` (what is kept of `removed`) are True for ids that are *removed*, as
in `removable.py`. Keeping a dead channel in its place means setting its True to False.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from selfcompress.graph.channels import ChannelGraph, Node
from selfcompress.graph.ops import Kind
from selfcompress.graph.removable import removable
from selfcompress.layers.placing import few_gaps, layout_of

FAST_MULTIPLE = 16
"""Widths that are multiples of so many channels are fast in channels_last memory format."""


def fast_multiple(model: nn.Module) -> int:
    """Return the multiple of channels that the tensors of `model` should have.

    This is 1 (any width is fast) if the weights of all convolutions are in torch's default memory
    format, and `FAST_MULTIPLE` if some are channels_last.
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
    """Return the part of `removed` that is left when channels stay that make the network faster.

    An example with `multiple` 4: a convolution makes five channels c, and a batch norm reads these
    and makes five channels n. Batch norms and depthwise convolutions should read just the channels
    that they make, and tensors should have a multiple of 4 channels. From channel 0 to channel 4,
    1 is removed and 0 stays:

        c 00111, n 00011    `removed`, as given
        c 00011, n 00011    `_aligned`: n₂ stays, so the norm should read c₂
        c 00001, n 00011    `_rounded_up`, first c: three channels stay, so c₃ does as well
        c 00001, n 00001    `_rounded_up`, then n: the norm makes all that it reads, so n₃ stays

    So four channels of each stay, and only c₄ and n₄ are removed. If in the end a batch norm or
    depthwise convolution does not read just what it makes, all is repeated without aligning it.

    Args:
        rows: module name → (rows,) bool, the rows that stay.
        removed: (number of ids,) bool, as `removable` returns it.
        multiple: what the number of channels of every tensor is to be a multiple of, if possible.

    Returns:
        (number of ids,) bool, True only where `removed` is.
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
    """Return the part of `removed` that leaves every tensor a multiple of `multiple` channels.

    A tensor that is not wide enough for that keeps all of its channels; one with an id that may not
    stay, or with an id twice, is left alone. More channels may be dead than alive, which is still
    faster: where a batch norm's channels are no multiple of 16, the threads that sum them up share
    cache lines. Nodes in `through` make all channels that they read instead, unless more than half
    of those are removed from what they make.

    Args:
        through: batch norms and depthwise convolutions: channel i of the output is from channel i.
        free: (number of ids,) bool, which ids may stay, see `_may_be_kept`.
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
    """Return the part of `removed` that leaves nodes in `through` an input for all that they make.

    Without it, what they make would have to be put into place among zeros. A node of which many
    inputs are missing (see `few_gaps`), or some that may not stay, is left alone. Arguments are
    those of `_rounded_up`.
    """
    removed = removed.copy()
    for node in through:
        reads, makes = removed[graph.reads(node)], removed[graph.ids[node.name]]
        gaps = graph.reads(node)[reads & ~makes]
        if free[gaps].all() and few_gaps(len(gaps), int((~makes).sum())):
            removed[gaps] = False
    return removed


def _misaligned(graph: ChannelGraph, removed: np.ndarray, through: list[Node]) -> list[Node]:
    """Return the nodes in `through` that would not read just the channels that they make."""
    return [n for n in through if (removed[graph.reads(n)] != removed[graph.ids[n.name]]).any()]


def _may_be_kept(graph: ChannelGraph, through: list[Node]) -> np.ndarray:
    """Return (number of ids,) bool: which ids may stay in their places though they are dead.

    Those that layers left in float or grouped convolutions read or make may not: these layers
    would compute with the dead channels and train them. Depthwise convolutions in `through` are an
    exception, since their rows go with their channels.
    """
    free = np.ones_like(graph.removed)
    for node in graph.of_kind(Kind.LAYER, Kind.GROUPED):
        grouped = node.kind is Kind.GROUPED and node not in through
        if grouped or node.module not in graph.origin:
            free[graph.reads(node)] = free[graph.ids[node.name]] = False
    return free
