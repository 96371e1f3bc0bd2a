"""Ways in which people write models that once led to wrong cuts, or to errors."""

import warnings
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from networks import Residual, block
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils import _pytree as pytree

from selfcompress import Compressor, to_dense
from selfcompress.graph.liveness import settle_statistics
from selfcompress.graph.planner import plan_cut
from selfcompress.layers.quantized import QuantConv2d
from selfcompress.surgery import Plan
from selfcompress.verify import CutError, compare, snapshot

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def outputs(model: nn.Module, args: tuple[Any, ...], training: bool) -> list[Tensor]:
    """Return all tensors that the model returns, and restore its buffers."""
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    returned: list[Tensor] = pytree.tree_leaves(model.train(training)(*args))
    for buffer, value in buffers.items():
        buffer.copy_(value)
    return returned


@torch.no_grad()
def cut_some(compressor: Compressor) -> None:
    """Kill a third of all rows, zero half of all biases, cut, and check outputs in both modes."""
    model = compressor.model
    for layer in compressor.layers.values():
        layer.bit_depth[::3] = 0
        if layer.bias is not None:
            layer.bias[::2] = 0
    settle_statistics(compressor.graph, model)
    inputs = compressor.example_input
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    before = [outputs(model, args, mode) for mode in (True, False)]
    compressor.cut()
    after = [outputs(model, args, mode) for mode in (True, False)]
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


class Tapped(nn.Module):
    """A model whose decoder reads what a forward hook has stored."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.decoder = nn.Conv2d(14, 4, 1)
        self.encoder[1].register_forward_hook(lambda m, i, o: self.seen.update(x=o))

    def forward(self, x: Tensor) -> Any:
        y = self.encoder(x)
        return self.decoder(torch.cat([y, self.seen["x"]], 1))


class Shared(nn.Module):
    """Two blocks that are traced separately and share a layer."""

    class Block(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.first, self.shared, self.last = block(6, 6), shared, block(6, 6)

        def forward(self, x: Tensor) -> Any:
            return self.last(torch.relu(self.shared(self.first(x))))

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.stem, self.linear = nn.Conv2d(3, 6, 1), nn.Linear(6, 5)
        self.a, self.b = Shared.Block(shared), Shared.Block(shared)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if float(x.sum()) > -1e9:
            x = x + self.a(x)
        return self.linear((x + self.b(x)).mean((2, 3)))


class Varied(nn.Module):
    """A block that is called in two ways by code that cannot be traced."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = block(6, 6), block(6, 6)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Any:
            y = self.a(x)
            return self.b(y if skip is None else y + skip)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.linear = nn.Conv2d(3, 6, 1), Varied.Block(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if float(x.sum()) < -1e9:
            return x
        return self.linear(self.block(self.block(x), x).mean((2, 3)))


class Evaluated(nn.Module):
    """A model that flips its features in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.linear = block(3, 6), block(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x)).mean((2, 3))
        return self.linear(x if self.training else x.flip(1))


class Cast(nn.Module):
    """Casts a matrix with type_as() to the dtype of a tensor of higher rank."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time, self.linear = nn.Conv2d(3, 6, 1), nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        t = self.time(x.mean((2, 3))).type_as(h)
        return self.linear(torch.relu(h + t[:, :, None, None]).mean((2, 3)))


class Up(nn.Module):
    """Passes the size of the output to a transposed convolution by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 3, stride=2), nn.ConvTranspose2d(6, 5, 3, stride=2)
        self.last = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.down(x))
        return self.last(torch.relu(self.up(y, output_size=x.shape[2:])))


Pair = namedtuple("Pair", ["left", "right"])


class Pairs(nn.Module):
    """Returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = block(3, 6), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return Pair(self.left(x), self.right(x))


class Instance(nn.Module):
    """Applies an instance norm to a matrix, which torch then normalises over its features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 12), nn.InstanceNorm1d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.relu(self.norm(self.a(x.mean((2, 3))))))


class Widths(nn.Module):
    """Computes with the number of channels of a layer or norm, read as `way` says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 5)

    def width(self) -> int:
        if self.way == "shape of a weight":
            return self.conv.weight.shape[0]
        if self.way == "shape of a statistic":
            assert self.norm.running_mean is not None
            return self.norm.running_mean.shape[0]
        reads: dict[str, Callable[[], int]] = {
            "view behind a norm": lambda: self.conv.out_channels,
            "out_channels": lambda: self.conv.out_channels,
            "num_features": lambda: self.norm.num_features,
            "in_features": lambda: self.linear.in_features,
        }
        return reads[self.way]()

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm(self.conv(x)))
        if self.way != "in_features":
            x = x.view(x.size(0), self.width(), -1)
        x = x.flatten(2).mean(2)
        return self.linear(x if self.way == "view behind a norm" else x / self.width() ** 0.5)


