"""Find what is still alive: which rows have to stay, and which channels nothing depends on.

A row without bits outputs exactly its bias. Such constants are followed through the channel graph,
in the same way for training and evaluation: `settle_statistics` gives batch norms that read a
constant c the mean c and a variance of 1, so that they output β in both. (One that is held in eval
mode while the network trains outputs γ(c - μ)/√(σ² + ε) + β in both, which becomes its β first.)

The analysis is a fixpoint: all rows with bits and all entries of batch norms are *live* at first,
and three steps are repeated until none of them is dropped any more. The first finds the channels
that are constant, the second, backwards, those that are needed and those that could as well be 0,
and the third drops rows and entries whose output is not needed, rows that read only zeros, and
entries that read a constant and whose output could as well be 0.

An example: row 3 of `conv` has lost its bits in

    conv → norm → relu → next

Channel 3 of the convolution's output is 0 (or the bias) in every pixel. The norm subtracts that
constant and outputs β₃, so `next` reads relu(β₃). If β₃ ≤ 0 this is 0: nothing depends on the
channel (it is `gone`), and row 3 of `conv`, entry 3 of `norm` and column 3 of `next` can be cut. If
β₃ > 0, `next` depends on it: β₃ is `lingering`, and is driven to zero until nothing does. If the
relu's output were added to another branch, channel 3 would hold the values of that branch: row 3
and entry 3 would go, and the column would stay. And if `next` had lost all of its rows, all
channels here would be `gone`.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfcompress.graph.channels import ChannelGraph, Node
from selfcompress.graph.ops import WITH_ROWS, Kind, adds_number
from selfcompress.layers.batch_norms import PlacedBatchNorm
from selfcompress.layers.placing import Placed
from selfcompress.layers.quantized import QuantConv, QuantizedLayer

_ROUNDING = 0.01  # relative error that autocast may cause in a mean
_NORMS = (Kind.NORM, Kind.OWN_NORM)
_BY_POSITION = (Kind.ELEMENTWISE, Kind.ADD, Kind.MUL, Kind.MOVE, Kind.SPATIAL)


@dataclass(frozen=True)
class Liveness:
    """The state of every channel of a network at one moment.

    Attributes:
        rows: module name → (rows now,) bool: the rows that must stay, for every module that may
            lose rows.
        gone: (number of ids at the start,) bool: channels that nothing depends on, as their value
            is not read, or is 0 and stays 0, or may as well be 0. Not those that are frozen, or
            removed already.
        unread: layer name → (input channels now,) bool: those that are 0 for good where the layer
            reads them, in every call, though other layers may find something in their places: one
            that reads a residual stream before an addition. For layers that may lose columns.
        lingering: name of a bias → the indices of those entries that alone keep their channels:
            once they are driven to zero, the channels can go.
    """

    rows: dict[str, np.ndarray]
    gone: np.ndarray
    unread: dict[str, np.ndarray]
    lingering: dict[str, np.ndarray]


def analyse(graph: ChannelGraph, model: nn.Module) -> Liveness:
    """Return what is alive in `model`, whose channels are those that `graph` has now."""
    return _Analysis(graph, model).run()


def constants(graph: ChannelGraph, model: nn.Module) -> dict[str, np.ndarray]:
    """Return node name → (positions,) the constant that each channel is, NaN where it varies."""
    return _Analysis(graph, model).follow_constants()


@torch.no_grad()
def settle_statistics(graph: ChannelGraph, model: nn.Module, *, measured: bool = False) -> None:
    """Give batch norms that read constant channels c the running mean c and a variance of 1.

    The true variance is 0, as in training. With that, rounding errors in c would be multiplied by
    1/√ε = 316; the output is β with either.

    This changes what the network computes in evaluation, to what it computes in training. So it is
    a step of its own, before a cut.

    Args:
        measured: whether the statistics were just measured on this network, and are right up to
            rounding. Then those that contradict a constant stay as they are: forward() may read a
            number from an attribute that has changed since the network was traced.
    """
    analysis = _Analysis(graph, model)
    constant = analysis.follow_constants()
    for node in graph.of_kind(*_NORMS):
        norm = model.get_submodule(node.module)
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None or norm.running_var is None or analysis.calls[node.module] > 1:
            continue
        known = constant[node.inputs[0]][graph.sources[node.name][0]][analysis.columns(node)]
        # Not blocking, and no index by a mask, which would wait for a GPU.
        read = torch.from_numpy(known).to(norm.running_mean, non_blocking=True)
        fixed = ~read.isnan()
        if measured:
            fixed &= (norm.running_mean - read).abs() <= _ROUNDING * read.abs() + norm.eps
        held = node.module in graph.eval_norms
        if held:
            if norm.bias is None:
                continue
            made = _in_evaluation(norm, read).to(norm.bias)
            norm.bias.copy_(made.where(fixed, norm.bias))
        norm.running_mean.copy_(read.where(fixed, norm.running_mean))
        if not held:  # if held, the network is trained with its variance, which has to stay
            norm.running_var.masked_fill_(fixed, 1)


class _Analysis:
    """One analysis of a network, which computes its `Liveness`.

    Attributes:
        calls: name of a layer or norm → how often the graph calls it.
        rows: module name → (rows now,) bool: the rows, or entries, that are live so far.
        constant: node name → (positions,) its constant, NaN where it varies; given `rows`.
        fixed: names of nodes computed from untrained tensors of the model alone, so that they never
            change.
        needed, replaceable: node name → (positions,) bool; see `_look_back`.
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.users: dict[str, list[Node]] = {node.name: [] for node in graph.nodes}
        self.calls = Counter(node.module for node in graph.of_kind(*WITH_ROWS, Kind.OWN_NORM))
        for node in graph.nodes:
            for name in node.inputs:
                self.users[name].append(node)
        # A cache of what was read from modules, as every read waits for a GPU.
        self._arrays: dict[tuple[str, str], np.ndarray] = {}
        self.rows: dict[str, np.ndarray] = {}
        for name in graph.origin:
            module = self.modules[name]
            if isinstance(module, QuantizedLayer):
                self.rows[name] = module.live_rows().numpy(force=True)
            elif isinstance(module, PlacedBatchNorm):
                self.rows[name] = np.ones(module.num_features, bool)

    def run(self) -> Liveness:
        """Repeat the three steps until no row is dropped any more, and return the result."""
        # A dropped row may leave its readers only zeros, or what it has read unneeded.
        while True:
            before = {name: live.copy() for name, live in self.rows.items()}
            self.constant = self.follow_constants()
            self._look_back()
            self._drop()
            if all((live == before[name]).all() for name, live in self.rows.items()):
                break
        gone = ~self._carried() & ~self.graph.frozen & ~self.graph.removed
        lingering = self._lingering(gone)
        return Liveness(self.rows, gone, self._unread(), lingering)

    def follow_constants(self, *, for_good: bool = False) -> dict[str, np.ndarray]:
        """Return node name → (positions,) the constant that each channel is, NaN where it varies.

        With the rows that are live so far: at first, those that have bits.

        Args:
            for_good: whether what may change later is taken to vary: what depends on biases, on
                live entries of norms, on other tensors of the model, or on numbers that are added.
        """
        constant: dict[str, np.ndarray] = {}
        self.fixed: set[str] = set()
        shifted = self._shifted() if for_good else set()
        for node in self.graph.nodes:
            if node.name not in self.graph.ids:
                continue
            count = len(self.graph.ids[node.name])
            value = np.full(count, np.nan)
            inputs = [
                np.append(constant[name], np.nan)[source]  # source -1: of another input
                for name, source in zip(node.inputs, self.graph.sources[node.name], strict=True)
            ]
            match node.kind:
                case Kind.PARAMETER if node.tensor and not for_good:
                    value = self._parameter(node)
                case Kind.LAYER | Kind.GROUPED:
                    has_bias = getattr(self.modules[node.module], "bias", None) is not None
                    value[:] = np.nan if for_good and has_bias else self._bias(node)
                    varies = self._live(node) & ~self._starved(node, inputs[0])
                    value[self._positions(node)[varies]] = np.nan
                case Kind.NORM:
                    read = inputs[0][self.columns(node)]
                    if for_good or self.calls[node.module] > 1:
                        read = np.full_like(read, np.nan)  # its statistics are of several tensors
                    value[:] = 0  # also of entries that this analysis has dropped
                    made = np.where(np.isnan(read), np.nan, self._normed(node, read))
                    live = self._live(node)
                    value[self._positions(node)[live]] = made[live]
                case Kind.OWN_NORM:
                    known = ~np.isnan(inputs[0]) & (self.calls[node.module] == 1) & (not for_good)
                    value = np.where(known, self._normed(node, inputs[0]), np.nan)
                case Kind.ELEMENTWISE | Kind.ADD | Kind.MUL:
                    known = ~np.isnan(inputs).any(0) & (node.name not in shifted)
                    value = np.where(known, _evaluate(node, inputs), np.nan)
                    if node.kind is Kind.MUL:
                        for zero in self._zeros(node, constant):
                            value[zero] = 0
                case Kind.SPATIAL:
                    value = np.where(inputs[0] == 0, 0.0, np.nan)
                case Kind.MOVE:
                    for own, source in zip(inputs, self.graph.sources[node.name], strict=True):
                        value[source >= 0] = own[source >= 0]
            constant[node.name] = value
            if (node.kind is Kind.PARAMETER and not np.isnan(value).all()) or (
                node.kind in _BY_POSITION and self.fixed.issuperset(node.inputs)
            ):
                self.fixed.add(node.name)
        return constant

    def _shifted(self) -> set[str]:
        """Return the names of the ELEMENTWISE nodes that add a number."""
        return {
            name
            for step in self.graph.steps
            if step.kind is Kind.ELEMENTWISE and adds_number(step.node)
            for name in step.names
        }

    def _parameter(self, node: Node) -> np.ndarray:
        """Return (positions,) the values of a tensor of the model, NaN if it is trained."""
        owner, _, key = node.tensor.rpartition(".")
        tensor = getattr(self.modules[owner], key)
        count = len(self.graph.ids[node.name])
        only_normed = all(user.kind is Kind.OWN_NORM for user in self.users[node.name])
        trained = tensor.requires_grad or only_normed  # statistics change too
        if trained or tensor.is_complex() or tensor.numel() != count:
            return np.full(count, np.nan)
        return self._array(owner, key).ravel().astype(float)

    def _zeros(self, node: Node, constant: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return, for each input of `node`, (positions,) bool: whether it is 0 and stays 0.

        Untrained tensors of the model do not count: a gate may be closed only for a while.
        """
        return [
            (np.append(constant[name], np.nan)[source] == 0) & (name not in self.fixed)
            for name, source in zip(node.inputs, self.graph.sources[node.name], strict=True)
        ]

    def _starved(self, node: Node, read: np.ndarray) -> np.ndarray:
        """Return (rows,) bool: which rows of a layer read nothing but zeros."""
        if node.kind is Kind.LAYER:
            return np.full(len(self._live(node)), (read[self.columns(node)] == 0).all())
        conv = self._grouped(node)
        silent = (read[self.columns(node)] == 0).reshape(conv.groups, -1).all(1)
        starved: np.ndarray = silent[self._array(node.module, "row_groups")]
        return starved

    def _look_back(self) -> None:
        """Compute `needed` and `replaceable` for all positions, from the outputs to the inputs.

        needed: some live row or entry, an output, or something not understood depends on it.
        replaceable: with 0 there, the network would compute the same. It is not needed, or its
            constant is 0, or it is another constant, and all that needs it turns 0 into 0 and is
            itself replaceable: a constant β ≤ 0 in front of a ReLU.
        """
        sizes = {name: len(ids) for name, ids in self.graph.ids.items()}
        self.needed = {name: np.zeros(size, bool) for name, size in sizes.items()}
        zero_will_do = {name: np.ones(size, bool) for name, size in sizes.items()}
        self.replaceable: dict[str, np.ndarray] = {}
        for node in reversed(self.graph.nodes):
            if node.name in sizes:
                constant = self.constant[node.name]
                self.replaceable[node.name] = (
                    (constant == 0)
                    | ~self.needed[node.name]
                    | (~np.isnan(constant) & zero_will_do[node.name])
                )
            if node.kind in (Kind.OUTPUT, Kind.OPAQUE):
                for name in node.inputs:
                    self.needed[name][:] = True
                    zero_will_do[name][:] = False
                continue
            for index, name in enumerate(node.inputs):
                source = self.graph.sources[node.name][index]
                own = source >= 0
                needs, zero = self._demand(node, index)
                if name in self.fixed and node.kind in _BY_POSITION:
                    # Not needed where what is made with it is a constant that can be 0.
                    known = ~np.isnan(self.constant[node.name])
                    needs = needs & ~(known & self.replaceable[node.name])
                np.logical_or.at(self.needed[name], source[own], needs[own])
                np.logical_and.at(zero_will_do[name], source[own], zero[own])

    def _demand(self, node: Node, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each position of an input: whether `node` needs it, and whether 0 will do.

        Args:
            index: which of the inputs of `node`.
        """
        if node.kind in WITH_ROWS:
            live = self._live(node)
            needs = np.zeros(len(self.graph.sources[node.name][0]), bool)
            if node.kind is Kind.LAYER:
                needs[self.columns(node)] = live.any()
            elif node.kind is Kind.NORM:
                needs[self.columns(node)[live]] = True
            else:
                conv = self._grouped(node)
                groups = np.unique(self._array(node.module, "row_groups")[live])
                needs[self.columns(node).reshape(conv.groups, -1)[groups]] = True
            return needs, ~needs
        needs, zero = self.needed[node.name], self.replaceable[node.name].copy()
        if node.kind is Kind.OWN_NORM:  # its output is the same for every constant it reads
            needs = needs & ~(zero & ~np.isnan(self.constant[node.name]))
            return needs, ~needs
        if node.kind is Kind.MUL:
            needs = needs.copy()
            zeros = self._zeros(node, self.constant)
            for other, is_zero in enumerate(zeros):
                # If both operands are 0, the second is not needed; the first has to stay.
                if other != index:
                    needs &= ~is_zero | (zeros[index] & (other > index))
        elif node.kind is Kind.ADD:
            zero[:] = False
        elif node.kind is Kind.ELEMENTWISE:
            zero &= _evaluate(node, [np.zeros(len(zero))]) == 0
        return needs, zero | ~needs

    def _drop(self) -> None:
        """Drop rows and entries that nothing needs, or that are idle.

        A row is idle if it reads only zeros; an entry, if it reads a constant and its output could
        as well be 0. A module that is called several times keeps what one of the calls needs.
        """
        stays = {name: np.zeros_like(live) for name, live in self.rows.items()}
        for node in self.graph.of_kind(*WITH_ROWS):
            if node.module not in self.rows:
                continue
            live, positions = self._live(node), self._positions(node)
            read = self.constant[node.inputs[0]][self.graph.sources[node.name][0]]
            if node.kind is Kind.NORM:
                fixed = ~np.isnan(read[self.columns(node)])
                if self.calls[node.module] > 1:
                    fixed[:] = False
                idle = fixed & self.replaceable[node.name][positions]
            else:
                idle = self._starved(node, read)
            stays[node.module] |= live & self.needed[node.name][positions] & ~idle
        for name in self.calls:
            if name in self.rows:
                self.rows[name] &= stays[name]

    def _carried(self) -> np.ndarray:
        """Return (ids,) bool: which are not replaceable in some tensor, or read by a live entry."""
        carried = np.zeros(len(self.graph.frozen), bool)
        for name, replaceable in self.replaceable.items():
            carried[self.graph.ids[name][~replaceable]] = True
        for node in self.graph.of_kind(Kind.NORM):
            carried[self.graph.reads(node)[self.columns(node)[self._live(node)]]] = True
        return carried

    def _lingering(self, gone: np.ndarray) -> dict[str, np.ndarray]:
        """Return `Liveness.lingering`: the biases that alone keep a channel from being gone."""
        lingering: dict[str, np.ndarray] = {}
        for node in self.graph.of_kind(*WITH_ROWS, Kind.OWN_NORM):
            if node.module not in self.rows and node.kind is not Kind.OWN_NORM:
                continue
            # A norm subtracts the constant that it reads, which need not be driven to zero.
            only_normed = all(user.kind in _NORMS for user in self.users[node.name])
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

    def _unread(self) -> dict[str, np.ndarray]:
        """Return `Liveness.unread`."""
        for_good = self.follow_constants(for_good=True)
        unread: dict[str, np.ndarray] = {}
        for node in self.graph.of_kind(Kind.LAYER):
            if node.module in self.graph.columns:
                zero = for_good[node.inputs[0]][self.graph.sources[node.name][0]] == 0
                # Frozen: something that is not understood reads the tensor, and may change it.
                zero &= ~self.graph.frozen[self.graph.reads(node)]
                unread[node.module] = unread.get(node.module, True) & zero
        return unread

    def _live(self, node: Node) -> np.ndarray:
        """Return (rows,) bool: which rows are live; in a layer left in float, all are."""
        if node.module in self.rows:
            return self.rows[node.module]
        return np.ones(len(self.graph.ids[node.name]), bool)

    def _positions(self, node: Node) -> np.ndarray:
        """Return (rows,) the output channel that each row of `node` computes."""
        module = self.modules[node.module]
        if isinstance(module, Placed):
            return self._array(node.module, "rows")
        return np.arange(len(self._live(node)))

    def columns(self, node: Node) -> np.ndarray:
        """Return (columns,) the input channel that each column, or entry of a norm, reads."""
        module = self.modules[node.module]
        if isinstance(module, Placed):
            return self._array(node.module, "columns")
        return np.arange(len(self.graph.sources[node.name][0]))

    def _grouped(self, node: Node) -> QuantConv:
        conv = self.modules[node.module]
        assert isinstance(conv, QuantConv)
        return conv

    def _normed(self, node: Node, read: np.ndarray) -> np.ndarray | float:
        """Return what the entries of a norm make of the constants `read`."""
        norm = self.modules[node.module]
        if node.module in self.graph.eval_norms and norm.running_mean is not None:
            assert isinstance(norm, _BatchNorm)
            return _in_evaluation(norm, torch.from_numpy(read)).numpy(force=True)
        return self._bias(node)

    def _bias(self, node: Node) -> np.ndarray | float:
        """Return what rows output that compute nothing: the bias, by output channel or entry."""
        bias = getattr(self.modules[node.module], "bias", None)
        if bias is None:
            return 0.0
        if bias.is_complex():  # complex constants are not followed
            return math.nan
        return self._array(node.module, "bias")

    def _array(self, module: str, attribute: str) -> np.ndarray:
        key = module, attribute
        if key not in self._arrays:
            tensor = getattr(self.modules[module], attribute)
            wide = tensor.double() if tensor.is_floating_point() else tensor
            self._arrays[key] = wide.numpy(force=True)
        return self._arrays[key]


def _in_evaluation(norm: _BatchNorm, read: Tensor) -> Tensor:
    """Return (entries,) what a norm in eval mode makes of the (entries,) constants `read`."""
    assert norm.running_mean is not None and norm.running_var is not None
    read = read.to(norm.running_mean.device, torch.float64)
    scaled = (read - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    if norm.weight is not None:
        scaled = scaled * norm.weight
    return scaled if norm.bias is None else scaled + norm.bias


def _evaluate(node: Node, constants: list[np.ndarray]) -> np.ndarray:
    """Return (positions,) what an operation makes of the constants of its inputs."""
    assert node.evaluate is not None
    with torch.no_grad():
        result = node.evaluate(*(torch.from_numpy(c.copy())[None] for c in constants))[0]
    return result.numpy(force=True)
