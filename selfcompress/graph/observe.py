"""Watch one run of a model: which modules run, how often, with what, and whose weights are read."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from selfcompress.graph.products import PRODUCTS
from selfcompress.inputs import Inputs, device_of
from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.embeddings import TiedLinear
from selfcompress.layers.kinds import EMBEDDINGS, FLOAT_LAYERS, layer_widths
from selfcompress.layers.own_forward import OwnForward
from selfcompress.layers.recurrent import RECURRENT, matrices_of
from selfcompress.undisturbed import called, copied, seed_everything, undisturbed


@dataclass
class Observed:
    """What a run in eval mode showed. Modules go by their first names in `named_modules`.

    Attributes:
        counts: module name → number of calls.
        applications: name of a layer → how often its weight is applied in the whole batch: once for
            every pixel of its output (of its input if it is a transposed convolution), or for every
            step of a sequence.
        arguments: module name → (args, kwargs) of its first call, with tensors on the meta device.
        varied: names of modules whose calls differ in their arguments by more than the sizes and
            values of tensors.
        resized: names of modules that are called with tensors of several sizes.
        read_elsewhere: names of modules whose parameters or buffers are read while they are not
            running.
        rewritten: names of layers of users' classes whose forward() changes their parameters.
        bypassed: names of modules that have replaced others, although the others are still called.
    """

    counts: Counter[str] = field(default_factory=Counter)
    applications: Counter[str] = field(default_factory=Counter)
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    varied: set[str] = field(default_factory=set)
    resized: set[str] = field(default_factory=set)
    read_elsewhere: set[str] = field(default_factory=set)
    rewritten: set[str] = field(default_factory=set)
    bypassed: set[str] = field(default_factory=set)


def observe(model: nn.Module, inputs: Inputs) -> Observed:
    """Run `model` once in eval mode and return what the run showed.

    Raises:
        Exception: whatever the model raises when it does not accept `inputs`.
    """
    seen = Observed()
    with undisturbed(model, inputs):
        model.eval()
        seed_everything(device_of(inputs))
        with _Watch(model, seen):
            called(model, inputs)
    return seen


class _Watch(TorchFunctionMode):
    """Records calls of modules, and uses of parameters and buffers while another module runs."""

    def __init__(self, model: nn.Module, seen: Observed) -> None:
        super().__init__()
        self.model = model
        self.seen = seen
        self.running: list[nn.Module] = []
        self.owners: dict[int, list[tuple[str, nn.Module]]] = {}
        self.known: list[Tensor] = []  # kept, so that no new tensor gets the id() of one of these
        self.names = {module: name for name, module in model.named_modules()}
        self.hooks: list[Any] = []
        self.held: dict[nn.Module, _Held] = {}  # users' layers that run → what they had before
        for module, name in self.names.items():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.dim():  # a single number has no channels
                    self.owners.setdefault(id(tensor), []).append((name, module))
                    self.known.append(tensor)
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no such hooks, and is not looked into
            self.hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.hooks.append(
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
            )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running.append(module)
        name = self.names.get(module)
        if name is None:  # not in the model, but with its hooks: a layer that was replaced
            self.seen.bypassed |= {
                n for m, n in self.names.items() if m._forward_hooks is module._forward_hooks
            }
            return
        self.seen.counts[name] += 1
        if _is_users(module):
            self.held[module] = _held(module)
        shapes = _mapped(lambda t: t.detach().to("meta"), (args, kwargs))
        if name not in self.seen.arguments:
            kept = pytree.tree_map(lambda leaf: copied(leaf, self.model), shapes, is_leaf=_packed)
            self.seen.arguments[name] = kept
            return
        first = self.seen.arguments[name]
        if _signature(first) != _signature(shapes):
            self.seen.varied.add(name)
        if _sizes(first) != _sizes(shapes):
            self.seen.resized.add(name)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.names.get(module)
        if module in self.held:
            before, now = self.held.pop(module), _held(module)
            if before.keys() != now.keys() or not all(map(_same, before.values(), now.values())):
                self.seen.rewritten.add(self.names[module])
        self.running.pop()
        if name is None or output is None:  # no output: the module has raised an error
            return
        if type(module) in (nn.MultiheadAttention, QuantAttention):
            names = ("query", "key", "value")
            given = dict(zip(names, args, strict=False)) | kwargs
            steps = [given[name].shape[:-1].numel() for name in names]
            self.seen.applications[f"{name}.out_proj"] += steps[0]
            for part in (name, f"{name}.in_proj"):  # only a quantised in_proj is a module
                self.seen.applications[part] += sum(steps) // 3
        elif isinstance(module, RECURRENT):
            made = output[0] if isinstance(output, tuple) else output
            made = made[0] if isinstance(made, tuple) else made  # the data of packed sequences
            # The matrices of a quantised one are modules.
            for part in (name, *(f"{name}.{part}" for part in matrices_of(module))):
                self.seen.applications[part] += made.numel() // made.shape[-1]
        elif isinstance(module, FLOAT_LAYERS) and not isinstance(module, OwnForward):
            read = next(iter((*args, *kwargs.values())), None)
            self._count_applications(name, module, read, output)

    def _count_applications(self, name: str, layer: nn.Module, read: Any, made: Any) -> None:
        ins, outs = layer_widths(layer)
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        tensor, width = (read, ins) if transposed else (made, outs)
        if isinstance(tensor, Tensor):
            self.seen.applications[name] += tensor.numel() // max(1, width)

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inside = self.running[-1] if self.running else None
        if inside in self.held and _changes(func):
            own = [p for p in inside.parameters(recurse=False) if args and p is args[0]]
            self.seen.rewritten |= {self.names[inside]} if own else set()
        if func in PRODUCTS and isinstance(inside, OwnForward) and inside in self.names:
            read = next(iter((*args, *kwargs.values())))
            self._count_applications(self.names[inside], inside, read, result)
        # Attributes (.shape, .grad, .T) come here too, as functions named __get__.
        attribute = getattr(func, "__name__", "") == "__get__"
        # Reading the shape is not harmless, as it changes when rows are cut.
        harmless = attribute and (
            not isinstance(result, Tensor | torch.Size)
            or getattr(func.__self__, "__name__", "") == "grad"
        )
        if self.running:
            for value in pytree.tree_leaves((args, kwargs)):
                owners = self.owners.get(id(value), [])
                if harmless:  # except for recurrent layers, where modules replace parameters
                    owners = [owner for owner in owners if isinstance(owner[1], RECURRENT)]
                reader = self.running[-1]
                if isinstance(reader, TiedLinear):
                    reader = reader.embedding
                if all(module is not reader for _, module in owners):
                    self.seen.read_elsewhere |= {name for name, _ in owners}
        return result


_Held = dict[str, tuple[nn.Parameter, int, Tensor]]


def _is_users(module: nn.Module) -> bool:
    """Return whether a module is a layer of a user's class."""
    layer = isinstance(module, (*FLOAT_LAYERS, *EMBEDDINGS, *RECURRENT))
    return layer and not type(module).__module__.startswith("torch.nn.")


