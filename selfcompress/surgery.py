"""Plan what to cut, as plain data, and apply a plan to a model and its optimisers.

A plan speaks of tensors by name and of kept indices, so that the same plan can be applied to the
model, to an average of it, or on every process of many; making it needs the channel graph,
applying it does not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from selfcompress.channels import ChannelGraph, Kind
from selfcompress.layers import PlacedBatchNorm2d, QuantizedLayer
from selfcompress.liveness import Liveness

Index = list[int]


@dataclass(frozen=True)
class Wiring:
    """How a module sits among its channels after the cut.

    Attributes:
        in_width, out_width: channels of its input and output tensors.
        columns: the input channel that each entry of a batch norm reads; None for a layer.
        rows: the output channel that each row or entry computes.
    """

    in_width: int
    out_width: int
    columns: Index | None
    rows: Index


@dataclass(frozen=True)
class Plan:
    """What stays.

    Attributes:
        keep: name of a parameter or buffer → [(dim, kept indices)].
        wiring: module name → how it is wired afterwards.
        rows: module name → kept row indices, to bring the channel graph up to date.
        removed: (number of ids at the start,) bool: the channel ids that go with this plan.
    """

    keep: dict[str, list[tuple[int, Index]]] = field(default_factory=dict)
    wiring: dict[str, Wiring] = field(default_factory=dict)
    rows: dict[str, Index] = field(default_factory=dict)
    removed: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def __bool__(self) -> bool:
        return bool(self.keep)


def plan_cut(graph: ChannelGraph, model: nn.Module, alive: Liveness) -> Plan:
    """The plan that removes all that `alive` says is not.

    No tensor ever loses its last channel: where all are gone one stays, as a zero that nothing
    computes. (Pooling and convolution refuse tensors without channels.)
    """
    removed = alive.gone.copy()
    for ids in graph.ids.values():
        if len(ids) and removed[ids].all():
            removed[ids[0]] = False
    rows = {name: np.flatnonzero(live) for name, live in alive.rows.items()}
    return make_plan(graph, model, removed, rows)


def make_plan(
    graph: ChannelGraph, model: nn.Module, removed: np.ndarray, rows: dict[str, np.ndarray]
) -> Plan:
    """The plan that removes the given channel ids and keeps just the given rows of each module."""
    modules = dict(model.named_modules())
    plan = Plan(rows={name: kept.tolist() for name, kept in rows.items()}, removed=removed)
    in_graph: set[str] = set()

    def keep(module: str, tensors: Iterable[str], dim: int, kept: np.ndarray) -> None:
        for name in tensors:
            tensor = getattr(modules[module], name)
            if tensor is not None and len(kept) < tensor.shape[dim]:
                plan.keep.setdefault(f"{module}.{name}", []).append((dim, kept.tolist()))

    for node in graph.nodes:
        if node.kind not in (Kind.LAYER, Kind.NORM):
            continue
        module, name = modules[node.module], node.module
        in_graph.add(name)
        in_stays = ~removed[graph.ids[node.inputs[0]]]
        out_stays = ~removed[graph.ids[node.name]]
        new_in, new_out = np.cumsum(in_stays) - 1, np.cumsum(out_stays) - 1
        ins, outs = np.flatnonzero(in_stays), np.flatnonzero(out_stays)
        columns: Index | None = None
        if isinstance(module, PlacedBatchNorm2d):
            keep(name, ("weight", "bias", "running_mean", "running_var"), 0, rows[name])
            columns = new_in[module.columns.cpu().numpy()[rows[name]]].tolist()
            positions = new_out[module.rows.cpu().numpy()[rows[name]]].tolist()
        elif isinstance(module, QuantizedLayer):
            keep(name, ("weight", "bit_depth", "exponent"), 0, rows[name])
            keep(name, ("weight",), 1, ins)
            keep(name, ("bias",), 0, outs)
            positions = new_out[module.rows.cpu().numpy()[rows[name]]].tolist()
        else:
            keep(name, ("weight", "bias"), 0, outs)
            keep(name, ("weight",), 1, ins)
            positions = list(range(len(outs)))
        plan.wiring[name] = Wiring(len(ins), len(outs), columns, positions)
    # Layers whose channels are frozen on all sides can still lose rows, leaving gaps.
    for name in rows.keys() - in_graph:
        module = modules[name]
        assert isinstance(module, QuantizedLayer)
        keep(name, ("weight", "bit_depth", "exponent"), 0, rows[name])
        in_width = module.weight.shape[1]
        positions = module.rows.cpu().numpy()[rows[name]].tolist()
        plan.wiring[name] = Wiring(in_width, module.out_width, None, positions)
    return plan


@torch.no_grad()
def apply_plan(plan: Plan, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
    """Cut `model` and the state of its optimisers down to what `plan` keeps.

    Parameters get new tensors (gradients indexed along); in the optimisers the new parameter
    takes the old one's place in its group and inherits its state, indexed the same way.

    Raises:
        TypeError: an optimiser is not supported, or has state of an unknown shape; nothing has
            been changed then.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        check_optimizer(optimizer)
    renewed: dict[nn.Parameter, tuple[nn.Parameter, list[tuple[int, Index]]]] = {}
    for full_name, cuts in plan.keep.items():
        module_name, _, name = full_name.rpartition(".")
        module = model.get_submodule(module_name)
        old = getattr(module, name)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(_select(old.detach(), cuts), requires_grad=old.requires_grad)
            new.grad = None if old.grad is None else _select(old.grad, cuts)
            setattr(module, name, new)
            renewed[old] = (new, cuts)
        else:
            setattr(module, name, _select(old, cuts))
    for optimizer in optimizers:
        _cut_optimizer(optimizer, renewed)
    for module_name, wiring in plan.wiring.items():
        _rewire(model.get_submodule(module_name), wiring)


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse, by name, an optimiser whose state we do not know how to cut.

    Raises:
        TypeError: it is not SGD, Adam or AdamW, or holds a tensor of unknown shape.
    """
    kind = type(optimizer)
    if kind not in (SGD, Adam, AdamW):
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} is not supported: channels are cut out of the "
            "state of torch.optim.SGD, Adam and AdamW only"
        )
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise TypeError(
                    f"{kind.__qualname__} holds {name!r} of shape {tuple(value.shape)} for a "
                    f"parameter of shape {tuple(parameter.shape)}: do not know how to cut it"
                )


def _select(tensor: Tensor, cuts: list[tuple[int, Index]]) -> Tensor:
    layout = torch.contiguous_format
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    for dim, kept in cuts:
        tensor = tensor.index_select(dim, torch.tensor(kept, dtype=torch.int64).to(tensor.device))
    return tensor.contiguous(memory_format=layout)


def _cut_optimizer(
    optimizer: Optimizer,
    renewed: dict[nn.Parameter, tuple[nn.Parameter, list[tuple[int, Index]]]],
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [renewed[p][0] if p in renewed else p for p in group["params"]]
    for old, (new, cuts) in renewed.items():
        if old in optimizer.state:
            optimizer.state[new] = {
                name: _select(value, cuts) if isinstance(value, Tensor) and value.dim() else value
                for name, value in optimizer.state.pop(old).items()
            }


def _rewire(module: nn.Module, wiring: Wiring) -> None:
    if isinstance(module, nn.Conv2d):
        module.in_channels, module.out_channels = wiring.in_width, wiring.out_width
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = wiring.in_width, wiring.out_width
    elif isinstance(module, PlacedBatchNorm2d):
        assert wiring.columns is not None
        module.num_features = len(wiring.rows)
        module.in_width, module.out_width = wiring.in_width, wiring.out_width
        module.columns = torch.tensor(wiring.columns, dtype=torch.int64).to(module.columns.device)
    if isinstance(module, QuantizedLayer | PlacedBatchNorm2d):
        module.rows = torch.tensor(wiring.rows, dtype=torch.int64).to(module.rows.device)