def changing_hook() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1))
    model[0].register_forward_hook(lambda m, i, o: o + 1)
    return model


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
@pytest.mark.parametrize(
    "build",
    [
        Tapped, lambda: Shared(nn.Conv2d(6, 6, 1)), lambda: Shared(nn.PReLU(6)), Varied, Evaluated,
        Cast, Up, Pairs, Instance, changing_hook, lambda: Widths("out_channels"),
        lambda: Widths("num_features"), lambda: Widths("in_features"),
        lambda: Widths("view behind a norm"), lambda: Widths("shape of a weight"),
        lambda: Widths("shape of a statistic"),
    ],
)  # fmt: skip
def test_a_cut_is_exact(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    compressor = Compressor(build().double(), X, 0.0, bits=8)
    before = sum(len(layer.rows) for layer in compressor.layers.values())
    cut_some(compressor)
    assert sum(len(layer.rows) for layer in compressor.layers.values()) < before
    cut_some(compressor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_are_judged_by_their_own_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(3, 8), block(8, 8), nn.Conv2d(8, 4, 1)).to(dtype)
    compressor = Compressor(model, X.to(dtype), 0.0, bits=8)
    with torch.no_grad():
        for layer in compressor.layers.values():
            layer.bit_depth[::3] = 0
    assert compressor.cut()


class Shuffled(nn.Module):
    """Reads the number of groups of a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.last = nn.Conv2d(3, 9, 1, groups=3, bias=False), nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.grouped(x).unflatten(1, (self.grouped.groups, -1))
        return self.last(x.transpose(1, 2).flatten(1, 2) / self.grouped.groups)


def test_groups_that_are_counted_keep_their_rows() -> None:
    compressor = Compressor(Shuffled().double(), X, 0.0, bits=8)
    with torch.no_grad():
        compressor.layers["grouped"].bit_depth[:3] = 0
    cut_some(compressor)
    assert len(compressor.layers["grouped"].weight) == 9


class Shaped(nn.Module):
    """Reshapes or casts a tensor by the width of a layer or the dtype of a norm, as `way` says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.squeeze, self.linear = nn.Linear(6, 6, bias=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3))))
        if self.way == "own width":
            gate = gate.view(x.size(0), self.squeeze.out_features, 1, 1)
        elif self.way == "torch.reshape":
            gate = torch.reshape(gate, (-1, self.linear.in_features, 1, 1))
        elif self.way == "keyword":
            gate = gate.reshape(shape=(-1, self.linear.in_features, 1, 1))
        else:
            gate = gate.to(self.norm.weight.dtype)[:, :, None, None]
        return self.linear((x * gate).mean((2, 3)))


@pytest.mark.parametrize("way", ["own width", "torch.reshape", "keyword", "dtype of a norm"])
def test_a_shape_or_type_that_layers_have_holds_no_rows(way: str) -> None:
    """Reading a width only to reshape, or a dtype, does not keep channels from being removed."""
    torch.manual_seed(0)
    compressor = Compressor(Shaped(way).double(), X, 0.0, bits=8)
    cut_some(compressor)
    assert len(compressor.layers["conv"].weight) == 4
    assert compressor.layers["linear"].weight.shape[1] == 4
    assert len(compressor.model.get_parameter("norm.weight")) == 4


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_a_width_that_is_read_in_evaluation_alone_or_of_a_float_layer_is_minded() -> None:
    """Cuts stay exact if forward() computes with a width in eval mode only, or of a float layer."""

    class Evaluates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 6, 1, bias=False), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Any:
            x = torch.relu(self.conv(x)).mean((2, 3))
            return self.linear(x / (6 if self.training else self.conv.out_channels))

    class Scaled(Evaluates):
        def forward(self, x: Tensor) -> Any:
            x = torch.relu(self.conv(x)).mean((2, 3))
            return self.linear(x) / self.linear.in_features**0.5

    cut_some(Compressor(Evaluates().double(), X, 0.0, bits=8))
    cut_some(Compressor(Scaled().double(), X, 0.0, bits=8, exclude=["linear"]))


