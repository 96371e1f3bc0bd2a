"""Follow channels through a traced model and build its channel graph.

An addition makes the ids of its operands equal; a layer or a norm makes new ids; a move (view,
cat, chunk, permute ...) is run on the numbers of the positions, so that it tells by itself where
each one goes; what is not understood has its ids frozen.

`channel_graph` does this with a `_Builder`, whose methods are in this order:

    follow          takes the nodes of one part of the trace in turn, `_visit` a single one
    _dispatch       decides the kind of a node, and calls the method for that kind
    _parameter ... _opaque
                    the methods for the kinds, which compute the ids of what a node makes, among
                    helpers for layers of users' classes; if one raises a `_CannotFollowError`,
                    `_visit` has `_opaque` freeze the channels
    _emit           adds a node to the graph; the methods for the kinds end with it
    _target ... _evaluate
                    look up names, modules, values and arguments of a node of torch.fx
    graph           finishes the graph: layers with a call that cannot be followed are frozen, and
                    ids that were found to be equal become one
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from selfcompress.graph.channels import ChannelGraph, Layout, Node, Step, TensorName, call
from selfcompress.graph.ids import ChannelIds, Ids
from selfcompress.graph.in_place import alias_hazards, redirect_in_place
from selfcompress.graph.observe import Observed, observe
from selfcompress.graph.ops import (
    CASTS,
    JOINS,
    Kind,
    function_of,
    kind_of_call,
    kind_of_module,
    picks_extremes,
    reads_sizes,
    worked_on,
)
from selfcompress.graph.products import is_only_multiplied, product_of, weight_of
from selfcompress.graph.trace import Part, Trace, trace
from selfcompress.graph.tracer import Shape, owner_of
from selfcompress.inputs import Inputs, batch_size
from selfcompress.layers.batch_norms import NORM_ENTRIES, PlacedBatchNorm
from selfcompress.layers.embeddings import TiedLinear
from selfcompress.layers.kinds import EMBEDDINGS, FLOAT_LAYERS, layer_widths
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.placing import Placed
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.text import first_line


def channel_graph(
    model: nn.Module, example_input: Inputs, observed: Observed | None = None
) -> ChannelGraph:
    """Return the channel graph of `model`, whose layers are quantised already.

    If torch.fx cannot trace the model whole, this warns, and follows the parts that can be traced.
    If there is none the graph is empty: channels can still lose all their bits, but they keep their
    places.

    Args:
        observed: a run of the model on `example_input`; None makes one.
    """
    observed = observed or observe(model, example_input)
    traced = trace(model, example_input, observed)
    if "" in traced.untraceable:
        parts = ", ".join(part.name for part in traced.parts) or "none"
        warnings.warn(
            f"torch.fx cannot trace {type(model).__name__} ({traced.untraceable['']}): channels "
            f"are only removed inside of those of its modules that it can trace ({parts})",
            stacklevel=3,
        )
    builder = _Builder(model, traced, observed)
    for part in traced.parts:
        builder.follow(part)
    graph = builder.graph()
    batch = max(1, batch_size(example_input))
    graph.applications = {name: count // batch for name, count in observed.applications.items()}
    return graph


@dataclass(frozen=True, eq=False)
class _Value:
    """A tensor of the trace: the ids of its positions and how they lie in it.

    Attributes:
        name: the name of the graph node that makes it.
        ids: (positions,) the channel id of each position.
        layout: how the positions lie in the tensor.
        copies: (positions,) equal numbers for positions that moves have made out of the same one,
            as flattening does of a channel's pixels. They become one position again if a later
            move undoes that.
    """

    name: str
    ids: Ids
    layout: Layout
    copies: np.ndarray

    @property
    def grid(self) -> tuple[int, ...]:
        return self.layout.grid

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape


_ASKED = "is asked for its width, its statistics or its groups"


class _CannotFollowError(Exception):
    """An operation cannot be followed; the message says why, with the operation as its subject."""


class _Builder:
    """Builds the channel graph of a model, part by part; see the top of this file.

    Modules go by the first of their names in `named_modules`.
    """

    def __init__(self, model: nn.Module, traced: Trace, observed: Observed) -> None:
        self.model = model
        self.read_elsewhere = observed.read_elsewhere
        self.observed_calls = observed.counts
        self.untraceable = traced.untraceable
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.first = {module: name for name, module in model.named_modules()}
        self.miscounted = traced.miscounted
        self.ids = ChannelIds()
        self.result = ChannelGraph()
        self.made: dict[str, tuple[Ids, Ids]] = {}  # layer, norm → ids its first call read, made
        self.made_by: dict[str, _Value] = {}  # layer → what its last call made
        self.parameters: dict[str, _Value] = {}
        self.calls: Counter[str] = Counter()  # module → how often traces call it or enter it
        self.own_norms: Counter[str] = Counter()  # batch norms of users' classes → followed calls
        self.read: set[str] = set()  # modules whose tensors or widths are read by other modules
        self.asked: set[str] = set()  # modules whose width, statistics or groups forward() reads
        self.spoiled: dict[str, str] = {}  # layers of which one call could not be followed → why
        owners = Counter(
            id(t)
            for m in model.modules()
            for t in [*m._parameters.values(), *m._buffers.values()]
            if t is not None
        )
        self.shared = {key for key, times in owners.items() if times > 1}

    # Following a part of the trace.

    def follow(self, part: Part) -> None:
        """Add the operations of one part to the graph."""
        self.prefix, self.facts = part.prefix, part.facts
        self.runs = self.observed_calls[part.name] if part.name else 1
        self.values: dict[torch.fx.Node, Any] = {}
        redirect_in_place(part, self._module)
        hazards = alias_hazards(part, self._module)
        self.read |= part.read
        self.asked |= part.read
        for node in part.nodes:
            if node.op == "call_module":
                self.calls[self._target(node)] += 1
            elif node.op == "get_attr" and not all(map(partial(self._is_known, node), node.users)):
                self.read.add((self._target(node)).rpartition(".")[0])
        for name, count in part.entered.items():
            self.calls[name] += count
        for node in part.nodes:
            self._visit(node, hazards)
            for value in self._tensors(node) if node in part.watched else ():
                self._watch(node, value, part.watched[node])

    def _visit(self, node: torch.fx.Node, hazards: set[torch.fx.Node]) -> None:
        """Follow one node; freeze what it reads and makes if it is a hazard or otherwise fails."""
        inputs = list(dict.fromkeys(v for n in node.all_input_nodes for v in self._tensors(n)))
        if node.op == "output":
            self._emit(node, Kind.OUTPUT, inputs)
            for value in inputs:
                self.ids.freeze(value.ids, "it is an output of the model")
            return
        if node.op == "get_attr" and not node.users:
            self.values[node] = None  # unread; forward() may assign another tensor to its name
            return
        fact = self.facts[node]
        shapes = [leaf for leaf in pytree.tree_leaves(fact) if isinstance(leaf, Shape)]
        if not shapes:
            if inputs and not reads_sizes(node):
                self._opaque(node, inputs, "reads values out of a tensor")
            self._record(node, None, fact)
            return
        try:
            if node in hazards:
                raise _CannotFollowError(
                    "changes in place what is read elsewhere under another name"
                )
            kind, result = self._dispatch(node, inputs, fact)
        except Exception as why:  # a _CannotFollowError, or whatever an unusual call runs into
            if not isinstance(why, _CannotFollowError):
                warnings.warn(
                    f"{self._label(node)} ran into {type(why).__name__} ({first_line(why)}) as its "
                    "channels were followed, so they keep their places: please report this",
                    stacklevel=1,
                )
            kind, result = Kind.OPAQUE, self._opaque(node, inputs, str(why))
            name = self._target(node) if node.op == "call_module" else self._layer_of(node)
            if name:
                self.spoiled.setdefault(name, str(why))
        self._record(node, kind, result)

    def _record(self, node: torch.fx.Node, kind: Kind | None, result: Any) -> None:
        self.values[node] = result
        named = pytree.tree_map_only(_Value, lambda v: TensorName(v.name), result)
        module = self._module(node) if kind is Kind.MOVE and node.op == "call_module" else None
        names = tuple(v.name for v in self._tensors(node))
        self.result.steps.append(Step(node, kind, named, names, module))

    def _dispatch(self, node: torch.fx.Node, inputs: list[_Value], fact: Any) -> tuple[Kind, Any]:
        """Return the node's kind and, in the structure of `fact`, the values that it makes."""
        if node.op == "placeholder":
            return Kind.INPUT, self._opaque(node, [], "is the model's input", Kind.INPUT)
        if node.op == "get_attr":
            return Kind.PARAMETER, self._parameter(node, fact)
        module = self._module(node)
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise _CannotFollowError("has hooks, which see or change what it reads and makes")
        if isinstance(module, TiedLinear):
            return Kind.OPAQUE, self._tied(node, module, inputs)
        if isinstance(module, OwnForward):
            raise _CannotFollowError("computes in a way of its own that cannot be traced")
        if isinstance(module, (Placed, *FLOAT_LAYERS)):
            return self._layer(node, self._target(node), inputs, fact)
        if name := self._layer_of(node):
            return self._layer(node, name, self._multiplied(node, name), fact)
        if node.target is F.batch_norm and isinstance(fact, Shape):
            return Kind.OWN_NORM, self._own_norm(node)
        if node.op == "call_method" and node.target in CASTS:
            inputs = inputs[:1]  # of a second tensor (type_as) only the type is read
        tensors = [n for n in node.all_input_nodes if self._tensors(n)]
        kind = kind_of_module(module) if module else kind_of_call(node, len(tensors))
        named_tuple = isinstance(node.target, type) and issubclass(node.target, tuple)
        if named_tuple or self._is_pick(node):
            # If an opaque operation made these tensors, they all have the same frozen id.
            return Kind.MOVE, call(node, self.values)
        mixes = getattr(node.target, "__name__", "") in ("layer_norm", "group_norm", "rms_norm")
        if kind is Kind.OPAQUE and ("Norm" in type(module).__name__ or mixes):
            raise _CannotFollowError("takes its statistics over several channels")
        if kind is Kind.OPAQUE:
            raise _CannotFollowError("is not an operation that channels can be followed through")
        if kind is Kind.MOVE:
            return kind, self._move(node, inputs, fact)
        if not isinstance(fact, Shape):
            raise _CannotFollowError("gives something else than one tensor")
        if module is not None and len(inputs) != 1:
            raise _CannotFollowError("reads something other than one tensor")
        if kind is Kind.SPATIAL:
            return kind, self._spatial(node, module, inputs, fact)
        return kind, self._combine(node, kind, module, inputs, fact)

    # The kinds of operations, one method each, and their helpers.

    def _parameter(self, node: torch.fx.Node, fact: Any) -> Any:
        """Follow a tensor of the model that has one channel for each of its elements."""
        name = self._target(node)
        if name in self.parameters:
            return self.parameters[name]
        owner, _, key = name.rpartition(".")
        module = self.modules[owner]
        tensor = module._parameters.get(key, module._buffers.get(key))
        if tensor is None:
            raise _CannotFollowError("is a constant written into the code")
        long = [dim for dim, size in enumerate(fact.sizes) if size > 1]
        hidden = bool(self.untraceable) and owner in self.read_elsewhere
        layer = isinstance(module, (Placed, *FLOAT_LAYERS))
        if id(tensor) in self.shared or len(long) > 1 or layer or hidden:
            raise _CannotFollowError(
                "is a tensor of the model that is not indexed by channel alone"
            )
        if not long:  # one number for all channels
            return self._opaque(node, [], "is a single number", Kind.PARAMETER)
        grid = tuple(size if dim in long else 1 for dim, size in enumerate(fact.sizes))
        ids, layout = self.ids.new(fact.sizes[long[0]]), Layout(fact.sizes, grid)
        value = _Value(self._name(node), ids, layout, np.arange(len(ids)))
        self._emit(node, Kind.PARAMETER, [], value, (), tensor=name, tensor_dim=long[0])
        self.parameters[name] = value
        return value

    def _layer(
        self, node: torch.fx.Node, name: str, inputs: list[_Value], fact: Any
    ) -> tuple[Kind, _Value]:
        """Follow a call of a layer or batch norm; all calls of it read and make the same ids."""
        module = self.modules[name]
        lookup = isinstance(module, EMBEDDINGS)
        if (len(inputs) != 1 and not lookup) or not isinstance(fact, Shape):
            raise _CannotFollowError("reads something other than one tensor")
        if name in self.asked:
            raise _CannotFollowError(_ASKED)
        if name in self.read | self.read_elsewhere or any(
            id(p) in self.shared for p in module.parameters(False)
        ):
            raise _CannotFollowError("has parameters that are used elsewhere too")
        if name in self.miscounted:
            raise _CannotFollowError("is also called by code that cannot be traced")
        if isinstance(module, PlacedBatchNorm):
            kind, axis = Kind.NORM, 1
            widths = (module.in_width, module.out_width)
        elif isinstance(module, QuantizedLayer):
            kind = Kind.GROUPED if module.grouped else Kind.LAYER
            axis = len(fact.sizes) + module.channel_dim
            widths = layer_widths(module)
        elif type(module) in FLOAT_LAYERS and getattr(module, "groups", 1) == 1:
            kind = Kind.LAYER
            assert isinstance(module.weight, Tensor)
            space = 0 if isinstance(module, nn.Linear) else module.weight.dim() - 2
            axis = len(fact.sizes) - 1 - space
            widths = layer_widths(module)
        else:
            raise _CannotFollowError(
                "is a grouped layer left in float, or of a type that is not known"
            )
        if lookup:
            inputs = [self._indices(node, inputs)]
            source = np.zeros(widths[0], np.int64)
        else:
            source = self._along(inputs[0], axis, widths[0])
        value = inputs[0]
        ids_read = value.ids[source]
        if name in self.made:
            self.ids.unite(self.made[name][0], ids_read)
        else:
            self.made[name] = (ids_read, self.ids.new(widths[1]))
        grid = tuple(widths[1] if dim == axis else 1 for dim in range(len(fact.sizes)))
        layout, numbers = Layout(fact.sizes, grid), np.arange(widths[1])
        result = _Value(self._name(node), self.made[name][1], layout, numbers)
        self._emit(node, kind, inputs, result, (source,), module=name)
        self.made_by[name] = result
        return kind, result

    def _tied(self, node: torch.fx.Node, layer: TiedLinear, inputs: list[_Value]) -> Any:
        """Freeze what a linear layer reads, and the embedding whose weight it shares."""
        name = self.first[layer.embedding]
        looked_up = [self.made_by[name]] if name in self.made_by else []
        if not looked_up:  # the embedding may still be called: it keeps all of its rows
            self.read.add(name)
        return self._opaque(node, inputs + looked_up, f"shares its weight with {name}")

    def _watch(self, node: torch.fx.Node, value: _Value, why: str) -> None:
        """Freeze a value that is read outside the trace, and add an OPAQUE node that needs it."""
        self.ids.freeze(value.ids, why)
        self._stand_in(node, f"{value.name}.watched", [value], why)

    def _indices(self, node: torch.fx.Node, inputs: list[_Value]) -> _Value:
        """Freeze the inputs of an embedding, and return a value that stands for the indices."""
        for value in inputs:
            self.ids.freeze(value.ids, f"{self._label(node)} reads values out of it")
        name = f"{self._name(node)}.indices"
        return self._stand_in(node, name, inputs, "it is looked up in an embedding")

    def _stand_in(self, node: torch.fx.Node, name: str, inputs: list[_Value], why: str) -> _Value:
        """Return one new frozen channel, made by an OPAQUE node that reads `inputs`."""
        made, nowhere = self.ids.new(1), np.zeros(1, np.int64)
        self.ids.freeze(made, why)
        value = _Value(name, made, Layout((1,), (1,)), nowhere)
        self._emit(node, Kind.OPAQUE, inputs, value, (nowhere,) * len(inputs))
        return value

    def _layer_of(self, node: torch.fx.Node) -> str:
        """Return the name of the layer whose own forward() calls `node` on its weight; else ""."""
        weight = weight_of(node)
        if weight is None:
            return ""
        name, _, key = self._target(weight).rpartition(".")
        own = isinstance(self.modules[name], OwnForward) and key == "weight"
        return name if own and self._is_inside(node, name) else ""

    def _is_inside(self, node: torch.fx.Node, name: str) -> bool:
        """Return whether the forward() of the module `name`, or of a part of it, made a node."""
        own = self.modules[f"{self.prefix}{owner_of(node)}".rstrip(".")]
        return any(part is own for part in self.modules[name].modules())

    def _is_known(self, tensor: torch.fx.Node, user: torch.fx.Node) -> bool:
        """Return whether a user of a model's tensor is its own layer, or reads only its sizes."""
        name = self._target(tensor).rpartition(".")[0]
        own = isinstance(self.modules[name], OwnForward) and self._is_inside(user, name)
        return own or reads_sizes(user)

    def _multiplied(self, node: torch.fx.Node, name: str) -> list[_Value]:
        """Return the inputs of a call by which a layer's own forward() applies its weight."""
        product, layer = product_of(node), self.modules[name]
        assert product is not None
        bias = "" if layer.bias is None else f"{name}.bias"
        given = product.bias
        if given is not None:
            whole = isinstance(given, torch.fx.Node) and given.op == "get_attr"
            given = self._target(given) if whole else "?"
        if (given or "") != bias:
            raise _CannotFollowError("adds something else than its bias")
        read = [tensor for tensor in (product.weight, product.bias) if tensor is not None]
        if not all(is_only_multiplied(t, len(self.facts[t].sizes)) for t in read):
            raise _CannotFollowError(
                "computes with its weight or bias, or with their sizes, in a way of its own too"
            )
        if not isinstance(layer, product.layer):
            raise _CannotFollowError("computes as another kind of layer")
        grouped = isinstance(layer, QuantizedLayer) and layer.grouped
        if grouped and getattr(product.groups, "name", "") != "groups":
            raise _CannotFollowError("does not take its number of groups from .groups")
        if isinstance(layer, EMBEDDINGS):  # indices, and of bags offsets and weights too
            others = [n for n in node.all_input_nodes if n is not product.weight]
            return [value for n in others for value in self._tensors(n)]
        values = self._tensors(product.input)
        if len(values) != 1:
            raise _CannotFollowError("reads something other than one tensor")
        return values

    def _along(self, value: _Value, axis: int, width: int) -> np.ndarray:
        """Return (width,) the positions of `value` along a dimension that alone has channels."""
        if value.shape[axis] != width:
            raise _CannotFollowError(
                f"has another number of channels than dimension {axis} of its input"
            )
        if any(size > 1 for dim, size in enumerate(value.grid) if dim != axis):
            raise _CannotFollowError(
                f"mixes another dimension than the channels, which are not in {axis}"
            )
        return np.arange(width) if value.grid[axis] > 1 else np.zeros(width, np.int64)

    def _own_norm(self, node: torch.fx.Node) -> _Value:
        """Follow a call of F.batch_norm in the forward() of a user's own batch norm class."""
        bound = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        given = bound.arguments
        keys = [key for key in NORM_ENTRIES if given[key] is not None]
        names = [
            self._target(given[key])
            for key in keys
            if isinstance(given[key], torch.fx.Node) and given[key].op == "get_attr"
        ]
        name = names[0].rpartition(".")[0] if names else ""
        if not isinstance(self.modules[name], _BatchNorm) or names != [f"{name}.{k}" for k in keys]:
            raise _CannotFollowError("reads other tensors than those of one batch norm")
        if not given["training"]:
            raise _CannotFollowError("takes no statistics in training")
        value, *entries = (self.values[given[key]] for key in ("input", *keys))
        self._along(value, 1, value.shape[1])
        if any(len(other.ids) != len(value.ids) for other in entries):
            raise _CannotFollowError("has entries that are not indexed by its channels alone")
        for other in entries:
            self.ids.unite(value.ids, other.ids)
        self.made[name] = (value.ids, value.ids)
        self.own_norms[name] += self.runs
        result = _Value(self._name(node), value.ids, value.layout, value.copies)
        numbers = np.arange(len(value.ids))
        sources = (numbers,) * (1 + len(entries))
        self._emit(node, Kind.OWN_NORM, [value, *entries], result, sources, module=name)
        return result

    def _spatial(
        self, node: torch.fx.Node, module: nn.Module | None, inputs: list[_Value], fact: Shape
    ) -> _Value:
        """Follow an operation that mixes dimensions other than those of the channels."""
        if len(inputs) != 1:
            raise _CannotFollowError("reads several tensors")
        value, rank = inputs[0], len(inputs[0].shape)
        plain = self._plain_arguments(node)
        worked = worked_on(node, module, rank, plain)
        if worked is None or any(value.grid[dim] > 1 for dim in worked):
            raise _CannotFollowError("works on the dimension of the channels")
        if len(fact.sizes) == rank:
            grid = value.grid
        else:
            grid = tuple(size for dim, size in enumerate(value.grid) if dim not in worked)
        if len(grid) != len(fact.sizes) or any(
            size > 1 and size != now for size, now in zip(grid, fact.sizes, strict=True)
        ):
            raise _CannotFollowError("changes the number of channels")
        result = _Value(self._name(node), value.ids, Layout(fact.sizes, grid), value.copies)
        # The maximum of equal elements is the same, so a constant stays what it is.
        kind, evaluate = Kind.SPATIAL, None
        if picks_extremes(node, module):
            kind, evaluate = Kind.ELEMENTWISE, torch.clone
        sources = (np.arange(len(value.ids)),)
        self._emit(node, kind, inputs, result, sources, evaluate=evaluate)
        return result

    def _combine(
        self,
        node: torch.fx.Node,
        kind: Kind,
        module: nn.Module | None,
        inputs: list[_Value],
        fact: Shape,
    ) -> _Value:
        """Follow an elementwise operation, and tie operands that vary along the same dimensions."""
        rank = len(fact.sizes)
        grids = [(1,) * (rank - len(v.grid)) + v.grid for v in inputs]
        shapes = [(1,) * (rank - len(v.shape)) + v.shape for v in inputs]
        grid = np.broadcast_shapes(*grids)
        long = {dim for dim, size in enumerate(grid) if size > 1}
        sources, tied = [], []
        for value, own_grid, shape in zip(inputs, grids, shapes, strict=True):
            if any(size not in (1, fact.sizes[dim]) for dim, size in enumerate(shape)):
                raise _CannotFollowError("combines tensors of shapes that do not fit")
            numbers = np.arange(len(value.ids)).reshape(own_grid)
            sources.append(np.broadcast_to(numbers, grid).ravel())
            has = {dim for dim in long if shape[dim] > 1}
            if has == long:
                tied.append(value.ids[sources[-1]])
            elif has:
                raise _CannotFollowError(
                    "combines tensors that share only some dimensions of channels"
                )
        tensor = ""
        if isinstance(module, nn.PReLU) and module.weight.numel() > 1:
            tensor = f"{self._target(node)}.weight"
            if long != {1} or self.untraceable or self.calls[self._target(node)] > 1:
                raise _CannotFollowError("has its channels elsewhere, or is called more than once")
        for ids in tied[1:]:
            self.ids.unite(tied[0], ids)
        alike = len(inputs) == 1 and not tensor
        copies = inputs[0].copies if alike else np.arange(len(tied[0]))
        result = _Value(self._name(node), tied[0], Layout(fact.sizes, tuple(grid)), copies)
        evaluate = self._evaluate(node, module, inputs)
        self._emit(node, kind, inputs, result, tuple(sources), evaluate=evaluate, tensor=tensor)
        return result

    def _move(self, node: torch.fx.Node, inputs: list[_Value], fact: Any) -> Any:
        """Run the move on the numbers of positions, and add a graph node for each tensor it makes.

        Positions are numbered through all inputs: those of the second follow those of the first.
        """
        if len(inputs) > 1 and function_of(node) not in JOINS:
            raise _CannotFollowError("moves elements by what is in another tensor")
        starts = np.cumsum([0, *(len(v.ids) for v in inputs)])
        numbered = {
            value.name: value.layout.spread(np.arange(start, start + len(value.ids)))
            for value, start in zip(inputs, starts, strict=False)
        }
        values = {
            n: pytree.tree_map_only(_Value, lambda v: numbered[v.name], self.values[n])
            for n in node.all_input_nodes
        }
        try:
            moved = call(node, values, self._module(node))
        except Exception as error:
            raise _CannotFollowError(f"cannot be run on channel numbers ({error})") from error
        results = pytree.tree_leaves(moved)
        shapes = pytree.tree_leaves(fact)
        if not all(r.numel() for r in results):
            raise _CannotFollowError("makes a tensor without elements")
        if [tuple(r.shape) for r in results] != [s.sizes for s in shapes]:
            raise _CannotFollowError("gives another shape on channel numbers")
        every = np.concatenate([v.ids for v in inputs])
        own = [np.unique(v.copies, return_inverse=True)[1] for v in inputs]
        copies = np.concatenate([c + start for c, start in zip(own, starts, strict=False)])
        made = []
        for index, result in enumerate(results):
            table = _collapse(result, torch.from_numpy(copies))
            numbers = table.ravel()
            layout = Layout(tuple(result.shape), tuple(table.shape))
            name = self._name(node) + (f".{index}" if len(results) > 1 else "")
            value = _Value(name, every[numbers], layout, copies[numbers])
            sources = tuple(
                np.where((numbers >= start) & (numbers < start + len(v.ids)), numbers - start, -1)
                for v, start in zip(inputs, starts, strict=False)
            )
            self._emit(node, Kind.MOVE, inputs, value, sources)
            made.append(value)
        return pytree.tree_unflatten(made, pytree.tree_structure(fact))

    def _is_pick(self, node: torch.fx.Node) -> bool:
        """Return whether the node picks one of several tensors, as in `result[0]`."""
        first = node.args[0] if node.args else None
        return (
            node.op == "call_function"
            and getattr(node.target, "__name__", "") in ("getitem", "getattr")
            and isinstance(first, torch.fx.Node)
            and not isinstance(self.values[first], _Value)
        )

    def _opaque(
        self, node: torch.fx.Node, inputs: list[_Value], why: str, kind: Kind = Kind.OPAQUE
    ) -> Any:
        """Freeze what the node reads and makes; all that it makes is one new frozen channel."""
        reason = f"{self._label(node)} {why}"
        for value in inputs:
            self.ids.freeze(value.ids, reason)
        fact, made = self.facts[node], self.ids.new(1)
        self.ids.freeze(made, reason)
        leaves, structure = pytree.tree_flatten(fact)
        values = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Shape):
                name = self._name(node) + (f".{index}" if len(leaves) > 1 else "")
                layout = Layout(leaf.sizes, (1,) * len(leaf.sizes))
                leaf = _Value(name, made, layout, np.zeros(1, np.int64))
                self._emit(node, kind, inputs, leaf, (np.zeros(1, np.int64),) * len(inputs))
            values.append(leaf)
        if not any(isinstance(leaf, Shape) for leaf in leaves):
            self._emit(node, kind, inputs)
        return pytree.tree_unflatten(values, structure)

    # Adding nodes, and looking things up.

    def _emit(
        self,
        node: torch.fx.Node,
        kind: Kind,
        inputs: list[_Value],
        value: _Value | None = None,
        sources: tuple[np.ndarray, ...] = (),
        *,
        evaluate: Callable[..., Tensor] | None = None,
        tensor: str = "",
        tensor_dim: int = 0,
        module: str = "",
    ) -> None:
        """Add a node to the graph, with the ids, layout and sources of `value`, if it makes one."""
        name = value.name if value is not None else self._name(node)
        module = self._target(node) if node.op == "call_module" else module
        if value is not None:
            self.result.ids[name] = value.ids
            self.result.layouts[name] = value.layout
            self.result.sources[name] = sources
        names = tuple(v.name for v in inputs)
        self.result.nodes.append(Node(name, kind, names, module, evaluate, tensor, tensor_dim))

    def _target(self, node: torch.fx.Node) -> str:
        """Return the first name of the module that a node calls, or of the tensor it reads."""
        name = self.prefix + str(node.target)
        if node.op == "call_module":
            called: str = self.first[self.modules[name]]
            return called
        owner, _, key = name.rpartition(".")
        first: str = self.first[self.modules[owner]]
        return f"{first}.{key}".lstrip(".")

    def _label(self, node: torch.fx.Node) -> str:
        """Return a node as users know it: "stem.norm (GroupNorm)", "softmax in block [name]"."""
        if node.op == "call_module":
            return f"{self._target(node)} ({type(self._module(node)).__name__})"
        what, owner = str(getattr(node.target, "__name__", node.target)), owner_of(node)
        if node.op in ("placeholder", "get_attr"):
            return what
        return f"{what}{f' in {owner}' if owner else ''} [{node.name}]"

    def _name(self, node: torch.fx.Node) -> str:
        return self.prefix + node.name

    def _module(self, node: torch.fx.Node) -> nn.Module | None:
        return self.modules[self._target(node)] if node.op == "call_module" else None

    def _tensors(self, node: torch.fx.Node) -> list[_Value]:
        return [v for v in pytree.tree_leaves(self.values[node]) if isinstance(v, _Value)]

    def _plain_arguments(self, node: torch.fx.Node) -> tuple[Any, dict[str, Any]]:
        """Return (args, kwargs) of a call without its first argument, as plain values."""
        args, kwargs = torch.fx.node.map_arg(
            (node.args[1:], dict(node.kwargs)), lambda n: self.values[n]
        )
        return args, kwargs

    def _evaluate(
        self, node: torch.fx.Node, module: nn.Module | None, inputs: list[_Value]
    ) -> Callable[..., Tensor]:
        """Return the node as a function of its tensors, with other arguments as traced."""
        if module is not None:
            return _with_dtype_of(module)
        if node.op == "call_method" and node.target in CASTS:
            return lambda constants: constants
        tensors = [n for n in node.all_input_nodes if self._tensors(n)]
        if any(not isinstance(self.values[n], _Value) for n in tensors):
            raise _CannotFollowError("reads several tensors at once")
        numbers = {n: self.values[n] for n in node.all_input_nodes if n not in tensors}
        which = {n: inputs.index(self.values[n]) for n in tensors}

        def evaluate(*constants: Tensor) -> Tensor:
            given = {n: constants[index] for n, index in which.items()}
            result: Tensor = call(node, numbers | given)
            return result

        return evaluate

    def graph(self) -> ChannelGraph:
        """Finish and return the graph, with equal ids where channels are the same."""
        graph = self.result
        self._freeze_unread()
        for name, module in self.modules.items():
            if isinstance(module, OwnForward) and self.calls[name] and name not in self.made:
                own = "computes with its weight in a way of its own"
                self.spoiled.setdefault(name, _ASKED if name in self.asked else own)
        for name, followed in self.own_norms.items():
            if self.observed_calls[name] not in (0, followed):
                self.spoiled.setdefault(name, "is also called by code that cannot be traced")
        for name in self.spoiled.keys() & self.made.keys():
            for ids in self.made[name]:
                self.ids.freeze(ids, f"{name}, in one of its calls, {self.spoiled[name]}")
        for index, node in enumerate(graph.nodes):
            if node.module in self.spoiled:
                graph.nodes[index] = replace(node, kind=Kind.OPAQUE)
                if node.name in graph.ids:  # the sources that `_opaque` gives its nodes
                    nowhere = np.zeros(len(graph.ids[node.name]), np.int64)
                    graph.sources[node.name] = (nowhere,) * len(node.inputs)
        graph.untraceable = self.untraceable
        root, graph.frozen, graph.reasons = self.ids.resolved()
        graph.ids = {name: root[ids] for name, ids in graph.ids.items()}
        graph.removed, graph.silent = np.zeros_like(graph.frozen), np.zeros_like(graph.frozen)
        graph.origin = self._origin()
        layers = {name: self.modules[name] for name in graph.origin}
        graph.columns = {
            name: np.arange(len(layer.columns))
            for name, layer in layers.items()
            if isinstance(layer, QuantizedLayer)
            and not layer.grouped
            and not isinstance(layer, EMBEDDINGS)
        }
        graph.spoiled = self.spoiled
        return graph

    def _freeze_unread(self) -> None:
        """Freeze what no node reads of the model's tensors: other input sizes may read it."""
        unread = {value.name: np.ones(len(value.ids), bool) for value in self.parameters.values()}
        for node in self.result.nodes:
            sources = self.result.sources.get(node.name, ())
            for name, source in zip(node.inputs, sources, strict=False):
                if name in unread:
                    unread[name][source[source >= 0]] = False
        for name, rest in unread.items():
            if rest.any():
                self.ids.freeze(self.result.ids[name][rest], f"of {name} only a part is read")

    def _origin(self) -> dict[str, np.ndarray]:
        """Return module name → indices of its rows, for every module that may lose some.

        These are all quantised layers and the batch norms that were followed, if not in `read`.
        """
        norms = {node.module for node in self.result.of_kind(Kind.NORM)}
        return {
            name: np.arange(len(module.rows))
            for name, module in self.model.named_modules()
            if isinstance(module, QuantizedLayer)
            or (isinstance(module, PlacedBatchNorm) and name in norms)
            if name not in self.read
        }


def _collapse(numbers: Tensor, copies: Tensor) -> np.ndarray:
    """Narrow to 1 every dimension along which all numbers of positions are those of `copies`."""
    for dim in range(numbers.dim()):
        if numbers.shape[dim] > 1:
            first = numbers.narrow(dim, 0, 1)
            if numbers.stride(dim) == 0:
                numbers = first
    for dim in range(numbers.dim()):
        first = numbers.narrow(dim, 0, 1)
        if numbers.shape[dim] > 1 and bool((copies[numbers] == copies[first]).all()):
            numbers = first
    table: np.ndarray = numbers.contiguous().numpy()
    return table


def _with_dtype_of(module: nn.Module) -> Callable[..., Tensor]:
    """Return a function that calls `module` on constants in the dtype of its parameters."""

    def evaluate(constants: Tensor) -> Tensor:
        own = next(module.parameters(), constants)
        # A copy, as the module may work in place.
        result: Tensor = module(constants.to(own, copy=True))
        return result.to(constants)

    return evaluate
