"""Trace a model with torch.fx, in parts where it cannot be traced whole, and learn all its shapes.

Quantised layers and batch norms are leaves. A submodule whose forward() cannot be traced becomes
a leaf too, and the modules inside of it are traced on their own; so does the model itself. What
runs is always the user's own eager module: the traces are only read.
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from selfcompress.attention import QuantAttention
from selfcompress.layers import PlacedBatchNorm, QuantizedLayer
from selfcompress.look import Inputs, kept_modes, positional, undisturbed


@dataclass(frozen=True)
class Shape:
    """Stands for a tensor of a traced run."""

    sizes: tuple[int, ...]


@dataclass
class Part:
    """One module that was traced as a whole, with all that it calls.

    Attributes:
        prefix: what comes before the names of its submodules: "" or "features.".
        nodes: its operations in order; `facts[node]` is what each gave on the example, with a
            `Shape` in place of every tensor.
    """

    prefix: str
    nodes: list[torch.fx.Node]
    facts: dict[torch.fx.Node, Any]


@dataclass
class Trace:
    """All parts of a model, and what could not be traced.

    Attributes:
        untraceable: name of a module whose own forward() cannot be traced ("" is the model) → why.
        miscounted: names of modules that run more or less often than their part says.
    """

    parts: list[Part] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)
    miscounted: set[str] = field(default_factory=set)


def trace(model: nn.Module, example_input: Inputs) -> Trace:
    """Trace `model`, whose layers are quantised already; leaves its modes and buffers alone.

    The way is that of training mode, followed once in eval mode to learn the shapes.
    """
    with undisturbed(model, example_input):
        result = Trace()
        pending = _trace_part(model, "", positional(example_input), {}, result)
        if not result.untraceable:
            return result
        model.eval()
        calls = _Calls(model, example_input)
        while pending:
            name = pending.pop()
            module = model.get_submodule(name)
            if _is_leaf(module) or not any(isinstance(m, QuantizedLayer) for m in module.modules()):
                continue
            if name not in calls.arguments:  # a ModuleList, say
                pending += [f"{name}.{child}" for child, _ in module.named_children()]
                continue
            args, kwargs = calls.arguments[name]
            known = len(result.parts)
            pending += _trace_part(module, f"{name}.", args, kwargs, result)
            for part in result.parts[known:]:
                _compare_counts(part, calls.counts, calls.counts[name], result.miscounted)
        return result


def reads_elsewhere(model: nn.Module, example_input: Inputs) -> set[str]:
    """Run the model once: names of modules whose parameters are read outside their forward().

    Raises:
        Whatever the model raises when it does not accept `example_input`.
    """
    with undisturbed(model, example_input):
        model.eval()
        mode = _ForeignReads(model)
        with mode:
            model(*positional(example_input))
    return mode.found


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer | PlacedBatchNorm | QuantAttention)


class _Tracer(torch.fx.Tracer):
    """Makes a leaf of every submodule that it fails to trace, and remembers why."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_leaf(m) or module_qualified_name in self.failed:
            return True
        # torch's own containers (its transformers) are leaves to torch.fx, layers and all.
        has_layers = any(isinstance(part, QuantizedLayer) for part in m.modules())
        return super().is_leaf_module(m, module_qualified_name) and not has_layers

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, stack = len(self.graph.nodes), dict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever the user's forward() does under the tracer
            name = self.path_of_module(m)
            if self.is_leaf_module(m, name):
                raise
            self.failed[name] = _first_line(error)
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return super().call_module(m, forward, args, kwargs)


def _trace_part(
    module: nn.Module, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Trace
) -> list[str]:
    """Add a part to `result`; the names of modules inside of it that are to be traced alone."""
    tracer = _Tracer()
    name = prefix[:-1]
    before = set(vars(module))
    try:
        with kept_modes(module):
            traced = torch.fx.GraphModule(module.train(), tracer.trace(module))
        given = _by_placeholder(module, args, kwargs)
        facts = _Facts(traced)
        traced.eval()
        facts.run(*given)
    except Exception as error:
        result.untraceable[name] = _first_line(error)
        return [f"{prefix}{child}" for child, _ in module.named_children()]
    finally:
        # Constants that forward() makes are left on the module by torch.fx.
        for constant in set(vars(module)) - before:
            delattr(module, constant)
    result.parts.append(Part(prefix, list(traced.graph.nodes), facts.facts))
    alone = []
    for failed, why in tracer.failed.items():
        result.untraceable[prefix + failed] = why
        inside = module.get_submodule(failed)
        alone += [f"{prefix}{failed}.{child}" for child, _ in inside.named_children()]
    return alone


def _by_placeholder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return list(bound.arguments.values())


class _Facts(torch.fx.Interpreter):
    """Runs a trace and keeps what each node gave, tensors as their shapes."""

    def __init__(self, traced: torch.fx.GraphModule) -> None:
        super().__init__(traced)
        self.facts: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        self.facts[n] = pytree.tree_map_only(Tensor, lambda t: Shape(tuple(t.shape)), result)
        return result


class _Calls:
    """How often each module runs, and what it is given the first time.

    Attributes:
        arguments: module name → its first (args, kwargs).
        counts: module name → number of calls.
    """

    def __init__(self, model: nn.Module, example_input: Inputs) -> None:
        self.arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.counts: Counter[str] = Counter()
        hooks = [
            module.register_forward_pre_hook(self._record(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        try:
            model(*positional(example_input))
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.counts[name] += 1
            self.arguments.setdefault(name, (args, kwargs))

        return hook


def _compare_counts(part: Part, real: Counter[str], runs: int, miscounted: set[str]) -> None:
    """A layer inside of `part` that somebody else calls as well is more than the part shows."""
    traced = Counter(part.prefix + str(n.target) for n in part.nodes if n.op == "call_module")
    miscounted |= {name for name, count in traced.items() if real[name] != runs * count}


class _ForeignReads(TorchFunctionMode):
    """Notices parameters that are used while another module than their owner is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.running: list[nn.Module] = []
        self.owners: dict[int, list[tuple[str, nn.Module]]] = {}
        self.hooks: list[Any] = []
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append((name, module))
            self.hooks.append(module.register_forward_pre_hook(self._enter))
            self.hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            owners = self.owners.get(id(value), [])
            foreign = self.running and all(m is not self.running[-1] for _, m in owners)
            # Plain attributes (.shape, .device) reach this place as functions named __get__.
            if foreign and getattr(func, "__name__", "") != "__get__":
                self.found |= {name for name, _ in owners}
        return func(*args, **(kwargs or {}))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
