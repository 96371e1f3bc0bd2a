"""The channel graph ties channels, freezes what is not understood, and changes no model."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import check_exact
from networks import NETWORKS, Cat, Chain, Flat, Grouped, Residual, Untraceable, block, prepare
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from selfcompress import Compressor
from selfcompress.convert import quantize_layers
from selfcompress.graph.channels import ChannelGraph
from selfcompress.graph.connection import connected
from selfcompress.graph.follow import channel_graph
from selfcompress.graph.liveness import settle_statistics
from selfcompress.graph.ops import Kind
from selfcompress.layers.quantized import QuantConv2d, QuantizedLayer, quantized_layers
from selfcompress.size import measure, starting_weights

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trace(model: nn.Module, x: Tensor = X) -> ChannelGraph:
    quantize_layers(model, bits=4)
    return channel_graph(model, x)


def ids_of(graph: ChannelGraph, module: str) -> np.ndarray:
    """Return the channel ids of the output of a module."""
    (node,) = [node for node in graph.nodes if node.module == module]
    return graph.ids[node.name]


class Function(nn.Module):
    """conv → some function → conv."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.function(self.a(x)))
        return y


def frozen_by(graph: ChannelGraph, module: str) -> str:
    """Return why the output of `module` is frozen, or an empty string if it is not."""
    ids = ids_of(graph, module)
    assert graph.frozen[ids].all() or not graph.frozen[ids].any()
    return graph.reasons[ids[0]] if graph.frozen[ids[0]] else ""


def test_an_addition_ties_its_operands() -> None:
    graph = trace(Residual(relu_after=True))
    stem, one, two = (ids_of(graph, name) for name in ("stem.1", "one.1", "two.1"))
    assert np.array_equal(stem, two)
    assert len(np.unique(stem)) == 6
    assert not set(one) & set(stem)
    assert not graph.frozen[stem].any()
    assert not graph.frozen[one].any()


def test_layers_and_norms_make_new_channels_and_activations_do_not() -> None:
    graph = trace(Chain())
    conv, norm, relu = (ids_of(graph, f"a.{i}") for i in range(3))
    assert not set(conv) & set(norm)
    assert np.array_equal(norm, relu)


def test_cat_appends() -> None:
    """The ids of a concatenation are those of its operands, one after the other."""
    graph = trace(Cat())
    (cat,) = [node for node in graph.nodes if node.name == "cat"]
    left, right = ids_of(graph, "left.2"), ids_of(graph, "right.2")
    assert np.array_equal(graph.ids[cat.name], np.concatenate([left, right]))
    assert not set(left) & set(right)
    assert np.array_equal(ids_of(graph, "join.2"), ids_of(graph, "extra.2"))


def test_flatten_repeats() -> None:
    """Flattening repeats the id of a channel for each of its pixels."""
    graph = trace(Flat())
    pooled, flat = ids_of(graph, "pool"), ids_of(graph, "flatten")
    assert np.array_equal(flat, np.repeat(pooled, 4))


@pytest.mark.parametrize(
    "function",
    [
        F.relu, torch.tanh, F.gelu, lambda x: x.relu(), lambda x: 2 * x, lambda x: x / 3,
        lambda x: x + 1, lambda x: -x, lambda x: F.max_pool2d(x, 2), lambda x: x + x,
        lambda x: F.dropout(x, 0.1), torch.cos, lambda x: torch.add(x, x * 2, alpha=2),
        lambda x: x + x.mean((2, 3), keepdim=True), lambda x: x.flip(1), lambda x: x.roll(1, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1, x.size(1)).mT.unflatten(2, (6, 6)),
        lambda x: x.view(x.size(0), -1).view(x.size(0), x.size(1), x.size(2), x.size(3)),
        lambda x: torch.cat(x.chunk(2, 1), 1), lambda x: F.interpolate(x, scale_factor=2),
        lambda x: x * torch.sigmoid(x.mean((2, 3)))[:, :, None, None], lambda x: 1 - x,
        lambda x: stochastic_depth(x, 0.0, "row"), lambda x: F.pad(x, (1, 1, 1, 1)),
    ],
)  # fmt: skip
def test_channels_are_followed_through(function: Callable[[Tensor], Tensor]) -> None:
    """Channels are followed through these operations without being frozen."""
    assert frozen_by(trace(Function(function)), "a") == ""


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: F.softmax(x, 1), "softmax"),
        (lambda x: F.layer_norm(x, (6, 6)), "layer_norm"),
        (lambda x: F.group_norm(x, 2), "group_norm"),
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x / x.square(), "truediv"),
        (lambda x: F.pad(x, (1, 1), value=1.0), "pad"),
        (lambda x: (x.flatten(2) @ x.flatten(2).mT @ x.flatten(2)).view_as(x), "matmul"),
        (lambda x: x * x.amax(1, keepdim=True), "amax"),
        (lambda x: x[:, torch.arange(6)], "getitem"),
        (lambda x: x.transpose(1, 2), "b (QuantConv2d) mixes another dimension"),
    ],
)
def test_what_is_not_understood_freezes_and_is_named(
    function: Callable[[Tensor], Tensor], named: str
) -> None:
    """An operation that is not understood freezes what it reads, and the reason names it."""
    graph = trace(Function(function))
    assert named in frozen_by(graph, "a")


