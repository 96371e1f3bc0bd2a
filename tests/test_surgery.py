"""A cut changes a network's size, but no output, gradient, optimiser state or later training."""

# mypy: disable-error-code="no-untyped-call"

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Cut, copied, count, kill, outputs, prepare
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from selfcompress import Compressor
from selfcompress.convert import quantize_layers
from selfcompress.dense import to_dense
from selfcompress.graph.follow import channel_graph
from selfcompress.graph.liveness import settle_statistics
from selfcompress.graph.ops import Kind
from selfcompress.layers.batch_norms import PlacedBatchNorm
from selfcompress.layers.quantized import quantized_layers
from selfcompress.size import measure, starting_weights
from selfcompress.surgery import Plan

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@torch.no_grad()
def kill_at_random(cut: Cut, seed: int) -> None:
    """Kill random rows, of some layers all; flip or zero norm biases, zero some layer biases."""
    generator = torch.Generator().manual_seed(seed)

    def below(chance: float, n: int) -> Tensor:
        return torch.rand(n, generator=generator) < chance

    for layer in quantized_layers(cut.model).values():
        chance = (0.0, 0.3, 0.7, 1.0)[int(torch.randint(4, (), generator=generator))]
        layer.bit_depth[below(chance, len(layer.bit_depth))] = 0
        if layer.bias is not None:
            layer.bias[below(0.5, len(layer.bias))] = 0
    for norm in cut.model.modules():
        if isinstance(norm, PlacedBatchNorm):
            norm.bias[below(0.3, norm.num_features)] *= -1
            norm.bias[below(0.3, norm.num_features)] = 0


def gradients(cut: Cut, training: bool) -> dict[str, Tensor]:
    """Return the gradients of an arbitrary loss by parameter name, and restore the buffers."""
    buffers = {name: buffer.clone() for name, buffer in cut.model.named_buffers()}
    cut.model.train(training).zero_grad()
    y = cut.model(cut.x)
    if y.requires_grad:  # a network that is dead all through has a constant output
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    for name, buffer in cut.model.named_buffers():
        buffer.copy_(buffers[name])
    return {n: p.grad.clone() for n, p in cut.model.named_parameters() if p.grad is not None}


def select(tensor: Tensor, cuts: list[tuple[int, list[int]]]) -> Tensor:
    for dim, kept in cuts:
        tensor = tensor.index_select(dim, torch.tensor(kept, dtype=torch.int64))
    return tensor


def check_exact(cut: Cut, multiple: int = 1) -> Plan:
    """Cut, compare outputs and gradients in both modes, and return the plan."""
    tolerance = TOLERANCE[cut.x.dtype]
    cut.settle()
    before = {mode: outputs(cut.model, cut.x, mode) for mode in (False, True)}
    wanted = {mode: gradients(cut, mode) for mode in (False, True)}
    plan = cut.plan(multiple)
    cut.apply(plan)
    channels = {node.module: cut.graph.ids.get(node.name, np.zeros(0)) for node in cut.graph.nodes}
    for mode in (False, True):
        # Constants may cancel to almost nothing, but rounding errors scale with the terms.
        scale = max(float(before[mode].abs().max()), 0.1)
        torch.testing.assert_close(
            outputs(cut.model, cut.x, mode), before[mode], rtol=0, atol=tolerance * scale
        )
        got = gradients(cut, mode)
        for name, parameter in cut.model.named_parameters():
            want = wanted[mode].get(name)
            if want is None:
                continue
            want = select(want, plan.keep.get(name, []))
            module, _, kind = name.rpartition(".")
            rows = getattr(cut.model.get_submodule(module), "rows", None)
            if kind == "bias" and rows is not None and not len(rows):
                continue  # a tensor whose channels are all gone keeps one as a placeholder
            assert want.shape == parameter.shape, name
            scale = max([1.0] + [float(g.abs().max()) for g in wanted[mode].values()])
            have = got.get(name, torch.zeros_like(want))
            if kind == "bias" and len(want) == len(
                sounds := ~np.isin(channels.get(module, ()), plan.silent)
            ):
                want, have = want[sounds], have[sounds]  # silent channels are not read any more
            torch.testing.assert_close(have, want, rtol=0, atol=10 * tolerance * scale, msg=name)
    return plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_is_exact(name: str, dtype: torch.dtype) -> None:
    for seed in range(6):
        cut = prepare(name, dtype, seed)
        kill_at_random(cut, seed)
        with copied(seed % 2 > 0 and dtype is torch.float64):
            check_exact(cut)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(list(NETWORKS)), seed=st.integers(0, 10**6))
