"""Trace a model with torch.fx, in parts where it cannot be traced whole, and learn all its shapes.

Quantised layers and batch norms are leaves. A submodule whose forward() cannot be traced becomes
a leaf too, and the modules inside of it are traced on their own; so does the model itself. What
runs is always the user's own eager module: the traces are only read.
"""

import copy
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from selfcompress.attention import QuantAttention
from selfcompress.layers import PlacedBatchNorm, QuantizedLayer
from selfcompress.look import (
    Inputs,
    device_of,
    is_torchs,
    kept_modes,
    positional,
    seed_everything,
    undisturbed,
    without_compile,
)
from selfcompress.observe import Observed, zeros_like_observed
from selfcompress.ops import SIZE_ATTRIBUTES, reads_sizes, sized_by_values, taken
from selfcompress.text import first_line
from selfcompress.widths import Read, held, kept_whole, noting_widths


@dataclass(frozen=True)
class Shape:
    """Stands for a tensor of a traced run."""

    sizes: tuple[int, ...]


@dataclass
class Part:
    """One module that was traced as a whole, with all that it calls.

    Attributes:
        name: the module, "" for the model.
        nodes: its operations in order; `facts[node]` is what each gave on the example, with a
            `Shape` in place of every tensor.
        inside: names of the submodules that are leaves because they cannot be traced.
        watched: operation → who else may read what it gave.
        read: names of the batch norms whose width or statistics its forward() reads, and of
            convolutions whose groups it counts.
    """

    name: str
    nodes: list[torch.fx.Node]
    facts: dict[torch.fx.Node, Any]
    inside: list[str]
    watched: dict[torch.fx.Node, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    @property
    def prefix(self) -> str:
        """What comes before the names of its submodules: "" or "features."."""
        return f"{self.name}." if self.name else ""


@dataclass
class Trace:
    """All parts of a model, and what could not be traced.

    Attributes:
        untraceable: name of a module whose own forward() cannot be traced ("" is the model) → why.
        miscounted: names of modules that run more often than the part they are in says, called by
            something that cannot be traced.
    """

    parts: list[Part] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)
    miscounted: set[str] = field(default_factory=set)


def trace(model: nn.Module, example_input: Inputs, observed: Observed) -> Trace:
    """Trace `model`, whose layers are quantised already; leaves its modes and buffers alone.

    The way is that of training mode, followed once in eval mode to learn the shapes.

    Args:
        observed: a run of the model on `example_input`.
    """
    result = Trace()
    pending = [""]
    with undisturbed(model, example_input), _without_fast_path():
        while pending:
            name = pending.pop()
            module = model.get_submodule(name)
            if name and (_is_leaf(module) or not _has_layers(module)):
                continue  # nothing inside to follow; of the float baseline the MACs are wanted
            if name and name not in observed.arguments:  # a ModuleList, say
                pending += _children(name, module)
                continue
            args, kwargs = positional(example_input), {}
            if name:
                where = device_of(example_input)
                args, kwargs = zeros_like_observed(observed.arguments[name], where)
            seed_everything(device_of(example_input))
            try:
                if name in observed.varied:
                    raise RuntimeError("it is called with different kinds of arguments")
                part = _trace_part(name, module, args, kwargs, result.untraceable)
                if name in observed.resized and any(n.target is taken for n in part.nodes):
                    raise RuntimeError("it goes by sizes, and is called with several")
                result.miscounted |= _compare(part, model, observed.counts)
            except Exception as error:  # whatever the user's forward() does under the tracer
                result.untraceable[name] = first_line(error)
                pending += _children(name, module)
                continue
            result.parts.append(part)
            for failed in part.inside:
                pending += _children(failed, model.get_submodule(failed))
    return result


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Inside, torch's transformer layers go the way they train by; which other, asks for values."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _children(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer | PlacedBatchNorm | QuantAttention)


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(part, QuantizedLayer) for part in module.modules())


class _Countable(torch.fx.Proxy):
    """A proxy that Python may ask for its number, and that can tell `x += y` from `x = x + y`."""

    tracer: "_Tracer"

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)

    def __int__(self) -> int:
        return self.tracer.take("int", self)  # type: ignore[no-any-return]

    def __index__(self) -> int:
        return self.tracer.take("int", self)  # type: ignore[no-any-return]

    def __float__(self) -> float:
        return self.tracer.take("float", self)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.tracer.take("len", self)  # type: ignore[no-any-return]


class _Attribute(_Countable, torch.fx.proxy.Attribute):
    """The same, for `x.shape` and its like."""


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


# torch.ones(n, m) looks at its arguments before it asks proxies, torch.ones((n, m)) does not.
_MADE_OF_SIZES = (torch.ones, torch.zeros, torch.full, torch.empty, torch.rand, torch.randn)


