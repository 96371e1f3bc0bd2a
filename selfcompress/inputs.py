"""What a model is called with: an example of it, its device and batch size, and others like it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = Tensor | tuple[Any, ...]
"""What a model is called with: one tensor, or all its positional arguments."""


def positional(inputs: Inputs) -> tuple[Any, ...]:
    """`inputs` as the arguments of a call."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def device_of(inputs: Inputs) -> torch.device:
    """Where the first tensor of `inputs` is."""
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def moved_like(inputs: Any, example: Inputs) -> Any:
    """`inputs` on the device of `example`; floats of the type of those in their places there."""
    device = device_of(example)
    leaves, structure = pytree.tree_flatten(inputs)
    places = pytree.tree_leaves(example)
    if len(places) != len(leaves):
        places = leaves
    moved = [
        leaf.to(device, place.dtype if _both_float(leaf, place) else None)
        if isinstance(leaf, Tensor)
        else leaf
        for leaf, place in zip(leaves, places, strict=True)
    ]
    return pytree.tree_unflatten(moved, structure)


def moved_with(inputs: Inputs, was: Tensor, now: Tensor) -> Inputs:
    """`inputs` of a network as it takes them with a parameter `now` that `was` elsewhere.

    Floats become wider or narrower with it, if it has.
    """
    if (was.device, was.dtype) == (now.device, now.dtype):
        return inputs

    def move(tensor: Tensor) -> Tensor:
        cast = tensor.is_floating_point() and was.dtype != now.dtype
        return tensor.to(now.device, now.dtype if cast else tensor.dtype)

    moved: Inputs = pytree.tree_map_only(Tensor, move, inputs)
    return moved


def _both_float(*values: Any) -> bool:
    return all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def batch_size(inputs: Inputs) -> int:
    """The samples that `inputs` hold: the length of the first tensor; 0 if there is none."""
    leaves = pytree.tree_leaves(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    tensors.sort(key=lambda tensor: not tensor.is_floating_point())  # a graph's edges come last
    return len(tensors[0]) if tensors else 0


def batches_like(example: Inputs, loader: Iterable[Any]) -> Iterator[Inputs]:
    """What a model is called with, batch by batch, on the device and in the precision of `example`.

    Args:
        loader: of batches (x, ...), ((x, ...), ...) or x. As many are taken as `example` holds.

    Raises:
        ValueError: a batch is of another type.
    """
    several = isinstance(example, tuple)
    count = len(positional(example))
    for batch in loader:
        if isinstance(batch, list | tuple):
            inputs = tuple(batch[:count]) if several else batch[0]
            if several and _is_nested(batch[0]) and not _is_nested(example[0]):  # ((x, ...), y)
                inputs = tuple(batch[0][:count])
        elif isinstance(batch, Tensor) or (several and count == 1):
            inputs = (batch,) if several else batch
        elif not several and not isinstance(example, Tensor):
            inputs = batch  # something of the user's own
        else:
            kind = type(batch).__name__
            raise ValueError(
                f"batches must be (x, ...) or x, not {kind}: a generator can make them so"
            )
        yield moved_like(inputs, example)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple)
