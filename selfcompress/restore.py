"""Check that a saved state fits a fresh model and its optimiser, and plan the cut to its shape."""

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.planner import make_plan
from selfcompress.surgery import Plan


def plan_towards(state: dict[str, Any], graph: ChannelGraph, model: nn.Module) -> Plan:
    """Return the plan that cuts an uncut `model` to the shape of the saved one.

    Args:
        state: what `Compressor.state_dict` returned.
        graph: the channel graph of `model`.
        model: a freshly quantised model.

    Raises:
        ValueError: the state is of another model.
    """
    removed, silent, rows = state["removed"].numpy(), state["silent"].numpy(), state["rows"]
    for name in rows.keys() ^ graph.origin.keys():
        where = "this one" if name in graph.origin else "the saved one"
        raise ValueError(
            f"the saved state is of another model: {name} is quantised and followed in {where} "
            "alone (was exclude= the same?)"
        )
    if removed.shape != graph.removed.shape:
        raise ValueError(
            "the saved state is of another model: its channels do not match (where forward() "
            "goes by values, build it with the seed and the example_input of before)"
        )
    fits = all((kept < len(graph.origin[name])).all() for name, kept in rows.items())
    if not fits or state["model"].keys() != model.state_dict().keys():
        raise ValueError("the saved state is of another model: its layers do not match")
    by_layer = {name: r.numpy() for name, r in rows.items()}
    unread = {
        name: ~np.isin(graph.columns[name], kept.numpy())
        for name, kept in state.get("columns", {}).items()
    }
    plan = make_plan(graph, model, removed, silent, by_layer, unread)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # what a module's get_extra_state() returns
            continue
        shape = list(tensor.shape)
        for dim, kept in plan.keep.get(name, []):
            shape[dim] = len(kept)
        saved = state["model"].get(name)
        if not isinstance(saved, Tensor) or list(saved.shape) != shape:
            raise ValueError(f"the saved state is of another model: {name} does not match")
    return plan


def require_same_kind(state: dict[str, Any], optimizer: Optimizer) -> None:
    """Check that `optimizer` has the type and the parameter groups of the saved one.

    Raises:
        ValueError: the type, or the number of parameters in a group, is another.
    """
    if state["optimizer_type"] != type(optimizer).__name__:
        raise ValueError(
            f"the state holds {state['optimizer_type']}, not {type(optimizer).__name__}"
        )
    saved = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    if saved != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError("the saved optimiser has other parameter groups")


def require_same_order(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> None:
    """Check that `optimizer` has its parameters in the order of the saved one, judging by shapes.

    Raises:
        ValueError: a saved state tensor, such as a moment, is not of its parameter's saved shape.
    """
    saved = {id(p): state["model"][name].shape for name, p in model.named_parameters()}
    shapes = [saved.get(id(p), p.shape) for g in optimizer.param_groups for p in g["params"]]
    for index, kept in state["optimizer"]["state"].items():
        for value in kept.values():
            if isinstance(value, Tensor) and value.dim() and value.shape != shapes[index]:
                raise ValueError(
                    "the saved optimiser had its parameters in another order: make this one over "
                    "weights() as that one was made"
                )