class _Tracer(torch.fx.Tracer):
    """Computes while it traces, so that forward() may go by the sizes of the example.

    Where Python asks for a number that depends on sizes alone (in an `if`, say), it is told that of
    the example, and a node `taken` notes that the number has to stay the same. What depends on the
    values of a tensor it is not told. A submodule that fails to be traced becomes a leaf, which
    runs, and it is remembered why.

    Args:
        args, kwargs: what the module to be traced is called with.
        reads: what is read of layers, to which those that compute are to add nothing.

    Attributes:
        facts: what each node gave, with a `Shape` in place of every tensor.
        failed: names of such submodules → why.
        watched: operation → who else may read what it gave.
    """

    proxy_buffer_attributes = True

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], reads: list[Read]) -> None:
        super().__init__(autowrap_functions=_MADE_OF_SIZES)
        self._autowrap_search.append(torch)
        self.arguments = args, kwargs
        self.reads = reads
        self.facts: dict[torch.fx.Node, Any] = {}
        self.failed: dict[str, str] = {}
        self.watched: dict[torch.fx.Node, str] = {}
        self.computing = False

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """All tensors that forward() is given are inputs, in whatever they come."""
        args, kwargs = self.arguments
        forward = self.root.forward  # the user may have put another one on the object
        bound = inspect.signature(forward).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            leaves, structure = pytree.tree_flatten(value)
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    unique = name if len(leaves) == 1 else f"{name}_{index}"
                    leaves[index] = self._input(unique, leaf)
                elif not isinstance(leaf, nn.Module):  # a cache, say, which forward() changes
                    leaves[index] = copy.deepcopy(leaf)
            bound.arguments[name] = pytree.tree_unflatten(leaves, structure)

        def run() -> list[torch.fx.Proxy]:
            return list(_outputs(forward(*bound.args, **bound.kwargs)))

        return run, []

    def _input(self, name: str, tensor: Tensor) -> torch.fx.Proxy:
        proxy = super().create_proxy("placeholder", name, (), {})
        self._note(proxy, tensor.clone(), sizes=True)
        return proxy

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any
    ) -> torch.fx.Proxy:
        values = torch.fx.node.map_aggregate((args, kwargs), self._value)  # type: ignore[arg-type]
        value = self._compute(kind, target, *values)
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_proxy(leaf)]
        tensors = _tensors([self._value(leaf) for leaf in read])
        sizes = all(self._of_sizes(leaf) for leaf in read)
        if _tensors(value):
            flags = any(tensor.dtype == torch.bool for tensor in tensors)
            sizes &= not sized_by_values(proxy.node, flags) and target not in self.failed
        elif tensors:
            sizes &= reads_sizes(proxy.node)
        self._note(proxy, value, sizes)
        return proxy

    def create_node(self, kind: str, target: Any, *more: Any, **options: Any) -> torch.fx.Node:
        node = super().create_node(kind, target, *more, **options)
        if kind == "get_attr":  # of a buffer or a constant no proxy is made
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
        before, self.computing, reads = self.computing, True, len(self.reads)
        try:
            yield
        finally:
            self.computing = before
            del self.reads[reads:]

    def _note(self, proxy: torch.fx.Proxy, value: Any, sizes: bool) -> None:
        """Note what a proxy stands for on the example.

        Args:
            sizes: whether that number, or the sizes of that tensor, are the same for all values of
                inputs of these sizes.
        """
        vars(proxy).update(_held=value, _sizes=sizes)
        shapes = pytree.tree_map_only(Tensor, lambda t: Shape(tuple(t.shape)), value)
        self.facts[proxy.node] = shapes

    def _value(self, leaf: Any) -> Any:
        if not _is_proxy(leaf):
            return leaf
        if isinstance(leaf, _Attribute):
            return getattr(self._value(leaf.root), leaf.attr)
        return vars(leaf)["_held"]

    def _of_sizes(self, proxy: torch.fx.Proxy) -> bool:
        """See `_note`."""
        if isinstance(proxy, _Attribute):
            tensors = bool(_tensors(self._value(proxy.root)))
            return self._of_sizes(proxy.root) and (not tensors or proxy.attr in SIZE_ATTRIBUTES)
        return bool(vars(proxy)["_sizes"])

    def take(self, kind: str, proxy: torch.fx.Proxy) -> Any:
        """The number, or length, of a proxy, which forward() may go by from now on."""
        tensors = bool(_tensors(self._value(proxy)))
        if not self._of_sizes(proxy) or (tensors and kind != "len"):
            raise RuntimeError("its way depends on the values of a tensor")
        made = self.create_proxy("call_function", taken, (proxy, kind), {})
        return self._value(made)

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        return self.take("bool", obj)  # type: ignore[no-any-return]

    def iter(self, obj: torch.fx.Proxy) -> Iterator[torch.fx.Proxy]:
        return iter([operator.getitem(obj, index) for index in range(self.take("len", obj))])

    def watch(self, values: Any, why: str) -> None:
        """Note that somebody outside of the trace sees `values`."""
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
        # A buffer that is a single number counts something, or is a flag that forward() goes by.
        number = isinstance(attr_val, Tensor) and not attr_val.dim()
        if self.computing or (number and not isinstance(attr_val, nn.Parameter)):
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_leaf(m) or module_qualified_name in self.failed:
            return True
        # torch's own containers (its transformers) are leaves to torch.fx, layers and all.
        return super().is_leaf_module(m, module_qualified_name) and not _has_layers(m)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # What is no part of the model, such as an activation out of a table, is traced into.
        if self.computing or m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        inner = without_compile(m)
        if inner is not m:  # what torch.compile made of a submodule: trace that submodule
            result = inner(*args, **kwargs)
            self._watch_hooked(m, args, kwargs, result)
            return result
        before, stack = len(self.graph.nodes), dict(self.module_stack)
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._watch_hooked(m, args, kwargs, result)
            return result
        except Exception as error:  # whatever the user's forward() does under the tracer
            name = self.path_of_module(m)
            if self.is_leaf_module(m, name):
                raise
            self.failed[name] = first_line(error)
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return super().call_module(m, forward, args, kwargs)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_proxy(value: Any) -> bool:
    return isinstance(value, torch.fx.Proxy)


