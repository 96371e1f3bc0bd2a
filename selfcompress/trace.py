"""Trace a model with torch.fx, in parts where it cannot be traced whole, and learn all its shapes.

Quantised layers and batch norms are leaves. A submodule whose forward() cannot be traced becomes
a leaf too, and the modules inside of it are traced on their own; so does the model itself. What
runs is always the user's own eager module: the traces are only read.
"""

import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

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
    positional,
    seed_everything,
    undisturbed,
    without_compile,
)
from selfcompress.observe import Observed, zeros_like_observed
from selfcompress.text import first_line
from selfcompress.widths import held, kept_whole, noting_widths


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


class _Proxy(torch.fx.Proxy):
    """A proxy that can tell `x += y` from `x = x + y`."""

    def __len__(self) -> NoReturn:
        raise RuntimeError("len() of a tensor cannot be traced: write x.shape[0]")


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
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(torch.fx.Tracer):
    """Makes a leaf of every submodule that it fails to trace, and remembers why."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, str] = {}
        self.watched: dict[torch.fx.Node, str] = {}

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
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_leaf(m) or module_qualified_name in self.failed:
            return True
        # torch's own containers (its transformers) are leaves to torch.fx, layers and all.
        return super().is_leaf_module(m, module_qualified_name) and not _has_layers(m)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
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


def _trace_part(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    untraceable: dict[str, str],
) -> Part:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    kinds = {key: parameter.kind for key, parameter in bound.signature.parameters.items()}
    # Flags and missing optional arguments are what they are, so that forward() can ask for them.
    plain = {
        key: value
        for key, value in bound.arguments.items()
        if kinds[key] not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and not isinstance(value, Tensor | list | tuple | dict)
    }
    tracer = _Tracer()
    module.train()
    with noting_widths(module) as reads, _of_any_rank(module):
        graph = tracer.trace(module, concrete_args=plain or None)
    tracer.watched |= held(reads, list(graph.nodes), module)
    traced = torch.fx.GraphModule(module, graph)
    for owner, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            if not is_torchs(key):
                tracer.watch(value, f"it is kept as {owner}.{key}".replace(" .", " "))
    module.eval()
    with noting_widths(module) as in_evaluation, _of_any_rank(module):
        extra = _calls(_Tracer().trace(module, concrete_args=plain or None)) - _calls(graph)
    if extra:
        raise RuntimeError(
            f"in evaluation it calls {next(iter(extra))[1]}, in training it does not"
        )
    asked, trained = (Counter((r.layer, r.name) for r in rs) for rs in (in_evaluation, reads))
    if asked - trained:
        raise RuntimeError(
            "in evaluation it asks for the width of a layer, in training it does not"
        )
    facts = _Facts(traced)
    traced.eval()
    facts.run(*bound.arguments.values(), enable_io_processing=False)
    prefix = f"{name}." if name else ""
    untraceable |= {prefix + failed: why for failed, why in tracer.failed.items()}
    inside = [prefix + failed for failed in tracer.failed]
    read = {prefix + layer for layer in kept_whole(reads, module)}
    return Part(name, list(graph.nodes), facts.facts, inside, tracer.watched, read)


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


def _calls(graph: torch.fx.Graph) -> Counter[tuple[str, str]]:
    """How often a graph calls which function, method or module."""
    nodes = [node for node in graph.nodes if node.op.startswith("call_")]
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


class _Facts(torch.fx.Interpreter):
    """Runs a trace and keeps what each node gave, tensors as their shapes."""

    def __init__(self, traced: torch.fx.GraphModule) -> None:
        super().__init__(traced)
        self.facts: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        self.facts[n] = pytree.tree_map_only(Tensor, lambda t: Shape(tuple(t.shape)), result)
        return result
