"""Trace a model with torch.fx, in parts if it cannot be traced whole, and record all shapes.

Quantised layers and batch norms are leaves, except those with a user's own forward(). A submodule
whose forward() cannot be traced becomes a leaf too, and the modules inside of it are traced on
their own; likewise if the model itself cannot be traced. What runs is always the user's own eager
module: the traces are only read.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress.graph.observe import Observed, zeros_like_observed
from selfcompress.graph.ops import taken
from selfcompress.graph.other_sizes import other_ways
from selfcompress.graph.tracer import Tracer, has_layers, has_tensors, is_ours
from selfcompress.graph.widths_read import frozen_by_widths, kept_whole, noting_widths
from selfcompress.inputs import Inputs, device_of, positional
from selfcompress.text import first_line
from selfcompress.undisturbed import (
    called,
    is_torchs,
    kept_attributes,
    seed_everything,
    undisturbed,
)


@dataclass
class Part:
    """One module that was traced as a whole, with all that it calls.

    Attributes:
        name: name of the module, "" for the model.
        nodes: its operations in order.
        facts: node → what it gave on the example, with a `Shape` in place of every tensor.
        inside: names of the submodules that are leaves because they cannot be traced.
        watched: node → why something outside the trace may read its result.
        read: names of the batch norms whose width or statistics forward() reads, and of grouped
            convolutions whose number of groups it uses; see `kept_whole`.
        entered: name of a layer with a user's own forward() → how often it was traced into.
    """

    name: str
    nodes: list[torch.fx.Node]
    facts: dict[torch.fx.Node, Any]
    inside: list[str]
    watched: dict[torch.fx.Node, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    entered: Counter[str] = field(default_factory=Counter)

    @property
    def prefix(self) -> str:
        """What comes before the names of the part's submodules: "" or, say, "features."."""
        return f"{self.name}." if self.name else ""


@dataclass
class Trace:
    """All parts of a model that were traced, and what could not be traced.

    Attributes:
        untraceable: name of a module whose own forward() cannot be traced ("" is the model) → why.
        miscounted: names of modules that run more often than the trace of their part says, since
            code that cannot be traced calls them too.
    """

    parts: list[Part] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)
    miscounted: set[str] = field(default_factory=set)


def trace(model: nn.Module, example_input: Inputs, observed: Observed) -> Trace:
    """Trace `model`, whose layers are quantised already, and restore its modes and buffers.

    Modules are traced in training mode. One that calls more than that in eval mode counts as
    untraceable.

    Args:
        observed: a run of the model on `example_input`.
    """
    result = Trace()
    pending, seen = [""], set[str]()
    with undisturbed(model, example_input), _without_fast_path():
        while pending:
            name = pending.pop()
            if name in seen:  # a child of two failed modules, one inside of the other
                continue
            seen.add(name)
            module = model.get_submodule(name)
            if name and (is_ours(module) or not has_layers(module)):
                continue  # nothing to follow; a float model itself is traced to count its MACs
            if name and name not in observed.arguments:  # never called: a ModuleList, say
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
        # Run once without tracing, so that no proxy is left in objects that forward() keeps.
        called(model.eval(), example_input)
    return result


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Inside, torch's transformer layers avoid their fast path, which depends on tensor values."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _children(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]


def _trace_part(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    untraceable: dict[str, str],
) -> Part:
    """Trace one module; submodules that call other things at other sizes become leaves.

    Args:
        untraceable: name → why, to which the submodules that cannot be traced are added.

    Raises:
        RuntimeError: the module itself calls other things at other sizes, or calls or reads more
            in evaluation than in training.
    """
    module.train()
    failed: dict[str, str] = {}
    with _of_any_rank(module):
        while True:
            with noting_widths(module) as reads, kept_attributes(module):
                tracer = Tracer(args, kwargs, reads, failed)
                nodes = list(tracer.trace(module).nodes)
                _watch_what_stays(tracer, module)
            more = other_ways(tracer, module)
            if not more:
                break
            if "" in more:
                raise RuntimeError(more[""])
            failed = tracer.failed | more
    tracer.watched |= frozen_by_widths(reads, nodes, module)
    module.eval()
    with noting_widths(module) as in_evaluation, _of_any_rank(module), kept_attributes(module):
        evaluated = Tracer(args, kwargs, in_evaluation, tracer.failed)
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
    read = {prefix + layer for layer in kept_whole(reads, nodes, module)}
    entered = Counter({prefix + layer: count for layer, count in tracer.entered.items()})
    return Part(name, nodes, tracer.facts, inside, tracer.watched, read, entered)


def _watch_what_stays(tracer: Tracer, module: nn.Module) -> None:
    """Watch the proxies that forward() has left in attributes or in place of buffers."""
    for owner, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            if not is_torchs(key):
                tracer.watch(value, f"it is kept as {owner}.{key}".replace(" .", " "))
        for key, value in dict(submodule._buffers).items():
            name = f"{owner}.{key}".lstrip(".")
            if isinstance(value, torch.fx.Proxy):
                tracer.watch(value, f"it is kept as {name}")
                for node in tracer.graph.nodes:
                    if node.op == "get_attr" and node.target == name:
                        tracer.watched[node] = "forward() puts another one in its place"


@contextmanager
def _of_any_rank(module: nn.Module) -> Iterator[None]:
    """Inside, users' own batch norms do not check how many dimensions their input has."""
    own = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and not is_ours(norm)]
    try:
        for norm in own:
            vars(norm)["_check_input_dim"] = lambda input: None
        yield
    finally:
        for norm in own:
            del vars(norm)["_check_input_dim"]


def _calls(tracer: Tracer) -> Counter[tuple[str, str]]:
    """Count the calls in a trace of every function, method or module that gives tensors."""
    nodes = [
        node
        for node in tracer.graph.nodes
        if node.op.startswith("call_") and has_tensors(tracer.facts[node])
    ]
    return Counter((n.op, str(getattr(n.target, "__name__", n.target))) for n in nodes)


def _compare(part: Part, model: nn.Module, real: Counter[str]) -> set[str]:
    """Compare how often a part's layers run with how often its trace says they do.

    Args:
        real: name of a module → how often it was observed to run.

    Returns:
        The names of layers that are also called from outside of the trace.

    Raises:
        RuntimeError: the number of calls of a layer contradicts the trace.
    """
    first = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    called = [part.prefix + str(n.target) for n in part.nodes if n.op == "call_module"]
    traced = Counter(first[modules[name]] for name in (*called, *part.entered.elements()))
    hidden = {
        first[m] for name in part.inside for m in model.get_submodule(name).modules() if m in first
    }
    runs = real[part.name] if part.name else 1
    more = set()
    for module in model.get_submodule(part.name).modules():
        name = first[module]
        # A layer that only training uses, such as an auxiliary head, has not run in eval mode.
        if not is_ours(module) or real[name] in (0, runs * traced[name]):
            continue
        if traced[name] > 0 and real[name] > runs * traced[name]:
            more.add(name)
        elif name not in hidden:
            raise RuntimeError(
                f"its calls do not all go the same way: {name} runs {real[name]} times in "
                f"evaluation, and {runs * traced[name]} by the trace"
            )
    return more
