"""Run a model to have a look at it, and leave it as it was found."""

import copy
import operator
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress.inputs import Inputs, device_of, positional

CLOSED = (
    int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device,
    Tensor, torch.fx.Proxy, nn.Module,
)  # fmt: skip
"""The types of values that are not looked into."""


def leaves_of(returned: Any, depth: int = 4) -> Iterator[Any]:
    """All that is in what a forward() returned, be it in containers or in objects like dataclasses.

    Objects that cannot be looked into, or lie deeper, are leaves themselves.
    """
    for leaf in pytree.tree_leaves(returned):
        inside = [] if isinstance(leaf, CLOSED) else list(getattr(leaf, "__dict__", {}).values())
        # Subclasses of containers are none to pytree.
        if isinstance(leaf, Mapping):
            inside += leaf.values()
        elif isinstance(leaf, list | tuple | set | frozenset):
            inside += leaf
        if depth and inside:
            yield from leaves_of(inside, depth - 1)
        else:
            yield leaf


def without_compile(model: nn.Module) -> nn.Module:
    """The user's own module inside of what torch.compile(model) returned."""
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"this takes a torch module (an object), not a {type(model).__name__}")
    return inner


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Inside, modules may be switched to train() or eval(); afterwards each is as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            # One that does more than to note its mode, such as a torchvision feature extractor,
            # which has a graph for each.
            if type(module).train is not nn.Module.train:
                module.train(training)
        for module, training in modes.items():
            module.training = training


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Inside, a forward() may set attributes, put others in buffers' places, and register hooks."""
    attributes = {module: dict(vars(module)) for module in model.modules()}
    hooks = [
        (held, dict(held))
        for module in model.modules()
        for key, held in vars(module).items()
        if key.endswith("_hooks") and isinstance(held, dict)
    ]
    for module, before in attributes.items():
        if not isinstance(module, torch.jit.ScriptModule):
            before["_buffers"] = dict(module._buffers)
    try:
        yield
    finally:
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
        for held, content in hooks:
            held.clear()
            held.update(content)


@contextmanager
def undisturbed(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Inside, the model may run or be traced, without gradients and as it is written.

    Afterwards its modes, its buffers and all attributes of its modules are what they were, lists
    and the like with what was in them; and random numbers go on as if nothing had run.
    """
    device = device_of(inputs)
    devices = [device] if device.type == "cuda" else []
    containers = [
        (container, _content(container))
        for module in model.modules()
        for container in _containers(v for key, v in vars(module).items() if not is_torchs(key))
    ]
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    eagerly = torch.compiler.set_stance("force_eager")
    with eagerly, torch.no_grad(), torch.random.fork_rng(devices), _forked_rng():
        try:
            with kept_attributes(model), kept_modes(model):
                yield
        finally:
            for container, content in containers:
                _restore(container, content)
            for buffer, value in buffers.items():
                buffer.copy_(value)


def is_torchs(attribute: str) -> bool:
    """Whether an attribute of a module is torch's own, and not the user's."""
    return attribute in ("_parameters", "_buffers", "_modules") or attribute.endswith("_hooks")


_CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict, Counter)
"""What can be emptied and filled again; of the user's own types that is not known."""


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """The lists, dicts, sets and deques among `values`, and in one another."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value
            yield value


def _content(container: Any) -> list[Any]:
    """What is in it; of a dict, all keys and then all values."""
    values = container.values() if isinstance(container, dict) else ()
    return [*container, *values]


def _restore(container: Any, content: list[Any]) -> None:
    now = _content(container)
    if len(now) == len(content) and all(map(operator.is_, now, content)):
        return
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        dict.update(container, zip(content[:half], content[half:], strict=True))
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


@contextmanager
def _forked_rng() -> Iterator[None]:
    """Inside, Python and NumPy draw random numbers that do not count."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_everything(device: torch.device) -> None:
    """Start random numbers at the same point always: a forward() that draws some goes one way."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def copied(leaf: Any, model: nn.Module) -> Any:
    """A copy of an argument that a forward() of `model` may change, such as a cache.

    Itself if it cannot be changed or copied. What it has of the model stays that of the model.
    """
    if isinstance(leaf, Tensor | nn.Module) or not hasattr(leaf, "__dict__"):
        return leaf
    known = (*model.modules(), *model.parameters(), *model.buffers())
    try:
        with torch._C.DisableTorchFunction():
            return copy.deepcopy(leaf, {id(part): part for part in known})
    except Exception:  # it holds a lock, a file, or whatever else is only once there
        return leaf


def called(model: nn.Module, inputs: Inputs) -> Any:
    """What `model` returns for a copy of `inputs`: a forward() may change what it is given."""
    copies: dict[int, Any] = {}  # of what is given twice there is one

    def copy_of(leaf: Any) -> Any:
        if id(leaf) not in copies:
            copies[id(leaf)] = copied(leaf, model)
            if isinstance(leaf, Tensor):
                copies[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
                vars(copies[id(leaf)]).update(vars(leaf))
        return copies[id(leaf)]

    return model(*pytree.tree_map(copy_of, positional(inputs)))


def detached_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy`, with what a forward() has left in an attribute, but without its history."""
    left = [
        value
        for module in model.modules()
        for value in pytree.tree_leaves(vars(module))
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach() for value in left} | (memo or {}))
