"""Notice that a forward() that goes by sizes calls something else with inputs of other sizes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress.graph.tracer import Place, Tracer, has_tensors, is_ours, owner_of
from selfcompress.look import kept_attributes

# What may come or go with the size: no channel of the dimension that is not padded goes anywhere.
_HARMLESS = {
    "pad", "interpolate", "getitem", "contiguous", "to", "float", "type_as", "clone", "detach",
    "ones", "zeros", "full", "arange",
}  # fmt: skip


def other_ways(tracer: Tracer, module: nn.Module) -> dict[str, str]:
    """The names of modules inside of a traced one that have other ways for other sizes → why.

    They were told sizes, and have layers that were not called; or call something else when one
    sample, two, or inputs of other sizes come. Those that they refuse are none of their ways.
    """
    if not tracer.takers:
        return {}
    found: dict[str, str] = {}
    called = {str(node.target) for node in tracer.graph.nodes if node.op == "call_module"}
    called |= tracer.entered.keys()
    for name in tracer.takers:
        for layer, part in module.get_submodule(name).named_modules(prefix=name):
            if is_ours(part) and not any(c == layer or layer.startswith(f"{c}.") for c in called):
                found[name] = f"it goes by sizes, and does not call {layer} at those of the example"
    usual = _places(tracer)
    for change in _CHANGES:
        if found:
            break
        reads = len(tracer.reads)
        try:
            args, kwargs = pytree.tree_map_only(Tensor, change, tracer.arguments)
            other = Tracer(args, kwargs, tracer.reads, tracer.failed)
            with kept_attributes(module):
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
            found[name] = f"at other sizes it calls other things ({place[1]})"
    return found


def _places(tracer: Tracer) -> dict[Place, str]:
    """What makes tensors, in which lines → the module whose forward() that is."""
    return {
        tracer.places[node]: owner_of(node)
        for node in tracer.graph.nodes
        if node in tracer.places
        and node.op.startswith("call_")
        and tracer.places[node][1] not in _HARMLESS
        and has_tensors(tracer.facts[node])
    }


def _resized(tensor: Tensor, dims: range, change: Callable[[int], int]) -> Tensor:
    """An input with other sizes, its numbers repeated; of at most two samples, if those stay."""
    if 0 not in dims and tensor.dim():
        tensor = tensor[:2]
    for dim in (d for d in dims if d < tensor.dim()):
        size = tensor.shape[dim]
        wanted = change(size)
        # On a GPU an index out of range, of a position say, is an error that stays.
        if dim and tensor.is_cuda:
            wanted = min(wanted, size)
        index = torch.arange(wanted, device=tensor.device) % max(1, size)
        tensor = tensor.index_select(dim, index)
    return tensor


# Which dimension counts samples, steps or pixels is not known.
_CHANGES = [
    partial(_resized, dims=dims, change=change)
    for dims in (range(1), range(1, 2), range(2, 9))
    for change in (lambda size: 1, lambda size: max(1, size - 1), lambda size: size + 1)
]
