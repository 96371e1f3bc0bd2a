"""Find the dead channels that can be removed together, with the model's code left as it is."""

from typing import Any

import numpy as np
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress.graph.channels import ChannelGraph, Step, TensorName, call
from selfcompress.graph.ops import Kind, reads_sizes, reads_type, taken
from selfcompress.layers.quantized import QuantizedLayer


def removable(
    graph: ChannelGraph, removed: np.ndarray, rows: dict[str, np.ndarray], model: nn.Module
) -> np.ndarray:
    """Return the part of `removed` that can be removed together.

    Frozen ids stay. No tensor loses its last channel (pooling and convolution refuse tensors
    without any); a tensor with channels along several dimensions loses whole slices; the groups of
    a grouped convolution lose the same columns; equal pieces of a tensor (of `chunk`, say) lose the
    same positions; and the model's own moves must not go wrong. What is kept for one of these may
    break another, so they are checked until nothing changes.

    Args:
        removed: (number of ids,) bool, the ids to be removed if possible.
        rows: module name → (rows,) bool, the rows that stay.

    Returns:
        (number of ids,) bool, True only where `removed` is.
    """
    removed = removed & ~graph.frozen
    while True:
        before = removed.copy()
        for name, ids in graph.ids.items():
            gone = removed[ids]
            if gone.all():
                removed[ids[0]] = False
            elif gone.any() and sum(size > 1 for size in graph.layouts[name].grid) > 1:
                layout = graph.layouts[name]
                kept = np.ix_(*layout.per_dim(~gone))
                removed[ids.reshape(layout.grid)[kept]] = False
        for node in graph.of_kind(Kind.GROUPED):
            module = model.get_submodule(node.module)
            assert isinstance(module, QuantizedLayer)
            live = np.unique(module.row_groups.numpy(force=True)[rows[node.module]])
            columns = module.columns.numpy(force=True).reshape(module.groups, -1)[live]
            read = graph.reads(node)[columns]  # (live groups, input channels per group)
            stays = ~removed[read].all(0)
            removed[read[:, stays]] = False
        for pieces in _equal_pieces(graph):
            removed[pieces[:, ~removed[pieces].all(0)]] = False
        if (removed == before).all():
            wrong = wrong_moves(graph, removed)
            if not wrong:
                return removed
            for name in wrong:
                removed[graph.ids[name]] = False


def _equal_pieces(graph: ChannelGraph) -> list[np.ndarray]:
    """Return the (pieces, positions of each) ids of every move that makes equal pieces."""
    found = []
    for step in graph.steps:
        pieces = [graph.ids[name] for name in step.names]
        if step.kind is Kind.MOVE and len(pieces) > 1 and len({len(p) for p in pieces}) == 1:
            found.append(np.stack(pieces))
    return found


def wrong_moves(graph: ChannelGraph, removed: np.ndarray) -> set[str]:
    """Run the moves on the ids that `removed` leaves, and return the tensors of moves gone wrong.

    A move must give just the ids that striking the removed ones from its result gives. All
    other operations must be called with the numbers they were traced with. The names returned are
    those of tensors that a wrong operation reads or makes and that lose channels.

    Say a tensor x of 12 channels is reshaped by `x.view(n, 3, 4)`: three heads, four channels
    each. Without channel 0 it has 11, and the call fails: wrong. Without channels 0, 4 and 8,
    one of each head, `view(n, 3, 4)` fails as well, for the 4 is written in the code. But
    `x.view(n, 3, -1)` then gives [[1, 2, 3], [5, 6, 7], [9, 10, 11]], as striking 0, 4 and 8
    from its result [[0, 1, 2, 3], [4 …]] does: right. And `x.view(n, 3, x.shape[1] // 3)` is
    right too, as the size is computed anew.
    """
    if not removed.any():
        return set()
    wrong: set[str] = set()
    left: dict[str, Tensor] = {}

    def ids_left(name: str) -> Tensor:
        if name not in left:
            ids, layout = graph.ids[name], graph.layouts[name]
            kept = layout.per_dim(~removed[ids])
            left[name] = layout.keep(kept).spread(ids.reshape(layout.grid)[np.ix_(*kept)])
        return left[name]

    values: dict[torch.fx.Node, Any] = {}
    traced: dict[torch.fx.Node, Step] = {}
    for step in graph.steps:
        node = step.node
        expected = pytree.tree_map_only(TensorName, lambda t: ids_left(t.name), step.result)
        values[node] = expected
        traced[node] = step
        runs = step.kind is Kind.MOVE or (step.kind is None and node.op.startswith("call_"))
        if reads_type(node) or (step.kind is None and _reads_values(node, traced)):
            right = True  # it cannot be run again: from ids it would read something else
        elif not runs:
            # Arguments other than tensors must be the same as when the model was traced.
            right = all(
                traced[n].names or values[n] == traced[n].result for n in node.all_input_nodes
            )
        else:
            try:
                values[node] = call(node, values, step.module)
                if node.target is taken:
                    right = values[node] == expected
                else:
                    right = step.kind is None or _same(values[node], expected)
            except Exception:  # sizes do not fit; which error torch raises then varies
                right = False
        if not right:
            values[node] = expected
            wrong |= _behind(graph, node)
    # The caller mends them by removing less, which it cannot where nothing is removed.
    return {name for name in wrong if removed[graph.ids[name]].any()}


def _reads_values(node: torch.fx.Node, traced: dict[torch.fx.Node, Step]) -> bool:
    """Return whether a node makes numbers of values in a tensor (whose channels are frozen)."""
    return not reads_sizes(node) and any(traced[n].names for n in node.all_input_nodes)


def _behind(graph: ChannelGraph, node: torch.fx.Node) -> set[str]:
    """Return the tensors that `node` makes, or reads directly or through numbers made of them."""
    steps = {step.node: step for step in graph.steps}
    found = set(steps[node].names)
    pending = list(node.all_input_nodes)
    while pending:
        other = pending.pop()
        found |= set(steps[other].names)
        if not steps[other].names:
            pending += other.all_input_nodes
    return found


def _same(result: Any, expected: Any) -> bool:
    """Return whether two results hold equal tensors."""
    a, b = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    return len(a) == len(b) and all(
        isinstance(x, Tensor) and x.shape == y.shape and bool((x == y).all())
        for x, y in zip(a, b, strict=True)
    )
