"""Follow in-place changes in a forward(), and find those that other names of a tensor see."""

from collections.abc import Callable

import torch.fx
from torch import nn

from selfcompress.graph.ops import WRITES, is_in_place, kind_of_call, kind_of_module, may_alias
from selfcompress.graph.trace import Part
from selfcompress.graph.tracer import Shape, has_tensors

ModuleOf = Callable[[torch.fx.Node], nn.Module | None]
"""Type of a function that returns the module that a node calls, or None."""


def redirect_in_place(part: Part, module_of: ModuleOf) -> None:
    """Let every node that reads x after an in-place change of x read the result of the change."""
    order = {node: index for index, node in enumerate(part.nodes)}
    for node in part.nodes:
        target = node.args[0] if node.args else None
        if not isinstance(target, torch.fx.Node) or not isinstance(part.facts[target], Shape):
            continue
        if not is_in_place(node, module_of(node)):
            continue
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)


def alias_hazards(part: Part, module_of: ModuleOf) -> set[torch.fx.Node]:
    """Return nodes that change what is read later under other names (views), and these names."""
    order = {node: index for index, node in enumerate(part.nodes)}
    root: dict[torch.fx.Node, torch.fx.Node] = {}
    hazards: set[torch.fx.Node] = set()
    for node in part.nodes:
        target = node.args[0] if node.args else None
        root[node] = node
        if not isinstance(target, torch.fx.Node) or not has_tensors(part.facts[target]):
            continue
        module = module_of(node)
        # An untraced leaf may give something else: later reads were not redirected to its result.
        writes = node.meta.get(WRITES, False)
        in_place = writes or is_in_place(node, module)
        tensors = [n for n in node.all_input_nodes if n in root]
        kind = kind_of_module(module) if module else kind_of_call(node, len(tensors))
        if in_place or may_alias(node, kind, module):
            root[node] = root[target]
        if in_place:
            apart = (node,) if writes else (node, target)
            same = [n for n in root if root[n] is root[target] and n not in apart]
            read_later = [n for n in same if any(order[u] > order[node] for u in n.users)]
            if read_later:
                hazards |= {node, *read_later}
    return hazards
