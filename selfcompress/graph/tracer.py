"""Trace one module with torch.fx while it computes, so that its forward() may branch on sizes.

Every operation is recorded as a node and at once run on the example's values. What a node gave is
its *fact*. Where forward() asks for a number that follows from sizes, it is *told* the number.
"""

import functools
import inspect
import operator
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress.graph.ops import (
    SIZE_ATTRIBUTES,
    WRITES,
    is_in_place,
    reads_sizes,
    sized_by_values,
    taken,
)
from selfcompress.graph.widths_read import Read
from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.embeddings import TiedLinear
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.placing import Placed
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.layers.recurrent import QuantRecurrent
from selfcompress.text import first_line
from selfcompress.undisturbed import CLOSED, copied, kept_modes, leaves_of, without_compile


@dataclass(frozen=True)
class Shape:
    """The sizes of a tensor that a traced operation gave; takes the tensor's place in facts."""

    sizes: tuple[int, ...]


def has_tensors(fact: Any) -> bool:
    """Return whether `fact`, the result of a node, is or contains a tensor."""
    return any(isinstance(leaf, Shape) for leaf in pytree.tree_leaves(fact))


@dataclass(frozen=True)
class _Known:
    """What is known of a proxy on the example.

    Attributes:
        value: what the proxy stands for: a tensor, a number or another object.
        sizes: whether the value, if it is a number, or else the sizes of its tensors depend on
            the sizes of the inputs alone, not on what is in them.
        own: whether the value depends on buffers of the model alone.
    """

    value: Any
    sizes: bool
    own: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the value, or the value itself if it is one."""
        return _tensors(self.value)

    def attribute(self, name: str) -> "_Known":
        """Return what is known of the value's attribute `name`."""
        sizes = self.sizes and (name in SIZE_ATTRIBUTES or not _tensors(self.value))
        return _Known(getattr(self.value, name), sizes, self.own)


def is_ours(module: nn.Module) -> bool:
    """Return whether a module is one of this package's replacements for torch's modules."""
    ours = Placed | QuantAttention | QuantRecurrent | TiedLinear
    return isinstance(module, ours)


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is one of this package's that is not traced into."""
    return is_ours(module) and not isinstance(module, OwnForward)


def has_layers(module: nn.Module) -> bool:
    """Return whether a module is or contains a quantised layer."""
    return any(isinstance(part, QuantizedLayer) for part in module.modules())


class _Countable(torch.fx.Proxy):
    """A proxy that can be converted to a Python number, and that traces `x += y` as in place."""

    tracer: "Tracer"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":  # the trace would lose the assignment
            raise RuntimeError("it sets .data of a tensor")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", setitem_, (self, index, value), {})

    def __int__(self) -> int:
        return self.tracer.take("int", self)  # type: ignore[no-any-return]

    def __index__(self) -> int:
        return self.tracer.take("int", self)  # type: ignore[no-any-return]

    def __float__(self) -> float:
        return self.tracer.take("float", self)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.tracer.take("len", self)  # type: ignore[no-any-return]


class _Attribute(_Countable, torch.fx.proxy.Attribute):
    """A `_Countable` for an attribute of a proxy, such as `x.shape`."""

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(f"it assigns to items of .{self.attr}")