def _held(module: nn.Module) -> _Held:
    """Return name → (parameter, its address in memory, a copy of its values) of a module."""
    return {
        name: (p, p.data_ptr(), p.detach().clone())
        for name, p in module._parameters.items()
        if p is not None
    }


def _same(before: tuple[nn.Parameter, int, Tensor], now: tuple[nn.Parameter, int, Tensor]) -> bool:
    return before[0] is now[0] and before[1] == now[1] and torch.equal(before[2], now[2])


def _changes(function: Any) -> bool:
    """Return whether a function changes its first argument, or gives its `.data` to be changed."""
    name = str(getattr(function, "__name__", ""))
    if name == "__get__":
        return getattr(function.__self__, "__name__", "") == "data"
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or bool(re.fullmatch("__i[a-z]+__", name))


def _packed(value: Any) -> bool:
    """Return whether a value is a packed sequence, which cannot be rebuilt from other tensors."""
    return isinstance(value, PackedSequence)


def _mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return `tree` with `function` applied to all tensors, except those of packed sequences."""
    return pytree.tree_map_only(Tensor, function, tree, is_leaf=_packed)


def _signature(arguments: Any) -> str:
    """Describe the arguments of a call by all but the sizes and values of tensors."""

    def kind(leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            return f"{leaf.dim()} {leaf.dtype}"
        return type(leaf).__name__ if hasattr(leaf, "__dict__") else repr(leaf)

    return repr(pytree.tree_map(kind, arguments, is_leaf=_packed))


def _sizes(arguments: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


def zeros_like_observed(observed: Any, device: torch.device) -> Any:
    """Return observed arguments with zeros on `device` in place of the tensors."""
    return _mapped(lambda t: torch.zeros_like(t, device=device), observed)