def test_a_scripted_part_freezes_its_neighbours_alone() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()))
    model = nn.Sequential(
        block(3, 9), nn.Conv2d(9, 6, 1), scripted, block(6, 9), nn.Conv2d(9, 4, 1)
    )
    compressor = Compressor(model.double(), X, 0.0, bits=8)
    cut_some(compressor)
    # Channels have been removed between the first two layers and between the last two.
    assert [compressor.layers[name].in_width for name in ("1", "4")] == [6, 6]


def test_the_class_of_a_layer_of_ones_own_is_left_alone() -> None:
    """A user's class must not be subclassed if its __init_subclass__ would record that."""
    known: dict[str, type] = {}

    class Mine(nn.Linear):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            known[cls.__name__] = cls

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mine = nn.Conv2d(3, 6, 1, bias=False), Mine(6, 5)

        def forward(self, x: Tensor) -> Any:
            assert type(self.mine) is Mine
            return self.mine(torch.relu(self.conv(x)).mean((2, 3)))

    compressor = Compressor(Net().double(), X, 0.0, bits=8)
    assert compressor.graph.nodes and not known
    assert type(compressor.model.conv) is QuantConv2d


def test_flattening_to_the_width_of_a_layer_holds_no_channels() -> None:
    """A view to a layer's `in_features` adapts to a cut, so channels can be removed."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 6, 3, stride=3, bias=False), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            flat: Tensor = self.linear(x.view(-1, self.linear.in_features))
            return flat

    compressor = Compressor(Flat().double(), X, 0.0, bits=8)
    cut_some(compressor)
    assert compressor.layers["linear"].weight.shape[1] == 16


@pytest.mark.parametrize("alone", [True, False])
def test_layers_in_a_plain_list_are_refused(alone: bool) -> None:
    """A plain list still holds the float layers, which forward() would go on to call."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.both = [self.a, self.b]

        def forward(self, x: Tensor) -> Tensor:
            if not alone:
                x = self.b(self.a(x))
            for layer in self.both:
                x = torch.relu(layer(x))
            return x

    with pytest.raises(ValueError, match="a is called past the model"):
        Compressor(Listed(), X.float(), 0.1)


class Frozen(OrderedDict[str, int]):
    """A user's dict that refuses to be changed."""

    def update(self, *_: Any) -> None:  # type: ignore[override]
        raise TypeError

    clear = update


class Tags(set[str]):
    """A user's set that cannot be built from its elements alone."""

    def __init__(self, name: str, values: list[str]) -> None:
        super().__init__(values)


