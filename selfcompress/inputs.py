"""Helpers for the inputs of a model: their device and batch size, and batches like an example."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress.layers.quantized import weights_of

Inputs = Tensor | tuple[Any, ...]
"""What a model is called with: one tensor, or all its positional arguments."""


def positional(inputs: Inputs) -> tuple[Any, ...]:
    """Return `inputs` as the tuple of positional arguments of a call."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def device_of(inputs: Inputs) -> torch.device:
    """Return the device of the first tensor in `inputs`, or the CPU if there is none."""
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def moved_like(inputs: Any, example: Inputs) -> Any:
    """Return `inputs` on the device of `example`, with floats in the dtypes of their counterparts.

    If the two hold different numbers of leaves, there are no counterparts, and dtypes stay.
    """
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


class Place(NamedTuple):
    """The device of a network's first weight, and the dtype of all weights; None for several."""

    device: torch.device
    dtype: torch.dtype | None


def place_of(model: nn.Module) -> Place:
    """Return where the weights of `model` are; its formats may have another dtype than they."""
    weights = weights_of(model)
    dtypes = {p.dtype for p in weights}
    return Place(weights[0].device, dtypes.pop() if len(dtypes) == 1 else None)


def moved_with(inputs: Inputs, was: Place, now: Place) -> Inputs:
    """Return `inputs` for a network at the place `now`, given those for it at the place `was`.

    Only floats are cast, and only if all weights have been cast from one dtype to another.
    """
    if was == now:
        return inputs
    cast = None if was.dtype in (None, now.dtype) else now.dtype

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(now.device, cast if tensor.is_floating_point() else None)

    moved: Inputs = pytree.tree_map_only(Tensor, move, inputs)
    return moved


def _both_float(*values: Any) -> bool:
    return all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def batch_size(inputs: Inputs) -> int:
    """Return how many samples `inputs` hold, or 0 if they hold no tensor with dimensions.

    It is the length of the first floating-point tensor or, without one, of the first tensor.
    """
    leaves = pytree.tree_leaves(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    tensors.sort(key=lambda tensor: not tensor.is_floating_point())  # e.g. edges of a graph last
    return len(tensors[0]) if tensors else 0


def batches_like(example: Inputs, loader: Iterable[Any]) -> Iterator[Inputs]:
    """Yield a model's inputs for every batch of `loader`, with the device and dtypes of `example`.

    Args:
        example: inputs that the model accepts.
        loader: gives batches (x, ...), ((x, ...), ...) or x. If `example` is a tuple, the first
            items of a batch are taken, as many as it holds; otherwise the first.

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
            inputs = batch  # not a tensor, as `example` is not: a dict, say
        else:
            kind = type(batch).__name__
            raise ValueError(
                f"batches must be (x, ...) or x, not {kind}: a generator can make them so"
            )
        yield moved_like(inputs, example)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple)