@pytest.mark.parametrize("module", [nn.AlphaDropout(), nn.Softmax(1)])
def test_modules_that_mix_or_are_unknown_freeze(module: nn.Module) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 6, 3), module, nn.Conv2d(6, 4, 3)))
    why = f"1 ({type(module).__name__}) is not an operation that channels can be followed through"
    assert frozen_by(graph, "0") == why


@pytest.mark.parametrize("module", [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)])
def test_norms_over_several_channels_freeze(module: nn.Module) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 6, 3), module, nn.Conv2d(6, 4, 3)))
    assert f"1 ({type(module).__name__}) takes its statistics over" in frozen_by(graph, "0")


def test_input_and_output_are_frozen() -> None:
    graph = trace(Chain())
    (source,), (end,) = graph.of_kind(Kind.INPUT), graph.of_kind(Kind.OUTPUT)
    assert graph.frozen[graph.ids[source.name]].all()
    assert all(graph.frozen[graph.ids[name]].all() for name in end.inputs)
    assert "output" in graph.reasons[ids_of(graph, "head.linear")[0]]
    assert not graph.frozen[ids_of(graph, "a.0")].any()


def test_shared_parameters_freeze() -> None:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)))
    model[2].weight = model[1].weight
    graph = trace(model)
    assert all("used elsewhere" in frozen_by(graph, name) for name in "012")
    assert not {"1", "2"} & graph.origin.keys()
    assert {"0", "3"} <= graph.origin.keys()


def test_parameters_read_by_hand_freeze() -> None:
    class Reads(Chain):
        def forward(self, x: Tensor) -> Tensor:
            by_hand = F.conv2d(x, self.a[0].weight, padding=1)  # type: ignore[arg-type]
            y: Tensor = self.head(self.b(self.a(x) + by_hand))
            return y

    graph = trace(Reads())
    assert frozen_by(graph, "a.0")
    assert "a.0" not in graph.origin