class Remembers(nn.Module):
    """Stores what it computes in attributes and containers, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.map: Tensor | None = None
        self.losses: list[Tensor] = []
        self.maps: dict[str, dict[str, Tensor]] = {"all": {}}
        self.names, self.seen = Frozen(a=1), Tags("x", ["a"])
        self.found: Any = defaultdict(list, {"a": [1]})
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        self.map = torch.sigmoid(self.conv(x))
        self.losses.append(self.map.mean())
        self.maps["all"]["last"] = self.map
        self.found["b"].append(1)
        self.found["a"].append(1)
        return self.map


def test_looking_at_a_model_leaves_nothing_behind() -> None:
    model: Any = nn.Sequential(Remembers(), nn.Conv2d(6, 2, 1))
    lists = model[0].losses, model[0].maps["all"]
    compressor = Compressor(model, X.float(), 0.0)
    with torch.no_grad():
        compressor.layers["1"].bit_depth[0] = 0
    assert compressor.cut() is not None
    assert model[0].map is None
    assert (model[0].losses, model[0].maps) == ([], {"all": {}})
    assert (model[0].names, model[0].seen, model[0].found) == ({"a": 1}, {"a"}, {"a": [1]})
    assert model.get_buffer("0.calls") == 0
    model(X.float())
    assert [len(kept) for kept in lists] == [1, 1]  # still the same objects


def test_finish_takes_as_many_inputs_as_the_example() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.linear = block(3, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.linear((self.a(x) - self.a(y)).mean((2, 3)))

    x = X.float()
    model = Siamese()
    compressor = Compressor(model, (x, x), 0.0)
    compressor.finish([(x, x + 1, torch.zeros(4))])
    assert model.get_buffer("a.1.running_mean").abs().max() > 0


def test_a_grouped_convolution_that_died_in_two_cuts_is_restored() -> None:
    """A state can be loaded in which a second cut has left a grouped convolution without rows."""

    def build() -> tuple[Compressor, SGD]:
        torch.manual_seed(0)
        model = Residual(relu_after=True)
        model.one[0] = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        model.one[1], model.two[0] = nn.Identity(), nn.Conv2d(6, 6, 3, padding=1)
        model.pre = nn.Identity()
        compressor = Compressor(model, X.float(), 0.0)
        return compressor, SGD(compressor.weights(), lr=0.1)

    compressor, optimizer = build()
    model = compressor.model
    with torch.no_grad():
        for names in (["stem.0"], ["one.0"]):
            for name in names:
                layer = compressor.layers[name]
                layer.bit_depth[[0, 3] if name == "stem.0" else slice(None)] = 0
                if layer.bias is not None:
                    layer.bias.zero_()
            if names == ["stem.0"]:
                model.get_parameter("stem.1.bias")[[0, 3]] = -1
                model.get_parameter("two.1.bias")[[0, 3]] = 0
                compressor.layers["two.0"].bit_depth[[0, 3]] = 0
            compressor.cut(optimizer)
    fresh, other = build()
    fresh.load_state_dict(compressor.state_dict(optimizer), other)
    x = X.float()
    assert torch.equal(fresh.model.eval()(x), model.eval()(x))
    F.relu(fresh.model.train()(x)).sum().backward()


@dataclass
class Answer:
    """An object like those that models of some libraries return."""

    logits: Tensor


class Answers(nn.Module):
    """Returns an object that torch's pytree does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.b(torch.relu(self.a(x.mean((2, 3))))))


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_a_wrong_cut_is_noticed_in_an_object_that_is_returned() -> None:
    compressor = Compressor(Answers().double(), X, 0.0)
    before = snapshot(compressor.model, X)
    with torch.no_grad():
        compressor.layers["b"].weight[0] += 1
    with pytest.raises(CutError, match="layer b"):
        compare(before, snapshot(compressor.model, X), Plan(), 1e-4)


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_what_is_no_output_of_an_object_that_is_returned_may_change() -> None:
    """A returned object may hold weights, which a cut changes, and outputs of earlier calls."""

    class Holds(Answers):
        past: ClassVar[list[Tensor]] = []

        def forward(self, x: Tensor) -> Any:
            answer: Any = super().forward(x)
            answer.weight = self.a.weight
            self.past.append(answer.logits)
            answer.past = self.past
            return answer

    compressor = Compressor(Holds().double(), X, 0.0, bits=8)
    with torch.no_grad():
        compressor.layers["a"].bit_depth[::3] = 0
    assert compressor.cut() is not None