@example(name="excluded", seed=242531)  # a float layer that reads nothing but zeros
def test_any_pattern_of_dead_rows_cuts_exactly_twice(name: str, seed: int) -> None:
    cut = prepare(name, torch.float64, seed)
    with copied(seed % 2 > 0):
        kill_at_random(cut, seed)
        check_exact(cut)
        assert not cut.plan()
        kill_at_random(cut, seed + 1)
        check_exact(cut)
        assert not cut.plan()


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(list(NETWORKS)), seed=st.integers(0, 10**6), multiple=st.integers(2, 4))
def test_channels_kept_to_round_a_width_up_are_exact_and_can_go_later(
    name: str, seed: int, multiple: int
) -> None:
    cut = prepare(name, torch.float64, seed)
    whole = copy.deepcopy(cut)
    kill_at_random(cut, seed)
    kill_at_random(whole, seed)
    check_exact(cut, multiple)
    assert not cut.plan(multiple)
    check_exact(cut)
    # Rounded up on the way or not, the network ends the same.
    check_exact(whole)
    assert (cut.graph.removed == whole.graph.removed).all()
    shapes = [{n: p.shape for n, p in c.model.named_parameters()} for c in (cut, whole)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_dead_means_nothing_to_cut(name: str) -> None:
    cut = prepare(name)
    assert not cut.plan()
    assert not cut.cut()


def silence(cut: Cut, layer: str, norm: str, rows: list[int]) -> None:
    """Kill rows and make the biases of their norm negative, so that a ReLU leaves only zeros."""
    kill(cut.model, layer, rows)
    with torch.no_grad():
        cut.model.get_parameter(f"{norm}.bias")[rows] = -0.5


def shape(cut: Cut, parameter: str) -> tuple[int, ...]:
    return tuple(cut.model.get_parameter(parameter).shape)


def test_settled_norms_output_their_bias_for_what_is_constant() -> None:
    """settle_statistics() sets a constant channel's mean to that constant and its variance to 1."""
    cut = prepare("chain-biased")
    kill(cut.model, "a.0", [1, 4])
    norm, bias = cut.model.get_submodule("a.1"), cut.model.get_parameter("a.0.bias")
    assert isinstance(norm, PlacedBatchNorm)
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    was = mean.clone(), var.clone()
    cut.settle()
    assert torch.equal(mean[[1, 4]], bias[[1, 4]])
    assert (var[[1, 4]] == 1).all()  # the true one, 0, would amplify rounding errors
    others = [0, 2, 3, 5]
    assert torch.equal(mean[others], was[0][others])
    assert torch.equal(var[others], was[1][others])


def test_settled_norms_do_not_multiply_rounding() -> None:
    """A constant behind an activation may be off by a unit in the last place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Softplus(), nn.BatchNorm2d(64))
    quantize_layers(model, bits=8)
    with torch.no_grad():
        model.get_parameter("0.bit_depth").zero_()
        model.get_parameter("0.bias").uniform_(1, 9)
    x = torch.randn(2, 3, 8, 8)
    settle_statistics(channel_graph(model, x), model)
    torch.testing.assert_close(model.eval()(x), torch.zeros(2, 64, 8, 8), rtol=0, atol=1e-5)


def test_a_silent_channel_goes_from_everything_that_carries_it() -> None:
    """A channel that is always 0 leaves the layer, the norm with its statistics, and the reader."""
    cut = prepare("chain")
    before, macs = count(cut.model), macs_of(cut)
    silence(cut, "a.0", "a.1", [1, 4])
    check_exact(cut)
    assert shape(cut, "a.0.weight") == (4, 3, 3, 3)
    assert shape(cut, "a.0.bit_depth") == shape(cut, "a.0.exponent") == (4,)
    assert shape(cut, "a.1.weight") == shape(cut, "a.1.bias") == (4,)
    assert shape(cut, "b.0.weight") == (7, 4, 3, 3)
    norm = cut.model.get_submodule("a.1")
    assert norm.running_mean.shape == norm.running_var.shape == (4,)
    assert count(cut.model) == before - 2 * (27 + 2 + 2 + 7 * 9)
    assert macs_of(cut) == macs - 2 * 64 * (27 + 7 * 9)


def macs_of(cut: Cut) -> int:
    return measure(cut.model, cut.graph, starting_weights(cut.model)).macs


def test_a_dead_row_goes_at_once_even_where_its_constant_stays() -> None:
    """A dead row is cut even if its channel stays, because its norm outputs a positive bias."""
    cut = prepare("chain")
    kill(cut.model, "a.0", [2])
    with torch.no_grad():
        cut.model.get_parameter("a.1.bias")[2] = 0.7
    check_exact(cut)
    assert shape(cut, "a.0.weight") == (5, 3, 3, 3)
    assert shape(cut, "a.1.bias") == (6,)
    assert shape(cut, "b.0.weight") == (7, 6, 3, 3)
    with torch.no_grad():
        cut.model.get_parameter("a.1.bias")[2] = 0
    check_exact(cut)
    assert shape(cut, "a.1.bias") == (5,)
    assert shape(cut, "b.0.weight") == (7, 5, 3, 3)


@pytest.mark.parametrize("name", ["residual", "residual-relu-after"])
def test_a_channel_dead_in_the_branch_only_leaves_the_branch_only(name: str) -> None:
    cut = prepare(name)
    kill(cut.model, "two.0", [3])
    with torch.no_grad():
        cut.model.get_parameter("two.1.bias")[3] = 0
    check_exact(cut)
    assert shape(cut, "two.0.weight") == (5, 5, 3, 3)
    assert shape(cut, "two.1.weight") == (5,)
    assert shape(cut, "stem.0.weight") == (6, 3, 3, 3)
    assert shape(cut, "one.0.weight") == (5, 6, 3, 3)
    assert shape(cut, "head.linear.weight") == (5, 6)


def test_a_channel_dead_in_the_skip_only_leaves_the_skip_only() -> None:
    cut = prepare("residual")
    silence(cut, "stem.0", "stem.1", [3])
    check_exact(cut)
    assert shape(cut, "stem.0.weight") == (5, 3, 3, 3)
    assert shape(cut, "two.0.weight") == (6, 5, 3, 3)
    assert shape(cut, "head.linear.weight") == (5, 6)
    # Before the addition the channel is zero, so the branch need not read it.
    assert shape(cut, "one.0.weight") == (5, 5, 3, 3)
    assert cut.model.get_parameter("one.1.weight").numel() == 5
    assert cut.graph.columns["one.0"].tolist() == [0, 1, 2, 4, 5]


class OwnNorm(nn.BatchNorm2d):
    """A batch norm with a forward() of its own, whose entries do not go one by one."""

    def forward(self, input: Tensor) -> Tensor:
        moments = self.running_mean, self.running_var
        return F.batch_norm(input, *moments, self.weight, self.bias, self.training)


class ReadTwice(nn.Module):
    """What is read before an addition, and in which ways a channel may be zero there.

    `bias` is zero now, but trained with the sum; so is that of `norm`; `gate` may open again;
    `shared` reads the sum too; to what `shifted` reads a number is added, 0 for now; and `branch`
    reads what is zero for good.
    """

    gate: Tensor
    of_bias: nn.Conv2d
    of_norm: nn.Conv2d
    of_gate: nn.Conv2d
    of_gated: nn.Conv2d
    shared: nn.Conv2d
    shifted: nn.Conv2d
    branch: nn.Conv2d
    head: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.tensor([0.0, 1, 1, 1])[:, None, None])
        self.bias = nn.Conv2d(3, 4, 1)
        self.normed, self.norm = nn.Conv2d(3, 4, 1, bias=False), OwnNorm(4)
        self.plain, self.shift = nn.Conv2d(3, 4, 1, bias=False), 0.0
        for name in ("of_bias", "of_norm", "of_gate", "of_gated", "shared", "shifted", "branch",
                     "head"):  # fmt: skip
            setattr(self, name, nn.Conv2d(4, 4, 1, bias=False))

    def forward(self, x: Tensor) -> Any:
        biased, normed, plain = self.bias(x), self.norm(self.normed(x)), self.plain(x)
        read = self.of_bias(biased) + self.of_norm(normed) + self.branch(plain)
        gates = self.gate.expand(len(x), 4, *x.shape[2:])
        read = read + self.of_gate(gates) + self.of_gated(x[:, :1] * self.gate)
        total = biased + normed + plain + self.shifted(plain + self.shift)
        return self.head(read + total + self.shared(total) + self.shared(plain))


@pytest.mark.parametrize("way", ["ravel", "data", "expand_as", "out"])
def test_columns_stay_where_what_is_read_may_be_changed_under_another_name(way: str) -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6, bias=False), nn.Linear(3, 6)
            self.c, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            read, other = self.a(x), self.b(x)
            if way == "ravel":
                read.ravel().add_(1.0)
            elif way == "data":
                read.data.add_(1.0)
            elif way == "expand_as":
                read.expand_as(other).add_(1.0)
            else:
                torch.add(read.data, 1.0, out=read.data)
            return self.head(read + self.c(read) + other)

    torch.manual_seed(0)
    model, x = Aliased(), torch.randn(4, 3)
    compressor = Compressor(model, x, 0.01)
    with torch.no_grad():
        model.get_parameter("a.bit_depth")[1] = 0
    assert compressor.cut()  # and no CutError
    assert model.a.weight.shape == (5, 3)


def test_columns_go_only_if_their_channel_is_zero_for_good_in_every_call() -> None:
    torch.manual_seed(0)
    model, x = ReadTwice().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    quantize_layers(model, bits=8)
    cut = Cut(model, channel_graph(model, x), x)
    with torch.no_grad():
        cut.model.get_parameter("bias.bias")[1] = 0
        cut.model.get_parameter("norm.bias")[1] = 0
    for layer in ("bias", "normed", "plain"):
        kill(cut.model, layer, [1])
    check_exact(cut)
    for layer in ("bias", "normed", "plain"):
        assert shape(cut, f"{layer}.weight") == (3, 3, 1, 1)
    for layer in ("of_bias", "of_norm", "of_gate", "of_gated", "shared", "shifted"):
        assert shape(cut, f"{layer}.weight") == (4, 4, 1, 1), layer
    assert shape(cut, "branch.weight") == (4, 3, 1, 1)


@pytest.mark.parametrize("name", ["residual", "residual-relu-after"])
def test_a_channel_dead_on_both_sides_goes(name: str) -> None:
    cut = prepare(name)
    silence(cut, "stem.0", "stem.1", [0, 3])
    silence(cut, "two.0", "two.1", [3, 5])
    with torch.no_grad():
        cut.model.get_parameter("two.1.bias")[[3, 5]] = 0
    check_exact(cut)
    assert shape(cut, "head.linear.weight") == (5, 5)
    assert shape(cut, "one.0.weight") == (5, 4, 3, 3)
    assert shape(cut, "stem.0.weight") == (4, 3, 3, 3)
    assert shape(cut, "two.0.weight") == (4, 5, 3, 3)


@pytest.mark.parametrize(("layer", "norm"), [("one.0", "one.1"), ("two.0", "two.1")])
def test_a_dead_branch_becomes_the_identity(layer: str, norm: str) -> None:
    cut = prepare("residual")
    rows = list(range(len(cut.model.get_parameter(f"{layer}.bit_depth"))))
    silence(cut, layer, norm, rows)
    # All that the second block can still add are its biases.
    with torch.no_grad():
        cut.model.get_parameter("two.1.bias").fill_(-0.1)
    check_exact(cut)
    for name in ("one.0", "one.1", "two.0", "two.1"):
        assert shape(cut, f"{name}.weight")[0] == 0, name
    assert shape(cut, "stem.0.weight") == (6, 3, 3, 3)
    stem = cut.model.get_submodule("stem")(cut.x)
    torch.testing.assert_close(cut.model(cut.x), cut.model.get_submodule("head")(stem))


def test_the_trunk_keeps_a_channel() -> None:
    """A tensor keeps its last channel, even if that is dead."""
    cut = prepare("residual")
    for layer, norm in (("stem.0", "stem.1"), ("two.0", "two.1")):
        silence(cut, layer, norm, list(range(6)))
    check_exact(cut)
    for node in cut.graph.nodes:
        if node.kind is not Kind.OUTPUT:
            assert len(cut.graph.ids[node.name]) > 0
    assert cut.model(cut.x).shape == (4, 5)


def test_unread_channels_go_whatever_their_bits() -> None:
    cut = prepare("cat")
    kill(cut.model, "join.0", range(6))
    kill(cut.model, "extra.0", range(3))
    with torch.no_grad():
        cut.model.get_parameter("join.1.bias").fill_(-1)
    check_exact(cut)
    # Nobody reads the right branch any more; the left one is read by `extra`.
    assert shape(cut, "right.0.weight")[0] == 0
    assert shape(cut, "left.0.weight") == (4, 5, 3, 3)
    assert shape(cut, "extra.0.weight") == (3, 4, 3, 3)
    assert count(cut.model.get_submodule("right")) == 0


def test_all_pixels_of_a_flattened_channel_go() -> None:
    cut = prepare("flat")
    silence(cut, "a.0", "a.1", [2])
    kill(cut.model, "hidden", [0, 6])
    with torch.no_grad():
        cut.model.get_parameter("hidden.bias")[0] = -3
        cut.model.get_parameter("hidden.bias")[6] = 3
    check_exact(cut)
    assert shape(cut, "hidden.weight") == (5, 20)
    assert shape(cut, "hidden.bias") == (6,)
    assert shape(cut, "out.weight") == (5, 6)


def test_a_norm_can_skip_channels_that_others_read() -> None:
    cut = prepare("pre-activation")
    silence(cut, "stem", "bn", [0, 3])
    check_exact(cut)
    assert shape(cut, "stem.weight") == (4, 3, 3, 3)
    assert shape(cut, "bn.weight") == (4,)
    assert shape(cut, "conv.weight") == (6, 4, 3, 3)
    assert shape(cut, "head.linear.weight") == (5, 6)


def test_a_head_loses_rows_and_keeps_its_outputs() -> None:
    cut = prepare("flat")
    kill(cut.model, "out", [1])
    check_exact(cut)
    assert shape(cut, "out.weight") == (4, 7)
    assert torch.equal(
        cut.model(cut.x)[:, 1], cut.model.get_parameter("out.bias")[1].detach().expand(4)
    )


def test_a_constant_that_the_activation_makes_of_zero_is_kept() -> None:
    cut = prepare("biased-sigmoid")
    kill(cut.model, "a", [0, 1])
    with torch.no_grad():
        cut.model.get_parameter("a.bias")[:2] = 0
    check_exact(cut)
    assert shape(cut, "a.weight")[0] == 4
    assert shape(cut, "b.weight") == (5, 6, 3, 3)


class Pooled(nn.Module):
    """A batch norm, a pooling, and only then a ReLU."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.pool(self.norm(self.a(x))).relu())
        return y


@pytest.mark.parametrize(
    ("pool", "width"),
    [
        (nn.MaxPool2d(2), 4), (nn.MaxPool2d(3, 2, 1), 4), (nn.AdaptiveMaxPool2d(2), 4),
        (lambda x: F.max_pool2d(x, 2), 4), (lambda x: x.amax((2, 3), keepdim=True), 4),
        (nn.AvgPool2d(2), 6), (nn.AvgPool2d(3, 1, 1), 6),  # rounding or padding may change it
    ],
)  # fmt: skip
def test_the_largest_of_a_constants_elements_is_that_constant(
    pool: Callable[[Tensor], Tensor], width: int
) -> None:
    """Max-pooling keeps a negative constant, of which a ReLU makes 0; averages may change it."""
    torch.manual_seed(0)
    model = Pooled(pool)
    quantize_layers(model, bits=8)
    model.double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    cut = Cut(model, channel_graph(model, x), x)
    kill(model, "a", [0, 1])
    with torch.no_grad():
        model.get_parameter("norm.bias").fill_(-0.5)
        model.get_parameter("norm.bias")[2:] = 0.5
    check_exact(cut)
    assert cut.model.get_submodule("b").in_width == width


def test_one_batch_norm_for_two_tensors_is_left_whole() -> None:
    from test_channels import Twice

    from selfcompress.convert import quantize_layers
    from selfcompress.graph.follow import channel_graph

    torch.manual_seed(0)
    model = Twice(nn.BatchNorm2d(6, affine=False))
    quantize_layers(model, bits=8)
    model.double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    cut = Cut(model, channel_graph(model, x), x)
    kill(model, "a", [0, 1])
    check_exact(cut)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dense_layers_compute_the_same(mode: str) -> None:
    cut = prepare("residual", torch.float64)
    silence(cut, "one.0", "one.1", [1, 2])
    kill(cut.model, "two.0", [0])
    cut.cut()
    before = outputs(cut.model, cut.x, mode == "train")
    dense = to_dense(cut.model)
    assert not quantized_layers(dense)
    torch.testing.assert_close(outputs(dense, cut.x, mode == "train"), before)


# --- optimisers -----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=1e-2, weight_decay=1e-2),
    "amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=1e-1),
    "adamw-foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
}


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    formats = ("bit_depth", "exponent")
    return [p for n, p in model.named_parameters() if n.rpartition(".")[2] not in formats]


