"""The channel graph: which rows, columns and norm entries carry the same channel of a network.

The elements of a tensor that belong to the same channel are one *position* of it: a convolution's
output has one position per channel, whatever its height, width and batch. Every position has a
channel id. So a channel is the set of all positions with its id, in whatever tensors, and removing
it means removing all of them. What is not understood has its channels frozen, and `reasons` says
which node did so. `follow.py` builds the graph.

Surgery changes how many channels there are, never how operations are connected, so the model is
not traced again: removed ids are struck from the graph. Code that moves elements can have sizes
written into it (`x.view(-1, 8, 64)`), and then a removal would make it do something else. So
before anything is removed, `replay` runs the model's own moves on the ids that would be left.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor
from torch.utils import _pytree as pytree

from selfcompress.graph.ops import WITH_ROWS, Kind, reads_sizes, reads_type, taken
from selfcompress.layers.placing import few_gaps

Ids = np.ndarray  # (positions,) int64


@dataclass(frozen=True)
class Node:
    """One operation, and the tensor that it makes.

    Attributes:
        inputs: names of the operations whose tensors it reads.
        module: qualified name of the module that is called, or whose forward() an OWN_NORM is in;
            empty for other functions.
        evaluate: what an ELEMENTWISE, ADD or MUL operation does to (1, positions) tensors.
        tensor: qualified name of the model's tensor whose dimension `tensor_dim` counts the
            positions: what a PARAMETER node reads, or the weight of a PReLU; else empty.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...] = ()
    module: str = ""
    evaluate: Callable[..., Tensor] | None = None
    tensor: str = ""
    tensor_dim: int = 0