class Spectrum(nn.Module):
    """Has a layer of complex numbers, and returns some."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.waves = nn.Linear(8, 8, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        waves: Tensor = self.waves(torch.fft.fft(self.b(torch.relu(self.a(x)))))
        return waves.conj()


@pytest.mark.filterwarnings("error::numpy.exceptions.ComplexWarning")
def test_complex_layers_stay_in_float_and_complex_outputs_are_compared() -> None:
    torch.manual_seed(0)
    model = Spectrum().double()
    with torch.no_grad():
        model.waves.bias.fill_(1j)
    compressor = Compressor(model, X, 0.0, bits=8)
    assert compressor.left_in_float == {"waves": "it computes with complex numbers"}
    cut_some(compressor)
    before = snapshot(compressor.model, X)
    with torch.no_grad():
        model.waves.weight[0] += 1j
    with pytest.raises(CutError):
        compare(before, snapshot(compressor.model, X), Plan(), 1e-4)


def test_what_was_noted_on_a_layer_stays_and_a_forward_that_was_replaced_too() -> None:
    """Attributes, buffers, modules, hooks and forward() that users set on a layer are kept."""
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)).double()
    model[2].rate = 0.1
    model[2].register_buffer("peak", torch.tensor(2.0))
    model[2].act, model[2].gain = nn.ReLU(), nn.Parameter(torch.tensor(3.0))
    seen: list[Any] = []
    model[2].register_full_backward_hook(lambda *given: seen.append(given))
    for index in (0, 1):
        ordinary = model[index].forward
        model[index].forward = lambda x, ordinary=ordinary: 2 * ordinary(x)
    model.eval()
    before = model(X)
    compressor = Compressor(model, X, 0.0, bits=16)
    assert compressor.left_in_float == {"0": "its forward() has been replaced"}
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model(X), before, rtol=1e-2, atol=1e-2)
    model(X.requires_grad_()).sum().backward()
    X.requires_grad_(False).grad = None
    assert (model[2].rate, len(seen)) == (0.1, 1)
    dense: Any = to_dense(model)
    for holder in (model[2], dense[2]):
        assert (holder.rate, holder.peak, holder.gain) == (0.1, 2, 3)
        assert type(holder.act) is nn.ReLU
    assert {"2.peak", "2.gain"} <= model.state_dict().keys()
    assert not hasattr(dense[2], "columns")


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_instance_norm_is_for_as_many_channels_as_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    compressor = Compressor(model.double(), X, 0.0, bits=8)
    cut_some(compressor)
    assert model[1].num_features == compressor.layers["3"].in_width < 8


class Detector(nn.Module):
    """Sorts its scores, so that a difference in the last place can change their order."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU())
        self.more = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU())
        self.scores = nn.Conv2d(48, 21, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores, labels = self.scores(self.more(self.body(x))).flatten(2).max(1)
        best, order = scores.sort()
        return {"scores": best, "labels": labels.gather(1, order)}


class Rounding(nn.Module):
    """Rounds its input to 256 levels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 2 / 255, 0, 0, 255)


def rounded() -> nn.Module:
    layers: list[nn.Module] = []
    for width in (3, 48, 48, 48, 48):
        layers += [nn.Conv2d(width, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 1)]
        layers += [nn.ReLU(), Rounding()]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*layers, nn.Conv2d(48, 4, 1))


@pytest.mark.parametrize("build", [Detector, rounded])
def test_outputs_that_jump_where_rounding_differs_stop_no_training(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    compressor = Compressor(build(), torch.rand(4, 3, 64, 64), 0.0, bits=8)
    with torch.no_grad():
        for layer in compressor.layers.values():
            if len(layer.rows) == 48:
                layer.bit_depth[torch.randperm(48)[:19]] = 0
    with pytest.warns(UserWarning, match="cannot be checked: the model sorts, compares or rounds"):
        assert compressor.cut() is not None


def test_a_wrong_cut_is_noticed_though_outputs_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(graph: Any, model: nn.Module, alive: Any, multiple: int) -> Any:
        alive.rows["0"][0] = False
        return plan_cut(graph, model, alive, multiple)

    torch.manual_seed(1)
    compressor = Compressor(rounded(), torch.rand(4, 3, 16, 16), 0.0, bits=8)
    monkeypatch.setattr("selfcompress.compressor.plan_cut", too_much)
    with pytest.raises(CutError):
        compressor.cut()


class LazilyHooked(nn.Module):
    """Its forward() registers hooks at its first call, as some of transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)])
        self.heads = nn.ModuleList([nn.Conv2d(8, 5, 1), nn.Conv2d(16, 5, 1)])
        self.found: list[Tensor] = []
        self.hooked = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.found = []
            for stage in self.stages:
                stage.register_forward_hook(lambda m, args, out: self.found.append(out))
            self.hooked = True
        self.found.clear()
        for stage in self.stages:
            x = stage(x)
        maps = zip(self.heads, self.found, strict=True)
        return torch.stack([head(found).mean((2, 3)) for head, found in maps]).sum(0)


def test_hooks_that_forward_registers_once_do_not_pile_up() -> None:
    model = LazilyHooked().double()
    compressor = Compressor(model, X, 0.0, bits=8)
    assert not model.hooked
    assert not any(stage._forward_hooks for stage in model.stages)
    cut_some(compressor)


class TakesApart(nn.Module):
    """Changes its argument: takes a tensor out of the dict and normalises it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch.pop("x")
        x -= 0.5
        x /= 0.25
        y: Tensor = self.layers(x)
        return y


def test_the_example_stays_as_it_was_though_forward_changes_what_it_is_given() -> None:
    example = {"x": X.clone()}
    compressor = Compressor(TakesApart().double(), (example,), 0.0, bits=8)
    with torch.no_grad():
        compressor.layers["layers.0"].bit_depth[:3] = 0
    assert compressor.cut() is not None
    assert torch.equal(example["x"], X)


class Paste(nn.Module):
    """Changes its input in place, behind a branch on values that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> None:
        if x.abs().sum() >= 0:
            x[:, 0] = x[:, 1:].mean(1)