def setitem_(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Assign `tensor[index] = value` and return `tensor`, for later nodes to read this node."""
    tensor[index] = value
    return tensor


def _in_place(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy(
        "call_function", function, (self, other), {}
    )


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    setattr(_Countable, f"__{_name}__", _in_place(getattr(operator, _name)))


_TRACING = ("torch.fx", __name__)  # modules whose stack frames are not the user's code
Place = tuple[str, str, str, int]
"""Where forward() makes a node: (node.op, name of what it calls, file, line)."""

# To be wrapped by torch.fx: torch.ones(n, m) checks its arguments before it asks proxies, whereas
# torch.ones((n, m)) does not.
_MADE_OF_SIZES = (
    torch.ones, torch.zeros, torch.full, torch.empty, torch.rand, torch.randn, torch.is_tensor,
)  # fmt: skip


class Tracer(torch.fx.Tracer):
    """A torch.fx tracer that computes while it traces, so that forward() may branch on sizes.

    Where Python asks for a number that depends on sizes alone (in an `if`, say), it is told the
    example's, and a node `taken` records that the number has to stay the same. It is also told
    numbers computed from the model's buffers alone, and these buffers keep their channels. A
    number that depends on the values of another tensor raises an error. A submodule that cannot be
    traced becomes a leaf: it runs as a whole, and `failed` says why.

    Args:
        args, kwargs: what the module to be traced is called with.
        reads: the list in which `noting_widths` records attributes read from layers. Reads by
            operations that are only computed are deleted from it.
        failed: names of submodules that are not to be traced into → why.

    Attributes:
        facts: node → what it gave, with a `Shape` in place of every tensor.
        failed: names of submodules that are leaves because they cannot be traced → why.
        takers: names of the modules whose forward() was told a number that depends on sizes.
        places: node → what it calls, and the line of code that calls it.
        watched: node → why something outside the trace may read its result.
        entered: name of a layer with a user's own forward() → how often it was traced into.
    """

    proxy_buffer_attributes = True
    shows_parameters = True  # tells `OwnForward` to show the parameter, not the quantised weight

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reads: list[Read],
        failed: dict[str, str],
    ) -> None:
        super().__init__(autowrap_functions=_MADE_OF_SIZES)
        self._autowrap_search.append(torch)
        self.arguments = args, kwargs
        self.reads = reads
        self.facts: dict[torch.fx.Node, Any] = {}
        self.failed = dict(failed)
        self.takers: set[str] = set()
        self.places: dict[torch.fx.Node, Place] = {}
        self.watched: dict[torch.fx.Node, str] = {}
        self.entered: Counter[str] = Counter()
        self.computing = False

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Make a placeholder of every tensor in the arguments of forward(), however nested."""
        args, kwargs = self.arguments
        forward = self.root.forward  # the user may have put another one on the object
        bound = inspect.signature(forward).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            leaves, structure = pytree.tree_flatten(value)
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    unique = name if len(leaves) == 1 else f"{name}_{index}"
                    leaves[index] = self._input(unique, leaf)
                else:
                    leaves[index] = copied(leaf, self.root)
            bound.arguments[name] = pytree.tree_unflatten(leaves, structure)

        def run() -> list[torch.fx.Proxy]:
            return list(_outputs(forward(*bound.args, **bound.kwargs)))

        return run, []

    def _input(self, name: str, tensor: Tensor) -> torch.fx.Proxy:
        proxy = super().create_proxy("placeholder", name, (), {})
        return self._note(proxy, _Known(tensor.clone(), sizes=True))

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any
    ) -> torch.fx.Proxy:
        """Record an operation, compute it on the example, and note what is known of its result.

        Raises:
            RuntimeError: it writes to a tensor in a way that cannot be followed.
        """
        if kind == "call_method" and target in ("reshape_as", "view_as"):
            target, args = "reshape", (args[0], args[1].shape)
        leaves = _leaves((args, kwargs))
        read = [self._known(leaf) for leaf in leaves if _is_proxy(leaf)]
        before = self._versions(leaves)
        value = self._compute(kind, target, *self._values((args, kwargs)))
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        written = {_memory(tensor) for tensor, version in before if tensor._version != version}
        if written and not self._is_followed(proxy.node, args, written):
            raise RuntimeError(f"{proxy.node.name} changes what it is given")
        sizes = all(known.sizes for known in read)
        if _tensors(value):
            others = args[1:] if target is operator.getitem else args
            whole = [t for t in _tensors(self._values((others, kwargs))) if _is_whole(t)]
            sizes &= not sized_by_values(proxy.node, whole) and target not in self.failed
        elif any(_tensors(known.value) for known in read):
            sizes &= reads_sizes(proxy.node)
        own = bool(read) and all(known.own for known in read)
        if kind == "get_attr":
            own = not isinstance(value, nn.Parameter)
        self.places[proxy.node] = kind, str(getattr(target, "__name__", target)), *_line_of_user()
        return self._note(proxy, _Known(value, sizes, own))

    def _versions(self, leaves: list[Any]) -> list[tuple[Tensor, int]]:
        """Return (tensor, version) for every argument of an operation that the trace has made."""
        proxies = [leaf for leaf in leaves if _is_proxy(leaf)]
        made = [p for p in proxies if isinstance(p, _Attribute) or p.node.op != "get_attr"]
        # Left out are parts of ordinary tensors, which the trace takes for constants.
        ordinary = {_memory(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        return [
            (tensor, tensor._version)
            for proxy in made
            for tensor in self._known(proxy).tensors
            if not tensor.is_inference() and _memory(tensor) not in ordinary
        ]

    def _is_followed(self, node: torch.fx.Node, args: Any, written: set[int]) -> bool:
        """Return whether an operation that has written to memory wrote to its first operand's.

        For a leaf that could not be traced this is also recorded in `node.meta`, as neither its
        name nor an attribute tells.
        """
        if not args or not _is_proxy(args[0]):
            return False
        if node.target in self.failed:
            own = {_memory(tensor) for tensor in self._known(args[0]).tensors}
            node.meta[WRITES] = written <= own
            return written <= own
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return is_in_place(node, module)

    def create_node(self, kind: str, target: Any, *more: Any, **options: Any) -> torch.fx.Node:
        node = super().create_node(kind, target, *more, **options)
        if kind == "get_attr":  # a buffer or constant passed as an argument gets no proxy
            self.facts[node] = Shape(tuple(self._attribute(target).shape))
        return node

    def _attribute(self, name: str) -> Any:
        with self._only_computing():
            return functools.reduce(getattr, name.split("."), self.root)

    def _compute(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "get_attr":
            return self._attribute(target)
        with self._only_computing():
            if kind == "call_function":
                return target(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            module = self.root.get_submodule(target)
            with kept_modes(module):
                return module.eval()(*args, **kwargs)

    @contextmanager
    def _only_computing(self) -> Iterator[None]:
        """Inside, nothing is traced, and what is read of layers is not recorded in `reads`."""
        before, self.computing, reads = self.computing, True, len(self.reads)
        try:
            yield
        finally:
            self.computing = before
            del self.reads[reads:]

    def _note(self, proxy: torch.fx.Proxy, known: _Known) -> torch.fx.Proxy:
        vars(proxy)["_known"] = known
        shapes = pytree.tree_map_only(Tensor, lambda t: Shape(tuple(t.shape)), known.value)
        self.facts[proxy.node] = shapes
        return proxy

    def _known(self, proxy: torch.fx.Proxy) -> _Known:
        if isinstance(proxy, _Attribute):
            return self._known(proxy.root).attribute(proxy.attr)
        known: _Known = vars(proxy)["_known"]
        return known

    def _values(self, tree: Any) -> Any:
        """Return the arguments of a call with every proxy replaced by its value."""

        def value(leaf: Any) -> Any:
            return self._known(leaf).value if _is_proxy(leaf) else leaf

        return torch.fx.node.map_aggregate(tree, value)

    def take(self, kind: str, proxy: torch.fx.Proxy) -> Any:
        """Return the number, flag or length that a proxy has, and record that forward() knows it.

        Args:
            kind: "bool", "int", "float" or "len".

        Raises:
            RuntimeError: it depends on the values of a tensor that is not a buffer.
        """
        known = self._known(proxy)
        if known.own:
            self._hold_buffers(proxy.node)
            return taken(known.value, kind)
        if not known.sizes or (kind != "len" and _tensors(known.value)):
            raise RuntimeError("its way depends on the values of a tensor")
        made = self.create_proxy("call_function", taken, (proxy, kind), {})
        self.takers.add(owner_of(made.node))
        return self._known(made).value

    def _hold_buffers(self, node: torch.fx.Node) -> None:
        """Watch the buffers that a number was computed from, so that they keep their channels."""
        pending, seen = [node], {node}
        while pending:
            node = pending.pop()
            pending += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
            if node.op == "get_attr":
                self.watched[node] = "forward() reads numbers out of it"

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        return self.take("bool", obj)  # type: ignore[no-any-return]

    def iter(self, obj: torch.fx.Proxy) -> Iterator[torch.fx.Proxy]:
        return iter([operator.getitem(obj, index) for index in range(self.take("len", obj))])

    def watch(self, values: Any, why: str) -> None:
        """Record that code outside of the trace may read the proxies in `values`."""
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, torch.fx.Proxy) and leaf.tracer is self:
                self.watched[leaf.node] = why

    def _watch_hooked(self, m: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if m._forward_hooks or m._forward_pre_hooks:
            why = f"hooks on {self.path_of_module(m)} see it"
            self.watch((args, kwargs, result), why)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Countable(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        # A buffer that is a single number is a counter, or a flag that forward() branches on.
        number = isinstance(attr_val, Tensor) and not attr_val.dim()
        if self.computing or (number and not isinstance(attr_val, nn.Parameter)):
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_leaf(m) or module_qualified_name in self.failed:
            return True
        # torch.fx takes torch's own containers (its transformers) for leaves: these hold layers.
        return super().is_leaf_module(m, module_qualified_name) and not has_layers(m)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # A module outside of the model, such as an activation in a table, has no name: trace it.
        if self.computing or m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        inner = without_compile(m)
        if inner is not m:  # m is what torch.compile made of a submodule: trace the submodule
            result = inner(*args, **kwargs)
            self._watch_hooked(m, args, kwargs, result)
            return result
        before, stack = len(self.graph.nodes), dict(self.module_stack)
        entered = self.entered.copy()
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._watch_hooked(m, args, kwargs, result)
            name = self.path_of_module(m)
            if isinstance(m, OwnForward) and name not in self.failed:
                self.entered[name] += 1
            return result
        except Exception as error:  # whatever the user's forward() does under the tracer
            name = self.path_of_module(m)
            if self.is_leaf_module(m, name):
                raise
            self.failed[name] = first_line(error)
            self.entered = entered
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return super().call_module(m, forward, args, kwargs)


def _memory(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, which its views share."""
    return tensor.untyped_storage().data_ptr()


def _line_of_user() -> tuple[str, int]:
    """Return the file and line of the innermost stack frame that is not part of the tracing."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_TRACING):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def owner_of(node: torch.fx.Node) -> str:
    """Return the name of the module whose forward() made a node; "" is the traced one itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _leaves(tree: Any) -> list[Any]:
    """Return the leaves of `tree` as torch.fx sees them, including the bounds of slices."""
    found: list[Any] = []
    torch.fx.node.map_aggregate(tree, found.append)
    return found


def _tensors(value: Any) -> list[Tensor]:
    """Return all tensors in `value`, be they in containers known to pytree or in slices."""
    leaves = pytree.tree_leaves(_leaves(value))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor holds whole numbers or flags."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_proxy(value: Any) -> bool:
    return isinstance(value, torch.fx.Proxy)


def _outputs(returned: Any) -> Iterator[torch.fx.Proxy]:
    """Yield the proxies in what a forward() returned, also from objects such as dataclasses.

    Raises:
        RuntimeError: there is an object in it that cannot be searched for tensors.
    """
    for leaf in leaves_of(returned):
        if _is_proxy(leaf):
            if leaf.node.op != "get_attr":  # a parameter is no output: it may be cut
                yield leaf
        elif isinstance(leaf, type) or not isinstance(leaf, CLOSED):
            raise RuntimeError(f"it returns a {type(leaf).__name__}")