class Twice(nn.Module):
    """Two convolutions whose outputs go through the same module."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), middle
        self.c, self.d = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.middle(self.a(x))) + self.d(self.middle(self.b(x)))
        return y


@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.Conv2d(6, 6, 1),
        lambda: nn.BatchNorm2d(6),
        lambda: nn.BatchNorm2d(6, affine=False),
    ],
)
def test_a_layer_called_twice_ties_what_it_reads_and_makes(
    middle: Callable[[], nn.Module],
) -> None:
    graph = trace(Twice(middle()))
    assert frozen_by(graph, "a") == frozen_by(graph, "b") == ""
    assert np.array_equal(ids_of(graph, "a"), ids_of(graph, "b"))
    first, second = (n for n in graph.nodes if n.module == "middle")
    assert np.array_equal(graph.ids[first.name], graph.ids[second.name])
    assert not set(graph.ids[first.name]) & set(ids_of(graph, "a"))


def test_an_activation_called_twice_does_not() -> None:
    """Calling one activation on two tensors does not freeze their channels."""
    assert frozen_by(trace(Twice(nn.ReLU())), "a") == ""


def test_a_layer_with_two_names_is_one_quantised_layer() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    model = Alias()
    graph = trace(model)
    assert isinstance(model.second, QuantConv2d)
    assert model.second is model.first
    assert graph.frozen.all()


def test_grouped_convolutions_make_new_channels() -> None:
    graph = trace(Grouped())
    assert frozen_by(graph, "b") == frozen_by(graph, "a.1") == ""
    assert not set(ids_of(graph, "b")) & set(ids_of(graph, "a.1"))
    assert "b" in graph.origin


def test_an_excluded_grouped_convolution_freezes() -> None:
    model = Grouped()
    quantize_layers(model, bits=4, exclude=["b"])
    graph = channel_graph(model, X)
    assert "b (Conv2d) is a grouped layer left in float" in frozen_by(graph, "a.1")


@pytest.mark.parametrize("kind", ["control flow", "error without words"])
def test_an_untraceable_model_warns_and_is_cut_in_parts(kind: str) -> None:
    class Asserting(Chain):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                raise TypeError
            return super().forward(x)

    model = Untraceable() if kind == "control flow" else Asserting()
    with pytest.warns(UserWarning, match=r"torch.fx cannot trace .* that it can trace \(.*a.*\)"):
        compressor = Compressor(model, X, 0.01)
    with torch.no_grad():
        model.get_parameter("a.0.bit_depth")[:3] = 0
    settle_statistics(compressor.graph, model)
    before = model.eval()(X)
    assert compressor.cut()
    # Channels inside of a traced part can be removed, but not those of its output.
    assert model.get_parameter("a.0.weight").shape == (3, 3, 3, 3)
    assert model.get_parameter("b.0.weight").shape == (7, 6, 3, 3)
    torch.testing.assert_close(model(X), before)


class Random(nn.Module):
    """Draws from torch's generator in forward, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 6), Chain()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 0 * F.dropout(self.a(x)).sum() + self.b(x) * torch.ones(5)[torch.arange(5)]
        return y


@pytest.mark.parametrize("build", [Chain, Random, Untraceable])
def test_tracing_leaves_no_trace(build: Callable[[], nn.Module]) -> None:
    """Building the channel graph changes no mode, tensor, attribute or random state."""
    model = build()
    quantize_layers(model, bits=4)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model.train()
    norm.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    random = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        channel_graph(model, X)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("build", [Chain, Grouped])
def test_a_float_network_is_followed_too_and_has_macs(build: Callable[[], nn.Module]) -> None:
    float_macs = measure(model := build(), channel_graph(model, X), starting_weights(model)).macs
    assert float_macs == Compressor(build(), X, 0.0).size().macs > 0


