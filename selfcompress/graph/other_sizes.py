"""Detect a forward() that branches on sizes and calls other things for inputs of other sizes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selfcompress.graph.tracer import Place, Tracer, has_tensors, is_ours, owner_of
from selfcompress.undisturbed import kept_attributes

# May come or go with the size, as channels of dimensions that are not padded stay where they are.
_HARMLESS = {
    "pad", "interpolate", "getitem", "contiguous", "to", "float", "type_as", "clone", "detach",
    "ones", "zeros", "full", "arange",
}  # fmt: skip


def other_ways(tracer: Tracer, module: nn.Module) -> dict[str, str]:
    """Return the modules in the traced `module` that call other things at other sizes → why.

    If none was told a number that depends on sizes, there are none. Else these are modules with
    layers that were not called, and those that call something else when traced again with other
    numbers of samples or inputs of other sizes. Sizes that forward() does not accept are skipped.
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
        except Exception:  # forward() does not accept these sizes
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
    """Return where a trace calls what makes tensors → the module whose forward() calls it."""
    return {
        tracer.places[node]: owner_of(node)
        for node in tracer.graph.nodes
        if node in tracer.places
        and node.op.startswith("call_")
        and tracer.places[node][1] not in _HARMLESS
        and has_tensors(tracer.facts[node])
    }


def _resized(tensor: Tensor, dims: range, change: Callable[[int], int]) -> Tensor:
    """Return an input with the sizes of `dims` changed, by leaving out or repeating elements.

    If the number of samples is not to be changed, it becomes at most 2.
    """
    if 0 not in dims and tensor.dim():
        tensor = tensor[:2]
    for dim in (d for d in dims if d < tensor.dim()):
        size = tensor.shape[dim]
        wanted = change(size)
        # On a GPU an index out of range, such as a position, leaves an error that persists.
        if dim and tensor.is_cuda:
            wanted = min(wanted, size)
        index = torch.arange(wanted, device=tensor.device) % max(1, size)
        tensor = tensor.index_select(dim, index)
    return tensor


# It is not known which dimension counts samples, steps or pixels: change each in turn.
_CHANGES = [
    partial(_resized, dims=dims, change=change)
    for dims in (range(1), range(1, 2), range(2, 9))
    for change in (lambda size: 1, lambda size: max(1, size - 1), lambda size: size + 1)
]