def train(cut: Cut, optimizer: Optimizer, steps: range, after: Callable[[], None]) -> None:
    cut.model.train()
    for i in steps:
        x = torch.randn(cut.x.shape, generator=torch.Generator().manual_seed(i), dtype=cut.x.dtype)
        y = cut.model(x)
        optimizer.zero_grad()
        (y - torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).square().sum().backward()
        optimizer.step()
        after()


def half_trained(optimizer: str, name: str = "residual") -> tuple[Cut, Optimizer]:
    """Return a network and its optimiser after three steps; then some rows are killed."""
    cut = prepare(name, torch.float64)
    opt = OPTIMIZERS[optimizer](weights_of(cut.model))
    train(cut, opt, range(3), lambda: None)
    silence(cut, "stem.0", "stem.1", [0, 3])
    silence(cut, "one.0", "one.1", [1, 4])
    kill(cut.model, "two.0", [3, 5])
    with torch.no_grad():
        cut.model.get_parameter("two.1.bias")[[3, 5]] = 0
    cut.settle()
    return cut, opt


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_the_dead_were_only_asleep(optimizer: str) -> None:
    """Training without a cut, with dead channels' biases held fixed, ends in the same weights."""
    cut, opt = half_trained(optimizer)
    uncut = copy.deepcopy(cut)
    uncut_opt = OPTIMIZERS[optimizer](weights_of(uncut.model))
    uncut_opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    plan = cut.cut(opt)
    assert {"stem.0.weight", "one.1.bias", "two.1.bias", "head.linear.weight"} <= plan.keep.keys()
    train(cut, opt, range(3, 8), lambda: None)

    asleep = {n: p.detach().clone() for n, p in uncut.model.named_parameters() if ".1.bias" in n}

    @torch.no_grad()
    def keep_asleep() -> None:
        for name, was in asleep.items():
            for _, kept in plan.keep.get(name, []):
                gone = torch.ones(len(was), dtype=torch.bool)
                gone[kept] = False
                uncut.model.get_parameter(name)[gone] = was[gone]

    train(uncut, uncut_opt, range(3, 8), keep_asleep)
    start = prepare("residual", torch.float64).model
    for name, parameter in cut.model.named_parameters():
        other = select(uncut.model.get_parameter(name), plan.keep.get(name, []))
        torch.testing.assert_close(parameter, other, rtol=1e-9, atol=1e-9, msg=name)
        if name.endswith("0.weight"):
            was = select(start.get_parameter(name), plan.keep.get(name, []))
            assert not torch.equal(parameter, was), f"{name} does not train"


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_state_is_indexed_and_groups_stay(optimizer: str) -> None:
    cut, opt = half_trained(optimizer)
    groups, lists = list(opt.param_groups), [g["params"] for g in opt.param_groups]
    was = {
        name: {key: copy.deepcopy(value) for key, value in opt.state[p].items()}
        for name, p in cut.model.named_parameters()
        if p in opt.state
    }
    plan = cut.cut(opt)
    assert all(a is b for a, b in zip(groups, opt.param_groups, strict=True))
    assert [len(g["params"]) for g in opt.param_groups] == [len(params) for params in lists]
    named = dict(cut.model.named_parameters())
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(named[n]) for n in was}
    assert len(opt.state) == len(was)
    for name, state in was.items():
        for key, value in state.items():
            now = opt.state[named[name]][key]
            if isinstance(value, Tensor) and value.dim():
                assert now.shape == named[name].shape
                assert torch.equal(now, select(value, plan.keep.get(name, [])))
                assert now.abs().max() > 0 or now.numel() == 0
            else:
                assert now == value