@dataclass
class Layout:
    """How the positions of a tensor lie in it.

    Attributes:
        shape: the tensor's sizes.
        grid: the same for dimensions along which the position changes, 1 for all others.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]

    def spread(self, values: np.ndarray) -> Tensor:
        """(positions,) values as a tensor of `shape`."""
        return torch.from_numpy(np.ascontiguousarray(values).reshape(self.grid)).expand(self.shape)

    def keep(self, kept: list[np.ndarray]) -> "Layout":
        """The layout when along each dimension only some of the grid are kept."""
        grid = tuple(len(k) for k in kept)
        sizes = zip(self.shape, self.grid, grid, strict=True)
        return Layout(tuple(new if old > 1 else size for size, old, new in sizes), grid)


@dataclass
class Step:
    """One node of a trace, as it is replayed.

    Attributes:
        kind: None if it makes no tensor but a number, a size or the like.
        result: what it gave on the example, with a `TensorName` in place of every tensor.
        names: the graph nodes of these tensors.
        module: the module that it calls, if it moves elements.
    """

    node: torch.fx.Node
    kind: Kind | None
    result: Any
    names: tuple[str, ...]
    module: torch.nn.Module | None = None


@dataclass
class ChannelGraph:
    """Operations in the order they run, and the channel ids on the tensor each one makes.

    Attributes:
        nodes: in order of execution; empty where nothing could be traced.
        ids: node name → (positions,) ids of its output, as they are now.
        sources: node name → for each input: (positions read or made,) the position of that input
            that each one comes from, -1 if it comes from another input.
        layouts: node name → how its positions lie in its tensor.
        steps: every node of the trace but the outputs, in order of execution, as it is replayed.
        frozen: (number of ids at the start,) bool: never to be removed.
        removed: the same, bool: already removed.
        silent: the same, bool: in its place, but nobody computes or reads it any more.
        reasons: frozen id → the node that froze it and why.
        origin: name of each module that may lose rows → (rows now,) the number each of them had
            at the start.
        untraceable: name of each module whose forward() cannot be traced → why.
        spoiled: name of each layer that is called in a way that cannot be followed → why.
        applications: name of each layer → how often its weight is applied for one sample.
        held: names of the batch norms that are in eval mode while the network trains, so that
            their statistics stay.
    """

    nodes: list[Node] = field(default_factory=list)
    ids: dict[str, Ids] = field(default_factory=dict)
    sources: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    frozen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    removed: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    silent: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    reasons: dict[int, str] = field(default_factory=dict)
    origin: dict[str, np.ndarray] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)
    spoiled: dict[str, str] = field(default_factory=dict)
    applications: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)

    def of_kind(self, *kinds: Kind) -> list[Node]:
        """The nodes of some kinds, in order of execution."""
        return [node for node in self.nodes if node.kind in kinds]

    def reads(self, node: Node) -> Ids:
        """(input channels,): the ids that a LAYER, GROUPED or NORM reads, in order."""
        ids: Ids = self.ids[node.inputs[0]][self.sources[node.name][0]]
        return ids

    def connected(self, without: set[str]) -> bool:
        """Whether the output still depends on the input when these modules' outputs don't.

        Of modules that are in no trace that cannot be said, so it is not.
        """
        if without - {node.module for node in self.nodes}:
            return False
        reached: set[str] = set()
        for node in self.nodes:
            if node.kind is Kind.INPUT or (
                node.module not in without and any(i in reached for i in node.inputs)
            ):
                reached.add(node.name)
        return all(node.name in reached for node in self.of_kind(Kind.OUTPUT))

    def shrink(self, ids: list[int], silent: list[int], rows: dict[str, list[int]]) -> None:
        """Bring the graph up to date after a cut.

        Args:
            ids: to be struck from every tensor.
            silent: ids that nobody computes or reads any more, in their places.
            rows: module name → the indices of the rows that it has kept.
        """
        self.silent[silent] = True
        for name, indices in rows.items():
            self.origin[name] = self.origin[name][np.array(indices, np.int64)]
        removed = np.zeros_like(self.removed)
        removed[ids] = True
        stays = {name: ~removed[ids] for name, ids in self.ids.items()}
        # A position -1 (of another input) stays -1.
        renumbered = {n: np.append(np.cumsum(kept) - 1, -1) for n, kept in stays.items()}
        for node in self.nodes:
            kept = ~removed[self.reads(node)] if node.kind in WITH_ROWS else stays.get(node.name)
            if kept is not None:
                self.sources[node.name] = tuple(
                    renumbered[name][source[kept]]
                    for name, source in zip(node.inputs, self.sources[node.name], strict=True)
                )
        for name, layout in self.layouts.items():
            self.layouts[name] = layout.keep(_kept_per_dim(layout.grid, stays[name]))
        self.ids = {name: ids[stays[name]] for name, ids in self.ids.items()}
        self.removed |= removed

    def constrain(self, removed: np.ndarray, rows: dict[str, np.ndarray], model: Any) -> np.ndarray:
        """As much of `removed`, (number of ids,) bool, as can be removed together.

        No tensor loses its last channel (pooling and convolution refuse tensors without any); a
        tensor with channels along several dimensions loses whole slices; the groups of a grouped
        convolution lose the same columns; and the model's moves must replay.
        """
        removed = removed & ~self.frozen
        while True:
            before = removed.copy()
            for name, ids in self.ids.items():
                gone = removed[ids]
                if gone.all():
                    removed[ids[0]] = False
                elif gone.any() and sum(size > 1 for size in self.layouts[name].grid) > 1:
                    kept = _kept_per_dim(self.layouts[name].grid, ~gone)
                    removed[ids.reshape(self.layouts[name].grid)[np.ix_(*kept)]] = False
            for node in self.of_kind(Kind.GROUPED):
                module = model.get_submodule(node.module)
                live = np.unique(module.row_groups.numpy(force=True)[rows[node.module]])
                columns = module.columns.numpy(force=True).reshape(module.groups, -1)[live]
                read = self.reads(node)[columns]  # (live groups, input channels per group)
                stays = ~removed[read].all(0)
                removed[read[:, stays]] = False
            for pieces in self.equal_pieces():
                removed[pieces[:, ~removed[pieces].all(0)]] = False
            if (removed == before).all():
                wrong = self.replay(removed)
                if not wrong:
                    return removed
                for name in wrong:
                    removed[self.ids[name]] = False

    def round_up(self, removed: np.ndarray, multiple: int) -> np.ndarray:
        """As much of `removed` as leaves tensors with multiples of `multiple` channels, if it can.

        No more channels are kept than there are live ones: where that would not do, it is half of
        `multiple`, or half of that.
        """
        kept, free = removed.copy(), self._may_be_kept()
        for ids in self.ids.values():
            if len(np.unique(ids)) < len(ids) or not free[ids].all():
                continue
            live, of = int((~removed[ids]).sum()), multiple
            while -live % of > min(live, len(ids) - live):
                of //= 2
            gone = ids[kept[ids]]
            kept[gone[: (len(gone) - len(ids)) % of]] = False
        return kept

    def align(self, removed: np.ndarray, norms: list[Node]) -> np.ndarray:
        """As much of `removed` as leaves `norms` the channels that they make, where few are gone.

        Else what they make would have to be put into its places.
        """
        removed, free = removed.copy(), self._may_be_kept()
        for node in norms:
            reads, makes = removed[self.reads(node)], removed[self.ids[node.name]]
            gaps = self.reads(node)[reads & ~makes]
            if free[gaps].all() and few_gaps(len(gaps), int((~makes).sum())):
                removed[gaps] = False
        return removed

    def misaligned(self, removed: np.ndarray, norms: list[Node]) -> list[Node]:
        """Those of `norms` that will not read just the channels that they make."""
        return [n for n in norms if (removed[self.reads(n)] != removed[self.ids[n.name]]).any()]

    def _may_be_kept(self) -> np.ndarray:
        """(number of ids,) bool: those that may stay in their places though they are dead.

        Not what grouped convolutions or layers left in float read or make: those would compute with
        it, and train it.
        """
        free = np.ones_like(self.removed)
        for node in self.of_kind(Kind.LAYER, Kind.GROUPED):
            if node.kind is Kind.GROUPED or node.module not in self.origin:
                free[self.reads(node)] = free[self.ids[node.name]] = False
        return free

    def equal_pieces(self) -> list[np.ndarray]:
        """(pieces, positions of each) ids, for every move that cuts a tensor into equal pieces."""
        found = []
        for step in self.steps:
            pieces = [self.ids[name] for name in step.names]
            if step.kind is Kind.MOVE and len(pieces) > 1 and len({len(p) for p in pieces}) == 1:
                found.append(np.stack(pieces))
        return found

    def replay(self, removed: np.ndarray) -> set[str]:
        """Run the moves on the ids that `removed` leaves; the tensors where that goes wrong.

        A move must give just the ids that striking the removed ones from its result gives. All
        other operations must be called with the numbers they were traced with.

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
                ids, layout = self.ids[name], self.layouts[name]
                kept = _kept_per_dim(layout.grid, ~removed[ids])
                left[name] = layout.keep(kept).spread(ids.reshape(layout.grid)[np.ix_(*kept)])
            return left[name]

        values: dict[torch.fx.Node, Any] = {}
        traced: dict[torch.fx.Node, Step] = {}
        for step in self.steps:
            node = step.node
            expected = pytree.tree_map_only(TensorName, lambda t: ids_left(t.name), step.result)
            values[node] = expected
            traced[node] = step
            runs = step.kind is Kind.MOVE or (step.kind is None and node.op.startswith("call_"))
            if reads_type(node) or (step.kind is None and self._reads_values(node, traced)):
                right = True  # of channel numbers it would read something else
            elif not runs:
                # Arguments that are no tensors must be what they were when the model was traced.
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
                except Exception:  # sizes that do not fit, in whatever way torch says it
                    right = False
            if not right:
                values[node] = expected
                wrong |= self._behind(node)
        # What is wrong is to be mended by removing less: of tensors that lose nothing, nothing can.
        return {name for name in wrong if removed[self.ids[name]].any()}

    def _reads_values(self, node: torch.fx.Node, traced: dict[torch.fx.Node, Step]) -> bool:
        """Whether a node makes numbers of what is in a tensor, whose channels are frozen then."""
        return not reads_sizes(node) and any(traced[n].names for n in node.all_input_nodes)

    def _behind(self, node: torch.fx.Node) -> set[str]:
        """The tensors that `node` makes and reads, through whatever numbers lie between."""
        steps = {step.node: step for step in self.steps}
        found = set(steps[node].names)
        pending = list(node.all_input_nodes)
        while pending:
            other = pending.pop()
            found |= set(steps[other].names)
            if not steps[other].names:
                pending += other.all_input_nodes
        return found


@dataclass(frozen=True)
class TensorName:
    """Stands for the tensor that a node of the graph makes."""

    name: str


def call(
    node: torch.fx.Node, values: dict[torch.fx.Node, Any], module: torch.nn.Module | None = None
) -> Any:
    """Call `node`'s function, method or `module` with `values` in place of the nodes it reads."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "call_method":
        # What could be viewed in the model may not be as it lies here, repeated with stride 0.
        method = "reshape" if node.target == "view" else str(node.target)
        return getattr(args[0], method)(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _kept_per_dim(grid: tuple[int, ...], kept: np.ndarray) -> list[np.ndarray]:
    """For each dimension of `grid`, the indices at which any position is kept."""
    table = kept.reshape(grid)
    dims = range(len(grid))
    return [np.flatnonzero(table.any(tuple(d for d in dims if d != dim))) for dim in dims]


def _same(result: Any, expected: Any) -> bool:
    a, b = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    return len(a) == len(b) and all(
        isinstance(x, Tensor) and x.shape == y.shape and bool((x == y).all())
        for x, y in zip(a, b, strict=True)
    )
