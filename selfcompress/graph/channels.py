"""The channel graph: which rows, columns and norm entries carry the same channel of a network.

A *position* is a set of elements of a tensor that stay or go together: a convolution's output has
one position per channel, whatever its height, width and batch. A tensor's *layout* says where its
positions lie. Every position has a channel *id*, and positions may share one: after flattening,
each pixel of a channel is a position with the channel's id. So a channel is the set of all
positions with its id, in whatever tensors, and removing it means removing all of them.

The graph knows for every id whether it is

    frozen      never to be removed; `reasons` says which operation froze it and why
    removed     already cut out of all tensors
    silent      dead, as nothing depends on its value, but left in its place by a cut

`follow.py` builds the graph. Surgery changes how many channels there are, never how operations are
connected, so the model is not traced again: removed ids are struck from the graph. Code that moves
elements can have sizes written into it (`x.view(-1, 8, 64)`), and then a removal would make it do
something else. So before anything is removed, `removable.py` takes the *steps*, the nodes of the
trace, and runs the model's own moves on the ids that would be left.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor

from selfcompress.graph.ids import Ids
from selfcompress.graph.ops import WITH_ROWS, Kind


@dataclass(frozen=True)
class Node:
    """One operation, and the tensor that it makes, if any.

    Attributes:
        inputs: names of the operations whose tensors it reads.
        module: qualified name of the module that is called, or whose forward() an OWN_NORM is in;
            empty for other functions.
        evaluate: the function that an ELEMENTWISE, ADD or MUL operation applies to (1, positions)
            tensors; None for other kinds.
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

    An (8, 16, 32, 32) output of a convolution has the grid (1, 16, 1, 1): 16 positions, numbered
    in row-major order of the grid.

    Attributes:
        shape: the tensor's sizes.
        grid: the same for dimensions along which the position changes, 1 for all others.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]

    def spread(self, values: np.ndarray) -> Tensor:
        """Return (positions,) values as a tensor of `shape`, with stride 0 where they repeat."""
        return torch.from_numpy(np.ascontiguousarray(values).reshape(self.grid)).expand(self.shape)

    def per_dim(self, kept: np.ndarray) -> list[np.ndarray]:
        """Return, for each dimension of the grid, the indices of slices with a kept position.

        Args:
            kept: (positions,) bool.
        """
        table, dims = kept.reshape(self.grid), range(len(self.grid))
        return [np.flatnonzero(table.any(tuple(d for d in dims if d != dim))) for dim in dims]

    def keep(self, kept: list[np.ndarray]) -> "Layout":
        """Return the layout that is left when each dimension of the grid keeps these indices."""
        grid = tuple(len(k) for k in kept)
        sizes = zip(self.shape, self.grid, grid, strict=True)
        return Layout(tuple(new if old > 1 else size for size, old, new in sizes), grid)


@dataclass(frozen=True)
class TensorName:
    """The name of the graph node that makes a tensor; takes the tensor's place in results."""

    name: str


@dataclass
class Step:
    """One node of a trace, for `removable.py` to check by running moves again on channel ids.

    Attributes:
        kind: None if it makes no tensor but a number, a size or the like.
        result: what it gave on the example, with a `TensorName` in place of every tensor.
        names: the names of the graph nodes that make these tensors.
        module: the module that it calls, if it moves elements.
    """

    node: torch.fx.Node
    kind: Kind | None
    result: Any
    names: tuple[str, ...]
    module: torch.nn.Module | None = None


@dataclass
class ChannelGraph:
    """Operations in the order they run, and the channel ids of the tensor that each one makes.

    Attributes:
        nodes: in order of execution; empty where nothing could be traced.
        ids: node name → (positions,) ids of its output, as they are now.
        sources: node name → for each input: (positions read or made,) the position of that input
            that each one comes from, -1 if it comes from another input.
        layouts: node name → how its positions lie in its tensor.
        steps: the nodes of all traces in order of execution, except outputs and unread tensors.
        frozen: (number of ids at the start,) bool: never to be removed.
        removed: (number of ids at the start,) bool: already removed.
        silent: (number of ids at the start,) bool: dead, but left in its place by a cut.
        reasons: frozen id → the node that froze it and why.
        origin: name of each module that may lose rows → (rows now,) the index that each of them
            had at the start.
        columns: name of each layer that may lose single columns → (columns now,) the index that
            each of them had at the start.
        untraceable: name of each module whose forward() cannot be traced → why.
        spoiled: name of each layer of which some call cannot be followed → why. It keeps the
            channels that it reads and makes.
        applications: name of each layer → how often its weight is applied for one sample.
        eval_norms: names of the batch norms that are in eval mode while the network trains, so that
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
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)
    spoiled: dict[str, str] = field(default_factory=dict)
    applications: dict[str, int] = field(default_factory=dict)
    eval_norms: set[str] = field(default_factory=set)

    def of_kind(self, *kinds: Kind) -> list[Node]:
        """Return the nodes of the given kinds, in order of execution."""
        return [node for node in self.nodes if node.kind in kinds]

    def reads(self, node: Node) -> Ids:
        """Return the (input channels,) ids that a LAYER, GROUPED or NORM reads, in order."""
        ids: Ids = self.ids[node.inputs[0]][self.sources[node.name][0]]
        return ids

    def shrink(
        self,
        ids: list[int],
        silent: list[int],
        rows: dict[str, list[int]],
        columns: dict[str, list[int]],
    ) -> None:
        """Bring the graph up to date after a cut.

        Args:
            ids: the ids to be struck from every tensor.
            silent: ids that are dead, but stay in their places.
            rows, columns: module name → the indices of the rows, or columns, that it has kept.
        """
        self.silent[silent] = True
        for origin, kept_now in ((self.origin, rows), (self.columns, columns)):
            for name, indices in kept_now.items():
                origin[name] = origin[name][np.array(indices, np.int64)]
        removed = np.zeros_like(self.removed)
        removed[ids] = True
        stays = {name: ~removed[ids] for name, ids in self.ids.items()}
        # The -1 at the end is for positions of -1 (of another input), which stay -1.
        renumbered = {n: np.append(np.cumsum(kept) - 1, -1) for n, kept in stays.items()}
        for node in self.nodes:
            kept = ~removed[self.reads(node)] if node.kind in WITH_ROWS else stays.get(node.name)
            if kept is not None:
                self.sources[node.name] = tuple(
                    renumbered[name][source[kept]]
                    for name, source in zip(node.inputs, self.sources[node.name], strict=True)
                )
        for name, layout in self.layouts.items():
            self.layouts[name] = layout.keep(layout.per_dim(stays[name]))
        self.ids = {name: ids[stays[name]] for name, ids in self.ids.items()}
        self.removed |= removed


def call(
    node: torch.fx.Node, values: dict[torch.fx.Node, Any], module: torch.nn.Module | None = None
) -> Any:
    """Call `node`'s function, method or `module` on the `values` of the nodes that it reads."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "call_method":
        # A tensor that the model can view may have other strides here, 0 where it repeats.
        method = "reshape" if node.target == "view" else str(node.target)
        return getattr(args[0], method)(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
