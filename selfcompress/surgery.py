"""Cut a model and its optimisers down to what a plan keeps.

A plan consists of names of tensors and the indices to keep, as plain data, so that it can be
applied to the model and to averages of it. `graph/planner.py` makes plans; applying one needs no
channel graph.
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

from selfcompress.layers.batch_norms import PlacedBatchNorm, recount
from selfcompress.layers.kinds import EMBEDDINGS
from selfcompress.layers.placing import Placed, layout_of
from selfcompress.layers.quantized import QuantConv

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
            grouped convolution, group after group. None for layers left in float, embeddings and
            instance norms; `rows` means nothing for the latter.
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
        rows, columns: module name → kept row, or column, indices, to update the channel graph with.
        removed: the channel ids that the cut removes, in the numbering of the channel graph.
        silent: ids of dead channels that keep their place in the tensors, but need not be computed
            or read any more.
    """

    keep: dict[str, list[tuple[int, Index]]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    wiring: dict[str, Wiring] = field(default_factory=dict)
    rows: dict[str, Index] = field(default_factory=dict)
    columns: dict[str, Index] = field(default_factory=dict)
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
