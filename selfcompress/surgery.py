"""Plan what to cut, as plain data, and apply a plan to a model and its optimisers.

A plan consists of names of tensors and the indices to keep, so that the same plan can be applied to
the model, to an average of it, or in each of several processes. Making a plan needs the channel
graph; applying it does not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import (
    SGD,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.fast_widths import without_what_is_fast
from selfcompress.graph.liveness import Liveness
from selfcompress.graph.ops import WITH_ROWS
from selfcompress.graph.removable import removable
from selfcompress.layers.batch_norms import NORM_ENTRIES, PlacedBatchNorm, recount
from selfcompress.layers.kinds import EMBEDDINGS, FLOAT_LAYERS
from selfcompress.layers.placing import Placed, layout_of
from selfcompress.layers.quantized import QuantConv, QuantizedLayer

Index = list[int]

OPTIMIZERS = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad)
"""Optimisers whose state is known to be scalars or tensors of the shape of their parameter."""


@dataclass(frozen=True)
class Wiring:
    """Which channels a module reads and computes after a cut.

    Attributes:
        in_width, out_width: numbers of channels of its input and output tensors.
        rows: the output channel that each row, or each entry of a batch norm, computes.
        columns: the input channel that each column, or each entry of a batch norm, reads; in a
            grouped convolution, group after group. None for layers left in float, and embeddings.
        groups: the group of each row in a grouped convolution; None for other modules.
    """

    in_width: int
    out_width: int
    rows: Index
    columns: Index | None = None
    groups: Index | None = None


@dataclass(frozen=True)
class Plan:
    """What a cut keeps, as plain data: it can be printed, and `dataclasses.asdict` makes it JSON.

    Attributes:
        keep: name of a parameter or buffer → [(dim, kept indices)].
        shapes: the shapes of these tensors before the cut.
        wiring: module name → which channels it reads and computes after the cut.
        rows: module name → kept row indices, to update the channel graph with.
        removed: the channel ids that the cut removes, in the numbering of the channel graph.
        silent: ids of dead channels that keep their place in the tensors, but need not be computed
            or read any more.
    """

    keep: dict[str, list[tuple[int, Index]]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    wiring: dict[str, Wiring] = field(default_factory=dict)
    rows: dict[str, Index] = field(default_factory=dict)
    removed: Index = field(default_factory=list)
    silent: Index = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.keep or self.removed)

    def __str__(self) -> str:
        lines = [
            f"{name}: keeps " + ", ".join(f"{len(kept)} of dim {dim}" for dim, kept in cuts)
            for name, cuts in self.keep.items()
        ]
        if self and not lines:
            lines = [f"{len(self.removed)} channels that nothing was left of"]
        return "\n".join(lines) or "nothing to cut"


def plan_cut(graph: ChannelGraph, model: nn.Module, alive: Liveness, multiple: int = 1) -> Plan:
    """Return the plan that removes all rows and channels that are not alive.

    A dead channel that cannot be removed becomes `silent`: it keeps its place in the tensors, but
    need not be computed or read. With a `multiple` above 1, more dead channels keep their places,
    for speed: as many as it takes for tensors to have a multiple of it, and for batch norms and
    depthwise convolutions to make the channels that they read.
    """
    removed = removable(graph, alive.gone, alive.rows, model)
    if multiple > 1:
        removed = without_what_is_fast(graph, model, alive.rows, removed, multiple)
    rows = {name: np.flatnonzero(live) for name, live in alive.rows.items()}
    return make_plan(graph, model, removed, alive.gone & ~removed, rows)


def make_plan(
    graph: ChannelGraph,
    model: nn.Module,
    removed: np.ndarray,
    silent: np.ndarray,
    rows: dict[str, np.ndarray],
) -> Plan:
    """Return the plan that removes channel ids and keeps only the given rows of each module.

    Args:
        removed: (number of ids at the start,) bool: channels to remove; see `removable`.
        silent: (number of ids at the start,) bool: channels that keep their places but are not
            read any more.
        rows: module name → kept row indices, for every module that may lose rows.
    """
    return _Planner(graph, model, removed, silent, rows).run()


class _Planner:
    def __init__(
        self,
        graph: ChannelGraph,
        model: nn.Module,
        removed: np.ndarray,
        silent: np.ndarray,
        rows: dict[str, np.ndarray],
    ) -> None:
        self.graph, self.removed, self.silent = graph, removed, silent
        self.modules = dict(model.named_modules())
        self.plan = Plan(
            rows={name: kept.tolist() for name, kept in rows.items()},
            removed=np.flatnonzero(removed).tolist(),
            silent=np.flatnonzero(silent).tolist(),
        )

    def run(self) -> Plan:
        in_graph: set[str] = set()
        for node in self.graph.nodes:
            if node.tensor:
                stays = ~self.removed[self.graph.ids[node.name]]
                if not stays.all():  # else leave it: forward() may have put in a longer buffer
                    self._keep(node.tensor, node.tensor_dim, np.flatnonzero(stays))
            if isinstance(self.modules.get(node.module), _InstanceNorm):
                stays = ~self.removed[self.graph.ids[node.name]]
                if not stays.all():  # it has no tensors to cut, but a number of channels
                    self.plan.wiring[node.module] = Wiring(len(stays), int(stays.sum()), [])
            if node.kind in WITH_ROWS and node.module not in in_graph:
                in_graph.add(node.module)
                ins, outs = self.graph.reads(node), self.graph.ids[node.name]
                self._wire(node.module, ~self.removed[ins], ~self.silent[ins], ~self.removed[outs])
        # Layers that are not in the graph can still lose rows, which leaves gaps in their output.
        for name in self.plan.rows.keys() - in_graph:
            module = self.modules[name]
            assert isinstance(module, QuantizedLayer)
            ins, outs = np.ones(module.in_width, bool), np.ones(module.out_width, bool)
            self._wire(name, ins, ins, outs)
        return self.plan

    def _wire(
        self, name: str, in_stays: np.ndarray, in_sounds: np.ndarray, out_stays: np.ndarray
    ) -> None:
        """Plan the cut of one layer or batch norm.

        Args:
            in_stays: (input channels,) bool: not removed.
            in_sounds: (input channels,) bool: not silent.
            out_stays: (output channels,) bool: not removed.
        """
        module = self.modules[name]
        new_in, new_out = np.cumsum(in_stays) - 1, np.cumsum(out_stays) - 1
        ins, outs = np.flatnonzero(in_stays), np.flatnonzero(out_stays)
        widths = len(ins), len(outs)
        if not isinstance(module, QuantizedLayer | PlacedBatchNorm):
            assert isinstance(module, FLOAT_LAYERS)
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            self._keep(f"{name}.weight", int(transposed), outs)
            self._keep(f"{name}.weight", 1 - int(transposed), ins)
            self._keep(f"{name}.bias", 0, outs)
            self.plan.wiring[name] = Wiring(*widths, outs.tolist())
            return
        rows = np.array(self.plan.rows[name], np.int64)
        placed = new_out[module.rows.numpy(force=True)[rows]].tolist()
        if isinstance(module, PlacedBatchNorm):
            for tensor in NORM_ENTRIES:
                self._keep(f"{name}.{tensor}", 0, rows)
            columns = new_in[module.columns.numpy(force=True)[rows]].tolist()
            self.plan.wiring[name] = Wiring(*widths, placed, columns)
            return
        for tensor in ("bit_depth", "exponent"):
            self._keep(f"{name}.{tensor}", 0, rows)
        self._keep(f"{name}.weight", module.row_dim, rows)
        self._keep(f"{name}.bias", 0, outs)
        if isinstance(module, EMBEDDINGS):
            self.plan.wiring[name] = Wiring(*widths, placed)
            return
        columns = module.columns.numpy(force=True)
        if not module.grouped:
            read = np.flatnonzero((in_stays & in_sounds)[columns])
            self._keep(f"{name}.weight", module.fan_in_dim, read)
            self.plan.wiring[name] = Wiring(*widths, placed, new_in[columns[read]].tolist())
            return
        of_row = module.row_groups.numpy(force=True)[rows]
        live, groups = np.unique(of_row, return_inverse=True)
        table = columns.reshape(module.groups, -1)[live]  # what each group reads
        # All groups lose the same columns. If no group is left, no column is.
        stays = in_stays[table].all(0) & bool(len(live))
        self._keep(f"{name}.weight", 1, np.flatnonzero(stays))
        columns = new_in[table[:, stays]].ravel().tolist()
        self.plan.wiring[name] = Wiring(*widths, placed, columns, groups.tolist())

    def _keep(self, name: str, dim: int, kept: np.ndarray) -> None:
        owner, _, key = name.rpartition(".")
        tensor = getattr(self.modules[owner], key)
        if tensor is not None and len(kept) < tensor.shape[dim]:
            self.plan.keep.setdefault(name, []).append((dim, kept.tolist()))
            self.plan.shapes[name] = list(tensor.shape)


@torch.no_grad()
def apply_plan(plan: Plan, model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
    """Cut `model` and the state of its optimisers, in place, down to what `plan` keeps.

    The model may be another one than the plan was made for (a freshly quantised one, or an average
    of the weights) if its tensors have the shapes that those of the other had before the cut.

    Parameters are replaced by new ones, with the kept part of the gradient and the same hooks. In
    the optimisers, a new parameter takes the old one's place in its group and the kept part of its
    state.

    Raises:
        TypeError: an optimiser is not supported, or has state of an unknown shape; nothing has
            been changed.
        ValueError: the model does not have the tensors of the plan; nothing has been changed.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        check_optimizer(optimizer)
    check_fits(plan, model)
    renewed: dict[nn.Parameter, tuple[nn.Parameter, list[tuple[int, Index]]]] = {}
    for full_name, cuts in plan.keep.items():
        module_name, _, name = full_name.rpartition(".")
        module = model.get_submodule(module_name)
        old = getattr(module, name)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(_select(old.detach(), cuts), requires_grad=old.requires_grad)
            new.grad = None if old.grad is None else _select(old.grad, cuts)
            new._backward_hooks = old._backward_hooks
            new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
            vars(new).update(vars(old))  # attributes that the user has set on it
            setattr(module, name, new)
            renewed[old] = (new, cuts)
        else:
            setattr(module, name, _select(old, cuts))
        recount(module, getattr(module, name))
    for optimizer in optimizers:
        _cut_optimizer(optimizer, renewed)
    for module_name, wiring in plan.wiring.items():
        rewire(model.get_submodule(module_name), wiring)


