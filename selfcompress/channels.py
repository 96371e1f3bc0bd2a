"""The channel graph: which rows, columns and norm entries carry the same channel of a network.

The model is traced once with torch.fx, quantised layers and batch norms as leaves. Every position
on the channel axis (dim 1) of every tensor gets a channel id; operations say how ids travel: an
addition makes the ids of its operands equal, a concatenation appends them, flattening repeats
them, a layer or a norm makes new ones. So a channel is the set of all positions with its id, in
whatever tensors, and removing it means removing all of them. What is not understood freezes the
channels it touches (fails closed), and `reasons` says which node did so.

Surgery changes how many channels there are, never how operations are connected, so the graph is
not traced again: removed ids are struck from it.
"""

import operator
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from numbers import Number
from typing import Any

import numpy as np
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

from selfcompress.layers import PlacedBatchNorm2d, QuantConv2d, QuantizedLayer, QuantLinear
from selfcompress.modes import kept_modes


class Kind(Enum):
    """How channel ids travel through an operation, and what it does to a constant channel."""

    INPUT = auto()  # new ids, frozen
    LAYER = auto()  # reads its input channels, makes new ones; also an unquantised layer
    NORM = auto()  # one new channel per channel read
    ELEMENTWISE = auto()  # same ids; a constant becomes another constant
    SPATIAL = auto()  # same ids; zero stays zero (pooling, dropout)
    ADD = auto()  # ids of the operands become equal
    CAT = auto()  # ids appended
    FLATTEN = auto()  # ids repeated, once per pixel
    OPAQUE = auto()  # not understood: freezes what it reads, makes frozen ids
    OUTPUT = auto()  # freezes what it reads


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        inputs: names of the operations whose tensors it reads.
        module: qualified name of the module that is called; empty for functions.
        pixels: positions per sample and channel in its output, for MACs.
        evaluate: what an ELEMENTWISE operation does to a (1, channels) tensor of constants.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    module: str = ""
    pixels: int = 1
    evaluate: Callable[[Tensor], Tensor] | None = None


_ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU,
    nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Identity,
)  # fmt: skip
_SPATIAL_MODULES: tuple[type[nn.Module], ...] = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.Dropout,
    nn.Dropout2d,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS: set[Any] = {
    F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.mish, F.elu, F.hardtanh, F.hardswish,
    torch.relu, torch.relu_, torch.tanh, torch.sigmoid, operator.neg,
}  # fmt: skip
_SPATIAL_FUNCTIONS: set[Any] = {
    F.max_pool2d, F.avg_pool2d, F.adaptive_max_pool2d, F.adaptive_avg_pool2d, F.dropout,
    F.dropout2d, torch.max_pool2d,
}  # fmt: skip
_ADD: set[Any] = {operator.add, operator.iadd, torch.add}
_SCALE: set[Any] = {operator.mul, operator.imul, torch.mul, operator.truediv, torch.div}
# Methods of a tensor that mean the same as a function above.
_METHODS: dict[str, Any] = {
    "relu": torch.relu, "relu_": torch.relu_, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "add": torch.add, "add_": torch.add, "mul": torch.mul, "mul_": torch.mul, "div": torch.div,
    "flatten": torch.flatten,
}  # fmt: skip


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, QuantizedLayer | PlacedBatchNorm2d)
        return ours or super().is_leaf_module(m, module_qualified_name)


@dataclass
class ChannelGraph:
    """Operations in the order they run, and the channel ids on the tensor each one makes.

    Attributes:
        nodes: in order of execution; empty where the model could not be traced.
        ids: node name → (channels,) ids of its output, as they are now.
        frozen: (number of ids at the start,) bool: never to be removed.
        removed: the same, bool: already removed.
        reasons: frozen id → the name of the node that froze it and why.
        origin: name of each module that may lose rows → (rows now,) the number each of them had
            at the start.
    """

    nodes: list[Node] = field(default_factory=list)
    ids: dict[str, np.ndarray] = field(default_factory=dict)
    frozen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    removed: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    reasons: dict[int, str] = field(default_factory=dict)
    origin: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def trace(cls, model: nn.Module, example_input: Tensor) -> "ChannelGraph":
        """Trace `model`, whose layers are quantised already; leaves its modes and buffers alone.

        A model that torch.fx cannot trace gives an empty graph and a warning: its channels can
        still lose all their bits, but nothing is removed.
        """
        try:
            traced = _trace_with_shapes(model, example_input)
        except Exception as error:  # whatever the user's forward() does under the tracer
            warnings.warn(
                f"no channel of {type(model).__name__} will be removed: torch.fx cannot trace it "
                f"({(str(error).splitlines() or [repr(error)])[0]})",
                stacklevel=3,
            )
            return cls()
        return _Builder(model).build(traced)

    def of_kind(self, kind: Kind) -> list[Node]:
        """The nodes of one kind, in order of execution."""
        return [node for node in self.nodes if node.kind is kind]

    def connected(self, without: set[str]) -> bool:
        """Whether the output still depends on the input when these modules' outputs don't."""
        if not self.nodes:
            return not without
        reached: set[str] = set()
        for node in self.nodes:
            if node.kind is Kind.INPUT or (
                node.module not in without and any(i in reached for i in node.inputs)
            ):
                reached.add(node.name)
        outputs = self.of_kind(Kind.OUTPUT)
        return all(node.name in reached for node in outputs)

    def remove(self, removed: np.ndarray) -> None:
        """Strike ids, given as (number of ids,) bool, from every tensor."""
        self.removed |= removed
        self.ids = {name: ids[~removed[ids]] for name, ids in self.ids.items()}