def test_gradients_survive_and_so_does_requires_grad() -> None:
    cut, opt = half_trained("adam")
    frozen = cut.model.get_parameter("one.0.weight")
    frozen.requires_grad_(False)
    grad = cut.model.get_parameter("stem.0.weight").grad
    assert grad is not None
    plan = cut.cut(opt)
    now = cut.model.get_parameter("stem.0.weight").grad
    assert now is not None
    assert torch.equal(now, select(grad, plan.keep["stem.0.weight"]))
    assert not cut.model.get_parameter("one.0.weight").requires_grad


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_schedulers_survive(schedule: str) -> None:
    cut, opt = half_trained("momentum")
    scheduler = (
        CosineAnnealingLR(opt, 10)
        if schedule == "cosine"
        else OneCycleLR(opt, 0.1, total_steps=10, cycle_momentum=True)
    )
    rates = []
    cut.cut(opt)

    def after() -> None:
        scheduler.step()
        rates.append(opt.param_groups[0]["lr"])
        assert opt.param_groups[0]["params"][0] is cut.model.get_parameter("stem.0.weight")

    train(cut, opt, range(3, 8), after)
    assert len(set(rates)) == 5


class MyAdam(Adam):
    """A user's subclass of Adam, which may keep anything in its state."""


@pytest.mark.parametrize("kind", [Adadelta, MyAdam])
def test_other_optimizers_are_refused_by_name_and_nothing_changes(kind: type[Optimizer]) -> None:
    cut, _ = half_trained("sgd")
    opt = kind(weights_of(cut.model), lr=1e-3)  # type: ignore[call-arg]
    refuse(cut, opt, kind.__name__)