def check_fits(plan: Plan, model: nn.Module) -> None:
    """Check that `model` has the tensors that `plan` cuts, in their shapes before the cut.

    Raises:
        ValueError: a tensor of the plan is missing, or of another shape.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, shape in plan.shapes.items():
        if name not in tensors or list(tensors[name].shape) != shape:
            raise ValueError(f"the plan does not fit the model: {name} is not of shape {shape}")


def check_optimizer(optimizer: Optimizer) -> None:
    """Check that the state of `optimizer` can be cut along with its parameters.

    Raises:
        TypeError: it is not one of `OPTIMIZERS`, or holds a tensor in another shape than its
            parameter's.
    """
    kind = type(optimizer)
    if kind not in OPTIMIZERS:
        known = ", ".join(k.__name__ for k in OPTIMIZERS)
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} is not supported: channels are cut out of the "
            f"state of these of torch.optim only: {known}"
        )
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise TypeError(
                    f"{kind.__qualname__} holds {name!r} of shape {tuple(value.shape)} for a "
                    f"parameter of shape {tuple(parameter.shape)}: do not know how to cut it"
                )


def _select(tensor: Tensor, cuts: list[tuple[int, Index]]) -> Tensor:
    layout = layout_of(tensor)
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


def rewire(module: nn.Module, wiring: Wiring) -> None:
    """Set the sizes and channel indices of a module whose tensors have been cut already."""
    if isinstance(module, nn.modules.conv._ConvNd):
        module.in_channels, module.out_channels = wiring.in_width, wiring.out_width
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = wiring.in_width, wiring.out_width
    elif isinstance(module, EMBEDDINGS):
        module.embedding_dim = wiring.out_width
    elif isinstance(module, _InstanceNorm):
        module.num_features = wiring.out_width
    elif isinstance(module, PlacedBatchNorm):
        module.num_features = len(wiring.rows)
        module.in_width, module.out_width = wiring.in_width, wiring.out_width
        module.keeps_places = _keeps_places(wiring)
    if isinstance(module, Placed):
        module.rows = torch.tensor(wiring.rows, dtype=torch.int64).to(module.rows.device)
    if wiring.columns is not None:
        assert isinstance(module, Placed)
        columns = torch.tensor(wiring.columns, dtype=torch.int64)
        module.columns = columns.to(module.columns.device)
    if isinstance(module, QuantConv) and wiring.groups is not None:
        counts = np.bincount(wiring.groups) if wiring.groups else np.ones(1, np.int64)
        module.groups, module.group_width = len(counts), int(counts.max())
        depthwise = len(set(module.at_start)) == 1
        module.keeps_places = depthwise and _keeps_places(wiring)
        first = np.cumsum(counts) - counts
        within = np.arange(len(wiring.groups)) - first[wiring.groups]
        slots = np.array(wiring.groups, np.int64) * module.group_width + within
        module.slots = torch.from_numpy(slots.astype(np.int64)).to(module.slots.device)


def _keeps_places(wiring: Wiring) -> bool:
    """Return whether every channel has the same index in the input and in the output."""
    return wiring.in_width == wiring.out_width and wiring.rows == wiring.columns
