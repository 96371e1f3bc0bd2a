"""Run a model for inspection, and restore its modes, buffers, attributes and random numbers."""

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
"""Types of values whose attributes and contents are not searched."""


def leaves_of(returned: Any, depth: int = 4) -> Iterator[Any]:
    """Yield all values in what a forward() returned, in containers or objects such as dataclasses.

    Objects that have no contents to search, or lie more than `depth` objects deep, are yielded
    themselves.
    """
    for leaf in pytree.tree_leaves(returned):
        inside = [] if isinstance(leaf, CLOSED) else list(getattr(leaf, "__dict__", {}).values())
        # pytree does not look into subclasses of containers.
        if isinstance(leaf, Mapping):
            inside += leaf.values()
        elif isinstance(leaf, list | tuple | set | frozenset):
            inside += leaf
        if depth and inside:
            yield from leaves_of(inside, depth - 1)
        else:
            yield leaf


def without_compile(model: nn.Module) -> nn.Module:
    """Return the module inside what torch.compile(model) returned, or `model` if not compiled.

    Raises:
        TypeError: it is not a module.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"this takes a torch module (an object), not a {type(model).__name__}")
    return inner


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training or eval mode of every module of `model` when the block ends."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            # A class's own train() may do more than to set the mode, such as that of a torchvision
            # feature extractor, which has a graph for each mode.
            if type(module).train is not nn.Module.train:
                module.train(training)
        for module, training in modes.items():
            module.training = training


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Restore attributes, replaced buffers and hooks of all modules when the block ends."""
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
    """Within the block, `model` may be run or traced, without gradients or torch.compile.

    Afterwards its modes, its buffers and all attributes of its modules are what they were, with the
    contents of lists, dicts, sets and deques, and random number generators (on a GPU only on that
    of `inputs`) continue as if nothing had run.
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
                for module in model.modules():  # compiled by its own compile()
                    if vars(module).get("_compiled_call_impl") is not None:
                        module._compiled_call_impl = None
                yield
        finally:
            for container, content in containers:
                _restore(container, content)
            for buffer, value in buffers.items():
                buffer.copy_(value)


def is_torchs(attribute: str) -> bool:
    """Return whether an attribute of a module is torch's own, and not the user's."""
    return attribute in ("_parameters", "_buffers", "_modules") or attribute.endswith("_hooks")


_CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict, Counter)
"""Containers that can be emptied and filled again; of the user's own types that is not known."""


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the lists, dicts, sets and deques among `values`, including nested ones."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value
            yield value


def _content(container: Any) -> list[Any]:
    """Return the elements of a container; of a dict, all keys and then all values."""
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
    """Restore the random number generators of Python and NumPy when the block ends."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_everything(device: torch.device) -> None:
    """Seed random numbers with 0, so that a forward() that draws some always goes the same way."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def copied(leaf: Any, model: nn.Module) -> Any:
    """Return a copy of an argument that a forward() of `model` may change, such as a cache.

    A tensor, a module, and what has no attributes or cannot be copied are returned themselves. The
    copy refers to the modules, parameters and buffers of `model` themselves, not to copies.
    """
    if isinstance(leaf, Tensor | nn.Module) or not hasattr(leaf, "__dict__"):
        return leaf
    known = (*model.modules(), *model.parameters(), *model.buffers())
    try:
        with torch._C.DisableTorchFunction():
            return copy.deepcopy(leaf, {id(part): part for part in known})
    except Exception:  # it holds a lock, a file, or something else that cannot be copied
        return leaf


def called(model: nn.Module, inputs: Inputs) -> Any:
    """Return what `model` returns for a copy of `inputs`, as its forward() may change them."""
    copies: dict[int, Any] = {}  # by id: what is given twice is copied once

    def copy_of(leaf: Any) -> Any:
        if id(leaf) not in copies:
            copies[id(leaf)] = copied(leaf, model)
            if isinstance(leaf, Tensor):
                copies[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
                vars(copies[id(leaf)]).update(vars(leaf))
        return copies[id(leaf)]

    return model(*pytree.tree_map(copy_of, positional(inputs)))


def detached_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of `model`, with tensors that a forward() left in attributes detached."""
    left = [
        value
        for module in model.modules()
        for value in pytree.tree_leaves(vars(module))
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach() for value in left} | (memo or {}))