class Assigned(nn.Module):
    """Assigns to items of tensors, and reads a tensor both before and after the assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.c, self.d = nn.Conv2d(5, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        before = x.mean((2, 3), keepdim=True)
        x[:, :, 0] = 0
        padded = torch.zeros_like(x)
        padded[:, :, 1:] = before
        y: Tensor = self.d(torch.relu(self.c(x + padded)))
        return y


def test_what_items_are_assigned_to_keeps_its_channels_alone() -> None:
    """Channels of a tensor whose items are assigned to stay; those of other tensors can go."""
    model = Assigned().double()
    compressor = Compressor(model, X.double(), 0.0, bits=8)
    report = {layer.name: layer for layer in compressor.report().layers}
    assert [report[name].removable for name in ("a", "b", "c")] == [6, 0, 4]
    assert "setitem_" in report["b"].why
    check_exact(compressor, X.double(), shrinks=False)


def test_what_is_assigned_is_read_though_the_row_behind_it_has_died() -> None:
    """Items that are assigned to a dead channel are still read, so a row that reads them stays."""

    class Framed(Assigned):
        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.relu(self.a(x)))
            x[:, :, 0] = 1
            y: Tensor = self.deep(x)  # type: ignore[operator]
            return y

    model = Framed()
    # Without the assignment, some of its rows would read nothing but zeros.
    model.deep = nn.Conv2d(5, 5, 3, groups=5)
    compressor = Compressor(model, X, 0.0, bits=8)
    with torch.no_grad():
        for name in ("bit_depth", "bias"):
            model.get_parameter(f"b.{name}")[:2] = 0
    before = model.eval()(X)
    compressor.cut()
    torch.testing.assert_close(model(X), before)


class InPlace(nn.Module):
    """Changes a tensor in place, and afterwards reads it and a view of it made before."""

    def __init__(self, change: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(3, 6, 3, bias=False)
        self.c, self.change = nn.Conv2d(6, 4, 3), change

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        view = a[:, :, 1:]
        self.change(a, self.b(x))
        y: Tensor = self.c(a) + self.c(view).mean((2, 3), keepdim=True)
        return y


def add_to(x: Tensor, y: Tensor) -> None:
    x += y


def assign_to(x: Tensor, y: Tensor) -> None:
    x[:, :, 2] = y[:, :, 2]


def assign_where(x: Tensor, y: Tensor) -> None:
    x[y > 0] = 1.0


@pytest.mark.parametrize(
    "change",
    [
        add_to,
        assign_to,
        assign_where,
        lambda x, y: x.add_(y),
        lambda x, y: F.relu(x, inplace=True),
    ],
)
def test_what_is_changed_in_place_is_seen_by_all_its_readers(
    change: Callable[[Tensor, Tensor], object],
) -> None:
    model = InPlace(change)
    compressor = Compressor(model, X, 0.01)
    with torch.no_grad():
        model.get_parameter("a.bit_depth")[:3] = 0  # the values that b adds there are still read
    before = model.eval()(X)
    compressor.cut()
    torch.testing.assert_close(model(X), before)
    assert model.a.weight.shape[0] == 3


def test_connected() -> None:
    """`connected` tells whether the output depends on the input without the given layers."""
    graph = trace(Residual(relu_after=False))
    assert connected(graph, set())
    assert connected(graph, {"one.0"})
    assert connected(graph, {"one.0", "two.0", "two.1"})
    assert not connected(graph, {"stem.0"})
    assert not connected(graph, {"one.0", "stem.1"})
    assert not connected(graph, {"head.linear"})
    # One side of the concatenation is enough, and then one of the two paths to the sum.
    graph = trace(Cat())
    assert connected(graph, {"left.0"})
    assert connected(graph, {"right.0", "join.0"})
    assert not connected(graph, {"left.0", "right.0"})
    assert not connected(graph, {"left.0", "join.0"})


@pytest.mark.parametrize("name", NETWORKS)
def test_widths_agree_with_the_modules(name: str) -> None:
    """The graph has an id for every output channel of a layer, and knows every quantised layer."""
    cut = prepare(name)
    for node in cut.graph.nodes:
        if node.module:
            module = cut.model.get_submodule(node.module)
            if isinstance(module, QuantizedLayer):
                assert len(cut.graph.ids[node.name]) == module.out_width
    assert cut.graph.origin.keys() >= quantized_layers(cut.model).keys()


def test_removing_strikes_ids_from_every_tensor() -> None:
    graph = trace(Residual(relu_after=True))
    graph.shrink([int(ids_of(graph, "stem.1")[2])], [], {}, {})
    assert len(ids_of(graph, "stem.1")) == len(ids_of(graph, "two.1")) == 5
    assert len(ids_of(graph, "stem.0")) == 6
    assert np.array_equal(ids_of(graph, "stem.1"), ids_of(graph, "two.1"))


def test_an_error_of_ours_is_told_and_keeps_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in our own code becomes a warning and freezes the channels, and raises nothing."""

    def fails(*arguments: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("selfcompress.graph.follow._Builder._combine", fails)
    with pytest.warns(UserWarning, match=r"relu \[relu\] ran into IndexError .* report this"):
        graph = trace(Function(F.relu))
    assert "list index out of range" in frozen_by(graph, "a")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x[:, :0], x], 1),
        lambda x: torch.split(x, [0, 6], 1)[1],
        lambda x: x + x.mean().mean(0),
        lambda x: x + torch.sum(x.sum(), dim=-1),
    ],
)
def test_nothing_is_to_be_reported_of_what_is_legitimate(function: Any) -> None:
    """These unusual but valid operations freeze channels without a warning of an error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frozen_by(trace(Function(function)), "a")