def _trace_with_shapes(model: nn.Module, example_input: Tensor) -> torch.fx.GraphModule:
    """Trace in the mode the model trains in; run once in eval mode, to learn the shapes."""
    devices = [example_input.device] if example_input.is_cuda else []
    with kept_modes(model), torch.no_grad(), torch.random.fork_rng(devices):
        traced = torch.fx.GraphModule(model.train(), _Tracer().trace(model))
        model.eval()
        traced.eval()
        ShapeProp(traced).propagate(example_input)
    return traced


class _Builder:
    """Walks a traced model once and assigns the ids."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parent: list[int] = []  # union-find over ids
        self.freezes: list[tuple[np.ndarray, str]] = []
        self.ids: dict[str, np.ndarray] = {}
        self.nodes: list[Node] = []
        owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        self.shared = {key for key, count in owners.items() if count > 1}

    def build(self, traced: torch.fx.GraphModule) -> ChannelGraph:
        nodes = list(traced.graph.nodes)
        calls = Counter(str(n.target) for n in nodes if n.op == "call_module")
        self.repeated = {name for name, count in calls.items() if count > 1}
        # A layer whose parameters are read from outside of it must keep them as they are.
        self.read = {str(n.target).rpartition(".")[0] for n in nodes if n.op == "get_attr"}
        for node in nodes:
            self._visit(node)
        return self._resolve()

    def _visit(self, node: torch.fx.Node) -> None:
        traced_shape = _shape(node)
        inputs = [i for i in node.all_input_nodes if i.name in self.ids]
        names = tuple(i.name for i in inputs)
        if node.op == "output":
            self.nodes.append(Node(node.name, Kind.OUTPUT, names))
            for i in inputs:
                self._freeze(i.name, "it is an output of the model")
            return
        kind, evaluate, why = self._classify(node, inputs, traced_shape)
        module = str(node.target) if node.op == "call_module" else ""
        shape = tuple(traced_shape or ())
        if len(shape) < 2:
            # Not a tensor with channels: what it read is frozen, and so is what reads it.
            kind, why, shape = Kind.OPAQUE, why or "makes no tensor with channels", (1, 0)
        if kind is Kind.CAT:
            names = tuple(_cat_names(node))
        linear = isinstance(self.modules.get(module), nn.Linear)
        pixels = int(np.prod(shape[1:-1] if linear else shape[2:]))
        self.nodes.append(Node(node.name, kind, names, module, pixels, evaluate))
        first = self.ids[names[0]] if names else np.zeros(0, np.int64)
        match kind:
            case Kind.ELEMENTWISE | Kind.SPATIAL:
                self.ids[node.name] = first
            case Kind.ADD:
                for name in names[1:]:
                    self._unite(first, self.ids[name])
                self.ids[node.name] = first
            case Kind.CAT:
                self.ids[node.name] = np.concatenate([self.ids[name] for name in names])
            case Kind.FLATTEN:
                self.ids[node.name] = np.repeat(first, shape[1] // len(first))
            case _:
                self.ids[node.name] = self._new(shape[1])
        if kind in (Kind.INPUT, Kind.OPAQUE):
            reason = "it is the model's input" if kind is Kind.INPUT else why
            for name in (*names, node.name):
                self._freeze(name, f"{node.name} ({_what(node)}) {reason}")

    def _classify(
        self, node: torch.fx.Node, inputs: list[torch.fx.Node], shape: torch.Size | None
    ) -> tuple[Kind, Callable[[Tensor], Tensor] | None, str]:
        """The node's kind, what it does to constants, and why it is OPAQUE if it is."""
        if node.op == "placeholder":
            return Kind.INPUT, None, ""
        if node.op == "call_module":
            return self._classify_module(node, inputs)
        if node.op not in ("call_function", "call_method"):
            return Kind.OPAQUE, None, "is a tensor of the model"
        target = _METHODS.get(str(node.target)) if node.op == "call_method" else node.target
        like_input = [shape == _shape(i) for i in inputs]
        if target in _ELEMENTWISE_FUNCTIONS and like_input == [True]:
            return Kind.ELEMENTWISE, _evaluate_call(node, target), ""
        if target in _SPATIAL_FUNCTIONS and len(inputs) == 1 and _same_channels(node, inputs[0]):
            return Kind.SPATIAL, None, ""
        if target in _ADD | _SCALE and like_input == [True] and _only_with_number(node):
            return Kind.ELEMENTWISE, _evaluate_call(node, target), ""
        if target in _ADD and like_input == [True, True] and not node.kwargs:
            return Kind.ADD, None, ""
        if (
            target is torch.cat
            and _cat_axis(node) == 1
            and set(_cat_names(node)) == {i.name for i in inputs}
        ):
            return Kind.CAT, None, ""
        if target is torch.flatten and (node.args[1:], node.kwargs) in (
            ((1,), {}),
            ((), {"start_dim": 1}),
        ):
            return Kind.FLATTEN, None, ""
        return Kind.OPAQUE, None, "is not an operation that channels can be followed through"

    def _classify_module(
        self, node: torch.fx.Node, inputs: list[torch.fx.Node]
    ) -> tuple[Kind, Callable[[Tensor], Tensor] | None, str]:
        name = str(node.target)
        module = self.modules[name]
        in_shape = _shape(inputs[0]) if len(inputs) == 1 else None
        if in_shape is None or len(in_shape) < 2:
            return Kind.OPAQUE, None, "reads something other than one tensor with channels"
        if self._entangled(name, module):
            return Kind.OPAQUE, None, "has parameters that are used elsewhere too"
        if name in self.repeated and (module._parameters or module._buffers):
            return Kind.OPAQUE, None, "is called more than once"
        if isinstance(module, QuantConv2d) or type(module) is nn.Conv2d:
            if module.groups == 1 and len(in_shape) == 4:
                return Kind.LAYER, None, ""
            return Kind.OPAQUE, None, "is a grouped or unbatched convolution"
        if isinstance(module, QuantLinear) or type(module) is nn.Linear:
            if len(in_shape) == 2:
                return Kind.LAYER, None, ""
            return Kind.OPAQUE, None, "has its channels on another axis than dim 1"
        if isinstance(module, PlacedBatchNorm2d):
            return Kind.NORM, None, ""
        if type(module) in _ELEMENTWISE_MODULES and _same_channels(node, inputs[0]):
            return Kind.ELEMENTWISE, module, ""
        if type(module) in _SPATIAL_MODULES and _same_channels(node, inputs[0]):
            return Kind.SPATIAL, None, ""
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return Kind.FLATTEN, None, ""
        return Kind.OPAQUE, None, "is not a module that channels can be followed through"

    def _entangled(self, name: str, module: nn.Module) -> bool:
        return name in self.read or any(id(p) in self.shared for p in module.parameters(False))

    def _origin(self) -> dict[str, np.ndarray]:
        """Rows can go from every quantised layer but a grouped one: dead rows leave gaps there."""
        norms = {node.module for node in self.nodes if node.kind is Kind.NORM}
        return {
            name: np.arange(len(module.rows))
            for name, module in self.modules.items()
            if (isinstance(module, QuantizedLayer) and getattr(module, "groups", 1) == 1)
            or (isinstance(module, PlacedBatchNorm2d) and name in norms)
            if not self._entangled(name, module)
        }

    def _new(self, count: int) -> np.ndarray:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def _find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def _unite(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            self.parent[self._find(j)] = self._find(i)

    def _freeze(self, name: str, why: str) -> None:
        self.freezes.append((self.ids[name], why))

    def _resolve(self) -> ChannelGraph:
        root = np.array([self._find(i) for i in range(len(self.parent))], np.int64)
        frozen = np.zeros(len(root), bool)
        reasons: dict[int, str] = {}
        for touched, why in self.freezes:
            frozen[root[touched]] = True
            for i in root[touched].tolist():
                reasons.setdefault(i, why)
        ids = {name: root[ids] for name, ids in self.ids.items()}
        removed = np.zeros(len(root), bool)
        return ChannelGraph(self.nodes, ids, frozen, removed, reasons, self._origin())


def _shape(node: torch.fx.Node) -> torch.Size | None:
    meta = node.meta.get("tensor_meta")
    return getattr(meta, "shape", None)


def _what(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _same_channels(node: torch.fx.Node, other: torch.fx.Node) -> bool:
    mine, its = _shape(node), _shape(other)
    return mine is not None and its is not None and mine[:2] == its[:2] and len(mine) == len(its)


def _cat_axis(node: torch.fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _cat_names(node: torch.fx.Node) -> list[str]:
    parts = node.args[0] if node.args else ()
    listed = parts if isinstance(parts, list | tuple) else ()
    return [str(part) for part in listed]


def _only_with_number(node: torch.fx.Node) -> bool:
    others = [a for a in node.args if not isinstance(a, torch.fx.Node)]
    return not node.kwargs and len(node.args) == 2 and all(isinstance(a, Number) for a in others)


def _evaluate_call(node: torch.fx.Node, function: Any) -> Callable[[Tensor], Tensor]:
    """`node`'s function of one tensor, with its other arguments as they were traced."""

    def evaluate(value: Tensor) -> Tensor:
        args = [value if isinstance(a, torch.fx.Node) else a for a in node.args]
        result: Tensor = function(*args, **node.kwargs)
        return result

    return evaluate
