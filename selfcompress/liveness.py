"""What is still alive: dead rows, constant channels, and channels that are silent or unread.

A row without bits outputs exactly its bias. Such constants are followed through the channel
graph, in the same way for training and evaluation: `settle_statistics` gives batch norms that
read a constant c the statistics it has (mean c, variance 0), so that they output β in both.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from selfcompress.channels import ChannelGraph, Kind, Node
from selfcompress.layers import PlacedBatchNorm2d, QuantizedLayer


@dataclass(frozen=True)
class Liveness:
    """The state of every channel of a network at one moment.

    Attributes:
        rows: module name → (rows now,) bool: the rows that must stay, for every module that may
            lose rows.
        gone: (number of ids at the start,) bool: channels nobody misses: silent (what their
            readers see is 0 and stays 0) or unread.
        constant: node name → (channels,) the constant each channel is, NaN where it varies.
        lingering: name of a bias → positions in it that are all that keeps their channels: driven
            to zero, they let the channels go.
    """

    rows: dict[str, np.ndarray]
    gone: np.ndarray
    constant: dict[str, np.ndarray]
    lingering: dict[str, np.ndarray]


def analyse(graph: ChannelGraph, model: nn.Module) -> Liveness:
    """Find what is alive in `model`, whose channels are those of `graph` now."""
    return _Analysis(graph, model).run()


@torch.no_grad()
def settle_statistics(graph: ChannelGraph, model: nn.Module) -> None:
    """Give batch norms that read constant channels the true statistics: mean c, variance 0.

    Changes what the network computes in evaluation, to what it computes in training; so it is a
    step of its own, before a cut.
    """
    constant = analyse(graph, model).constant
    for node in graph.of_kind(Kind.NORM):
        norm = model.get_submodule(node.module)
        assert isinstance(norm, PlacedBatchNorm2d)
        if norm.running_mean is None or norm.running_var is None:
            continue
        read = torch.from_numpy(constant[node.inputs[0]]).to(norm.running_mean)[norm.columns]
        fixed = ~read.isnan()
        norm.running_mean[fixed] = read[fixed]
        norm.running_var[fixed] = 0


class _Analysis:
    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.users: dict[str, list[Node]] = {node.name: [] for node in graph.nodes}
        for node in graph.nodes:
            for name in node.inputs:
                self.users[name].append(node)
        self.rows: dict[str, np.ndarray] = {}
        for name in graph.origin:
            module = self.modules[name]
            if isinstance(module, QuantizedLayer):
                self.rows[name] = module.live_rows().cpu().numpy()
            elif isinstance(module, PlacedBatchNorm2d):
                self.rows[name] = np.ones(module.num_features, bool)

    def run(self) -> Liveness:
        # What dies can starve or strand its neighbours, so look again until nothing changes.
        while True:
            before = {name: live.copy() for name, live in self.rows.items()}
            self.constant = self._follow_constants()
            self.replaceable = self._replaceable_by_zero()
            unread = ~self._read() & ~self.graph.frozen
            self._drop(unread)
            if all((live == before[name]).all() for name, live in self.rows.items()):
                break
        silent = ~self._carried() & ~self.graph.frozen
        gone = (unread | silent) & ~self.graph.removed
        return Liveness(self.rows, gone, self.constant, self._lingering(gone))

    def _follow_constants(self) -> dict[str, np.ndarray]:
        constant: dict[str, np.ndarray] = {}
        for node in self.graph.nodes:
            inputs = [constant[name] for name in node.inputs]
            value = np.full(len(self.graph.ids.get(node.name, ())), np.nan)
            match node.kind:
                case Kind.LAYER:
                    value[:] = self._bias(node)
                    value[self._positions(node)[self._live(node)]] = np.nan
                case Kind.NORM:
                    read = inputs[0][self._columns(node)]
                    value[:] = 0
                    value[self._positions(node)] = np.where(
                        np.isnan(read), np.nan, self._bias(node)
                    )
                case Kind.ELEMENTWISE:
                    value = np.where(np.isnan(inputs[0]), np.nan, _evaluate(node, inputs[0]))
                case Kind.SPATIAL:
                    value = np.where(inputs[0] == 0, 0.0, np.nan)
                case Kind.ADD:
                    value = np.sum(inputs, axis=0)
                case Kind.CAT:
                    value = np.concatenate(inputs)
                case Kind.FLATTEN:
                    value = np.repeat(inputs[0], len(value) // len(inputs[0]))
            constant[node.name] = value
        return constant

    def _replaceable_by_zero(self) -> dict[str, np.ndarray]:
        """Node name → (channels,) bool: with 0 there, the network would compute the same.

        Either the constant is 0, or all that reads it turns 0 into 0 and is itself replaceable:
        a constant β ≤ 0 in front of a ReLU.
        """
        replaceable: dict[str, np.ndarray] = {}
        for node in reversed(self.graph.nodes):
            constant = self.constant[node.name]
            through = ~np.isnan(constant) & bool(self.users[node.name])
            for user in self.users[node.name]:
                if user.kind is Kind.SPATIAL or (
                    user.kind is Kind.ELEMENTWISE
                    and (_evaluate(user, np.zeros(len(constant))) == 0).all()
                ):
                    through &= replaceable[user.name]
                else:
                    through[:] = False
            replaceable[node.name] = (constant == 0) | through
        return replaceable

    def _read(self) -> np.ndarray:
        """(ids,) bool: some live row or entry reads the channel."""
        read = np.zeros(len(self.graph.frozen), bool)
        for node in self.graph.nodes:
            if node.kind is Kind.LAYER and self._live(node).any():
                read[self.graph.ids[node.inputs[0]]] = True
            elif node.kind is Kind.NORM:
                columns = self._columns(node)[self._live(node)]
                read[self.graph.ids[node.inputs[0]][columns]] = True
        return read

    def _drop(self, unread: np.ndarray) -> None:
        """Let rows go that see nothing, that nobody reads, or whose constant can be a zero."""
        for node in self.graph.nodes:
            if node.module not in self.rows or node.kind not in (Kind.LAYER, Kind.NORM):
                continue
            live, positions = self._live(node), self._positions(node)
            read = self.constant[node.inputs[0]]
            live &= ~unread[self.graph.ids[node.name][positions]]
            if node.kind is Kind.LAYER:
                live &= bool((read != 0).any())
            else:
                fixed = ~np.isnan(read[self._columns(node)])
                live &= ~(fixed & self.replaceable[node.name][positions])

    def _carried(self) -> np.ndarray:
        """(ids,) bool: something is on the channel, or a norm entry that stays needs its place."""
        carried = np.zeros(len(self.graph.frozen), bool)
        for node in self.graph.nodes:
            if node.kind is Kind.ELEMENTWISE:  # one that makes something of nothing, f(0) != 0
                made = ~np.isnan(self.constant[node.name]) & ~self.replaceable[node.name]
                carried[self.graph.ids[node.name][made]] = True
            if node.kind not in (Kind.LAYER, Kind.NORM):
                continue
            live, ids = self._live(node), self.graph.ids[node.name]
            carried[ids[self._positions(node)[live]]] = True
            if node.kind is Kind.LAYER:
                carried[ids[~self.replaceable[node.name]]] = True
            else:
                carried[self.graph.ids[node.inputs[0]][self._columns(node)[live]]] = True
        return carried

    def _lingering(self, gone: np.ndarray) -> dict[str, np.ndarray]:
        lingering = {}
        for node in self.graph.nodes:
            if node.module not in self.rows or node.kind not in (Kind.LAYER, Kind.NORM):
                continue
            # A norm takes its input's constant away again: no need to drive that one to zero.
            only_normed = all(user.kind is Kind.NORM for user in self.users[node.name])
            if only_normed or getattr(self.modules[node.module], "bias", None) is None:
                continue
            ids = self.graph.ids[node.name]
            waits = ~np.isnan(self.constant[node.name]) & ~self.replaceable[node.name]
            waits &= ~self.graph.frozen[ids] & ~gone[ids]
            if node.kind is Kind.NORM:
                waits = waits[self._positions(node)]
            if waits.any():
                lingering[f"{node.module}.bias"] = np.flatnonzero(waits)
        return lingering

    def _live(self, node: Node) -> np.ndarray:
        """(rows,) bool, to be changed in place; a layer left in float keeps all its rows."""
        module = self.modules[node.module]
        if node.module in self.rows:
            return self.rows[node.module]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        return np.ones(module.weight.shape[0], bool)

    def _positions(self, node: Node) -> np.ndarray:
        """(rows,): the output channel of each row."""
        module = self.modules[node.module]
        if isinstance(module, QuantizedLayer | PlacedBatchNorm2d):
            return _numpy(module.rows)
        return np.arange(len(self._live(node)))

    def _columns(self, node: Node) -> np.ndarray:
        """(entries,): the input channel of each entry of a norm."""
        norm = self.modules[node.module]
        assert isinstance(norm, PlacedBatchNorm2d)
        return _numpy(norm.columns)

    def _bias(self, node: Node) -> np.ndarray | float:
        """What a row outputs that computes nothing: by output channel, or by entry of a norm."""
        bias = getattr(self.modules[node.module], "bias", None)
        return 0.0 if bias is None else _numpy(bias.detach().double())


def _evaluate(node: Node, constants: np.ndarray) -> np.ndarray:
    """What an elementwise operation makes of (channels,) constants."""
    assert node.evaluate is not None
    with torch.no_grad():
        result = node.evaluate(torch.from_numpy(constants.copy())[None])[0]
    return _numpy(result)


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array
