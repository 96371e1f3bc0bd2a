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
"""Those whose state is known to be one number, or one for each element of a parameter."""


@dataclass(frozen=True)
class Wiring:
    """How a module sits among its channels after the cut.

    Attributes:
        in_width, out_width: channels of its input and output tensors.
        rows: the output channel that each row or entry computes.
        columns: the input channel that each column or entry of a batch norm reads, of a grouped
            convolution group after group; None for layers left in float, and embeddings.
        groups: of a grouped convolution, the group of each row.
    """

    in_width: int
    out_width: int
    rows: Index
    columns: Index | None = None
    groups: Index | None = None


@dataclass(frozen=True)
class Plan:
    """What stays, as plain data: it can be printed, and is JSON by `dataclasses.asdict`.

    Attributes:
        keep: name of a parameter or buffer → [(dim, kept indices)].
        shapes: the shapes of these tensors before the cut.
        wiring: module name → how it is wired afterwards.
        rows: module name → kept row indices, to bring the channel graph up to date.
        removed: the channel ids that go with this plan, in the numbering of the channel graph.
        silent: channel ids that have to keep their places, as zeros that nobody computes or reads.
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
    """The plan that removes all that `alive` says is not.

    A channel that has to keep its place stays as a zero that nobody computes or reads. With a
    `multiple` above 1, so do, for speed, as many as it takes for tensors to have a multiple of it,
    and for batch norms and depthwise convolutions to make the channels that they read.
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
    """The plan that removes channel ids and keeps just the given rows of each module.

    Args:
        removed: (number of ids at the start,) bool; see `removable`.
        silent: the same, of channels that keep their places but are read no more.
        rows: module name → indices, for every module that may lose rows.
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
                if not stays.all():  # forward() may have put a longer buffer in its place
                    self._keep(node.tensor, node.tensor_dim, np.flatnonzero(stays))
            if isinstance(self.modules.get(node.module), _InstanceNorm):
                stays = ~self.removed[self.graph.ids[node.name]]
                if not stays.all():  # it has no tensors, but says how many channels it is for
                    self.plan.wiring[node.module] = Wiring(len(stays), int(stays.sum()), [])
            if node.kind in WITH_ROWS and node.module not in in_graph:
                in_graph.add(node.module)
                ins, outs = self.graph.reads(node), self.graph.ids[node.name]
                self._wire(node.module, ~self.removed[ins], ~self.silent[ins], ~self.removed[outs])
        # Layers that could not be followed can still lose rows, leaving gaps.
        for name in self.plan.rows.keys() - in_graph:
            module = self.modules[name]
            assert isinstance(module, QuantizedLayer)
            ins, outs = np.ones(module.in_width, bool), np.ones(module.out_width, bool)
            self._wire(name, ins, ins, outs)
        return self.plan

    def _wire(
        self, name: str, in_stays: np.ndarray, in_sounds: np.ndarray, out_stays: np.ndarray
    ) -> None:
        """Plan one layer or norm, by which channels stay or are silent."""
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
        # All groups lose the same columns; without any group there is nothing to read.
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
    """Cut `model` and the state of its optimisers down to what `plan` keeps.

    The model may be another than the plan was made for: a fresh one that is quantised, or an
    average of the weights, as long as it has the shape that the other one had.

    Parameters get new tensors (gradients indexed along); in the optimisers the new parameter
    takes the old one's place in its group and inherits its state, indexed the same way.

    Raises:
        TypeError: an optimiser is not supported, or has state of an unknown shape; nothing has
            been changed then.
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
            vars(new).update(vars(old))  # what the user noted on it
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
    """Refuse a model that `plan` was not made for.

    Raises:
        ValueError: a tensor of the plan is missing, or of another shape.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, shape in plan.shapes.items():
        if name not in tensors or list(tensors[name].shape) != shape:
            raise ValueError(f"the plan does not fit the model: {name} is not of shape {shape}")


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse, by name, an optimiser whose state we do not know how to cut.

    Raises:
        TypeError: it is not one of `OPTIMIZERS`, or holds a tensor of unknown shape.
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
    """Tell a module, whose tensors are cut already, how it sits among its channels."""
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
    """Whether every channel has the same index in the input and in the output."""
    return wiring.in_width == wiring.out_width and wiring.rows == wiring.columns
