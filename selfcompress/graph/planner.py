"""Plan a cut: what every tensor and layer keeps, given what is alive and what can be removed."""

import numpy as np
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.fast_widths import without_what_is_fast
from selfcompress.graph.liveness import Liveness
from selfcompress.graph.ops import WITH_ROWS
from selfcompress.graph.removable import removable
from selfcompress.layers.batch_norms import NORM_ENTRIES, PlacedBatchNorm
from selfcompress.layers.kinds import EMBEDDINGS, FLOAT_LAYERS
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.surgery import Plan, Wiring


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
    return make_plan(graph, model, removed, alive.gone & ~removed, rows, alive.unread)


def make_plan(
    graph: ChannelGraph,
    model: nn.Module,
    removed: np.ndarray,
    silent: np.ndarray,
    rows: dict[str, np.ndarray],
    unread: dict[str, np.ndarray],
) -> Plan:
    """Return the plan that removes channel ids and keeps only the given rows of each module.

    Args:
        removed: (number of ids at the start,) bool: channels to remove; see `removable`.
        silent: (number of ids at the start,) bool: channels that keep their places but are not
            read any more.
        rows: module name → kept row indices, for every module that may lose rows.
        unread: layer name → (input channels now,) bool: those whose columns it loses, beside those
            of channels that are removed or silent.
    """
    return _Planner(graph, model, removed, silent, rows, unread).run()


class _Planner:
    def __init__(
        self,
        graph: ChannelGraph,
        model: nn.Module,
        removed: np.ndarray,
        silent: np.ndarray,
        rows: dict[str, np.ndarray],
        unread: dict[str, np.ndarray],
    ) -> None:
        self.graph, self.removed, self.silent, self.unread = graph, removed, silent, unread
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
                sounds = ~self.silent[ins] & ~self.unread.get(node.module, np.zeros(1, bool))
                self._wire(node.module, ~self.removed[ins], sounds, ~self.removed[outs])
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
            in_sounds: (input channels,) bool: neither silent nor unread.
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
            if name in self.graph.columns:
                self.plan.columns[name] = read.tolist()
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