_PLAIN = (int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.device)


def _outputs(returned: Any, depth: int = 4) -> Iterator[torch.fx.Proxy]:
    """All tensors in what a forward() returns, those of objects such as dataclasses too."""
    for leaf in pytree.tree_leaves(returned):
        if _is_proxy(leaf):
            if leaf.node.op != "get_attr":  # a parameter is cut, and no output
                yield leaf
        elif not isinstance(leaf, (*_PLAIN, nn.Module)):
            if not hasattr(leaf, "__dict__") or not depth:
                raise RuntimeError(f"it returns a {type(leaf).__name__}")
            yield from _outputs(list(vars(leaf).values()), depth - 1)


def _trace_part(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    untraceable: dict[str, str],
) -> Part:
    module.train()
    with noting_widths(module) as reads, _of_any_rank(module):
        tracer = _Tracer(args, kwargs, reads)
        nodes = list(tracer.trace(module).nodes)
    tracer.watched |= held(reads, nodes, module)
    for owner, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            if not is_torchs(key):
                tracer.watch(value, f"it is kept as {owner}.{key}".replace(" .", " "))
    module.eval()
    with noting_widths(module) as in_evaluation, _of_any_rank(module):
        evaluated = _Tracer(args, kwargs, in_evaluation)
        evaluated.trace(module)
    extra = _calls(evaluated) - _calls(tracer)
    if extra:
        raise RuntimeError(
            f"in evaluation it calls {next(iter(extra))[1]}, in training it does not"
        )
    asked, trained = (Counter((r.layer, r.name) for r in rs) for rs in (in_evaluation, reads))
    if asked - trained:
        raise RuntimeError(
            "in evaluation it asks for the width of a layer, in training it does not"
        )
    prefix = f"{name}." if name else ""
    untraceable |= {prefix + failed: why for failed, why in tracer.failed.items()}
    inside = [prefix + failed for failed in tracer.failed]
    read = {prefix + layer for layer in kept_whole(reads, module)}
    return Part(name, nodes, tracer.facts, inside, tracer.watched, read)


@contextmanager
def _of_any_rank(module: nn.Module) -> Iterator[None]:
    """Inside, users' own batch norms do not ask how many dimensions their input has."""
    own = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and not _is_leaf(norm)]
    try:
        for norm in own:
            vars(norm)["_check_input_dim"] = lambda input: None
        yield
    finally:
        for norm in own:
            del vars(norm)["_check_input_dim"]


def _calls(tracer: _Tracer) -> Counter[tuple[str, str]]:
    """How often a trace calls which function, method or module that gives tensors."""
    nodes = [
        node
        for node in tracer.graph.nodes
        if node.op.startswith("call_")
        and any(isinstance(leaf, Shape) for leaf in pytree.tree_leaves(tracer.facts[node]))
    ]
    return Counter((n.op, str(getattr(n.target, "__name__", n.target))) for n in nodes)


def _compare(part: Part, model: nn.Module, real: Counter[str]) -> set[str]:
    """Compare how often a part's layers run with how often its trace says they do.

    Returns:
        The layers that somebody else calls as well.

    Raises:
        RuntimeError: the module goes another way than its trace.
    """
    first = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    traced = Counter(
        first[modules[part.prefix + str(n.target)]] for n in part.nodes if n.op == "call_module"
    )
    hidden = {
        first[m] for name in part.inside for m in model.get_submodule(name).modules() if m in first
    }
    runs = real[part.name] if part.name else 1
    more = set()
    for module in model.get_submodule(part.name).modules():
        name = first[module]
        # A layer of training alone, such as an auxiliary head, does not run here at all.
        if not _is_leaf(module) or real[name] in (0, runs * traced[name]):
            continue
        if traced[name] > 0 and real[name] > runs * traced[name]:
            more.add(name)
        elif name not in hidden:
            raise RuntimeError(
                f"its calls do not all go the same way: {name} runs {real[name]} times in "
                f"evaluation, and {runs * traced[name]} by the trace"
            )
    return more