def test_state_of_unknown_shape_is_refused_by_name_and_nothing_changes() -> None:
    cut, opt = half_trained("adam")
    opt.state[cut.model.get_parameter("head.linear.weight")]["row_norms"] = torch.zeros(5)
    refuse(cut, opt, "row_norms")


def refuse(cut: Cut, opt: Optimizer, named: str) -> None:
    """Check that a cut with `opt` raises an error with `named` in it, and changes nothing."""
    parameters = dict(cut.model.named_parameters())
    values = copy.deepcopy(cut.model.state_dict())
    state = copy.deepcopy(opt.state_dict())
    plan = cut.plan()
    assert plan
    with pytest.raises(TypeError, match=named):
        cut.apply(plan, SGD(weights_of(cut.model), lr=0.1), opt)
    assert all(p is parameters[n] for n, p in cut.model.named_parameters())
    torch.testing.assert_close(cut.model.state_dict(), values, rtol=0, atol=0)
    torch.testing.assert_close(opt.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_a_plan_is_plain_data_that_cuts_copies_by_name() -> None:
    cut, opt = half_trained("adamw")
    other = copy.deepcopy(cut)
    plan = cut.plan()
    assert all(
        type(dim) is int and all(type(i) is int for i in kept)
        for cuts in plan.keep.values()
        for dim, kept in cuts
    )
    cut.apply(plan, opt)
    other.apply(pickle.loads(pickle.dumps(plan)))
    assert count(other.model) == count(cut.model)
    assert torch.equal(other.model.eval()(cut.x), cut.model.eval()(cut.x))


def test_channels_last_stays() -> None:
    cut = prepare("chain")
    cut.model.to(memory_format=torch.channels_last)
    silence(cut, "a.0", "a.1", [1])
    check_exact(cut)
    weight = cut.model.get_parameter("b.0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
