"""Notice that a forward() that goes by sizes calls something else with inputs of other sizes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress.tracer import Place, Shape, Tracer, is_leaf, owner_of, restored

# What may come or go with the size: no channel of the dimension that is not padded goes anywhere.
_HARMLESS = {
    "pad", "interpolate", "getitem", "contiguous", "to", "float", "type_as", "clone", "detach",
    "ones", "zeros", "full", "arange",
}  # fmt: skip


def another_way(tracer: Tracer, module: nn.Module) -> tuple[str, str] | None:
    """The name of a module inside of a traced one that has other ways for other sizes, and why.

    It was told sizes, and has layers that were not called; or it calls something else when one
    sample, two, or inputs of other sizes come. Those that it refuses are none of its ways.
    """
    if not tracer.takers:
        return None
    called = {str(node.target) for node in tracer.graph.nodes if node.op == "call_module"}
    for name in tracer.takers:
        for layer, part in module.get_submodule(name).named_modules(prefix=name):
            if is_leaf(part) and not any(c == layer or layer.startswith(f"{c}.") for c in called):
                return name, f"it goes by sizes, and does not call {layer} at those of the example"
    usual = _places(tracer)
    for args, kwargs in _resized(*tracer.arguments):
        other = Tracer(args, kwargs, tracer.reads, tracer.failed)
        reads = len(tracer.reads)
        try:
            with restored(module):
                other.trace(module)
        except Exception:  # whatever a forward() says to sizes that it is not for
            continue
        finally:
            del tracer.reads[reads:]
        places = _places(other)
        for place in places.keys() ^ usual.keys():
            name = (places | usual)[place]
            while name and name not in tracer.takers | other.takers:
                name = name.rpartition(".")[0]
            return name, f"at other sizes it calls other things ({place[1]})"
    return None


def _places(tracer: Tracer) -> dict[Place, str]:
    """What makes tensors, in which lines → the module whose forward() that is."""
    return {
        tracer.places[node]: owner_of(node)
        for node in tracer.graph.nodes
        if node in tracer.places
        and node.op.startswith("call_")
        and tracer.places[node][1] not in _HARMLESS
        and any(isinstance(leaf, Shape) for leaf in pytree.tree_leaves(tracer.facts[node]))
    }


def _resized(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments with one sample, with two, and with two of other sizes, repeating numbers."""
    changes: tuple[Callable[[int], int], ...] = (lambda n: 1, lambda n: n + 1, lambda n: 2 * n)
    for first in range(3):  # which dimension counts samples, steps, pixels: it is not known
        for change in changes:
            dims = range(2, 9) if first == 2 else [first]

            def resize(tensor: Tensor, dims: Any = dims, change: Any = change) -> Tensor:
                if dims[0] > 0 and tensor.dim() and len(tensor) > 2:
                    tensor = tensor[:2]
                for dim in (d for d in dims if d < tensor.dim()):
                    size = tensor.shape[dim]
                    index = torch.arange(change(size), device=tensor.device) % max(1, size)
                    tensor = tensor.index_select(dim, index)
                return tensor

            yield pytree.tree_map_only(Tensor, resize, (args, kwargs))