class Writes(nn.Module):
    """Changes a tensor in a way that no operation of the trace shows."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.paste = way, Paste()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.deep, self.out = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, other = self.a(x) * 1, self.b(x).flip(1)
        if self.way == "list":
            torch._foreach_add_([y], [other])
        elif self.way == "out":
            with torch.no_grad():
                torch.add(y, other, out=y)
        else:
            self.paste(y)
        z: Tensor = self.out(torch.relu(self.deep(y)).mean((2, 3)))
        return z


@pytest.mark.parametrize("way", ["list", "out", "module"])
def test_what_is_written_in_ways_that_are_not_followed_is_not_taken_for_constant(way: str) -> None:
    """The channel of a dead row is not constant if something else writes to it."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compressor = Compressor(Writes(way).double(), X, 0.0, bits=8)
    followed = way == "module"  # except the tensor that it writes to
    assert any("changes what it is given" in str(w.message) for w in told) != followed
    assert (sum(layer.removable for layer in compressor.report().layers) > 0) == followed
    with torch.no_grad():
        compressor.layers["a"].bit_depth[0] = 0
        assert compressor.layers["a"].bias is not None
        compressor.layers["a"].bias[0] = 0
    before = compressor.model.eval()(X)
    compressor.cut()
    torch.testing.assert_close(compressor.model(X), before)


class Gate(nn.Module):
    """Branches on values, so that it cannot be traced, after an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        y: Tensor = x if x.mean() > 1e9 else self.conv(x)
        return y


def test_what_a_part_that_cannot_be_traced_does_in_place_ends_no_trace() -> None:
    """A module that cannot be traced and changes its input must not end the trace around it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), Gate(), nn.Conv2d(6, 8, 1))
    compressor = Compressor(nn.Sequential(model, nn.Conv2d(8, 4, 1)).double(), X, 0.0, bits=8)
    assert list(compressor.graph.untraceable) == ["0.2"]
    assert [layer.removable for layer in compressor.report().layers] == [8, 0, 0, 8, 0]
    cut_some(compressor)


class Adds(nn.Module):
    """Adds in place to a slice of a new tensor, behind a layer that runs in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = torch.relu(self.a(x.mean((2, 3))))
        x = self.b(x.clone())
        out = torch.zeros(len(x), 8, dtype=x.dtype)
        out[:, :4] += x[:, 4:]
        y: Tensor = self.c(out)
        return y


def test_adding_to_a_part_of_an_ordinary_tensor_is_followed() -> None:
    compressor = Compressor(Adds().double(), X, 0.0, bits=8)
    assert not compressor.graph.untraceable
    with torch.no_grad():
        compressor.layers["a"].bit_depth[::3] = 0
    before = compressor.model.eval()(X)
    assert compressor.cut() is not None
    torch.testing.assert_close(compressor.model(X), before)


class Energy(nn.Module):
    """Returns the gradient of what it computes with respect to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            energy = self.layers(x)
            return torch.autograd.grad(energy.sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:torch.fx cannot trace")
def test_what_an_example_has_beside_its_numbers_is_there_at_every_look() -> None:
    """The copies of the example that the model is run on require gradients as the example does."""
    compressor = Compressor(Energy().double(), X.clone().requires_grad_(), 0.0, bits=8)
    with torch.no_grad():
        compressor.layers["layers.0"].bit_depth[::3] = 0
    assert compressor.cut() is not None


def test_a_wrong_cut_in_half_precision_is_not_taken_for_rounding() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.shift = nn.ModuleList(nn.Linear(32, 32) for _ in range(6)), 0.0

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x) + self.shift)
            return x

    torch.manual_seed(0)
    model = Shifted().to(torch.bfloat16)
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    compressor = Compressor(model, x, 0.0, bits=8)
    model.shift = 0.3  # another number than when the model was traced
    with torch.no_grad():
        for layer in compressor.layers.values():
            assert layer.bias is not None
            layer.bit_depth[:8] = layer.bias[:8] = 0
    with pytest.raises(CutError):
        compressor.cut()


class Bound(nn.Linear):
    """Keeps one of its own bound methods as an attribute."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.way = self.multiply

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.way(input)


def test_a_method_that_a_layer_keeps_is_that_of_its_twin() -> None:
    """A bound method kept as an attribute must refer to the quantised layer, not the float one."""
    model = nn.Sequential(nn.Flatten(), Bound(192, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    compressor = Compressor(model, X, 0.0, bits=8)
    assert not compressor.left_in_float
    cut_some(compressor)
    assert torch.equal(to_dense(model)(X), model(X))
