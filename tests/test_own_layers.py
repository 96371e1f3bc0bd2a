"""Layers of users' own classes: quantised, and followed where their forward() allows it."""

# mypy: disable-error-code="no-untyped-call"

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from exact import check_exact, computed, images, reported, started
from networks import block, kill
from torch import Tensor, nn

import selfcompress
from selfcompress import Compressor
from selfcompress.dense import to_dense


class PlainNorm(nn.BatchNorm2d):
    """A user's subclass that changes nothing."""


class SamePadded(nn.Conv2d):
    """A convolution with a constructor and a method of its own, but torch's forward()."""

    def __init__(self, ins: int, outs: int, size: int = 3) -> None:
        super().__init__(ins, outs, size, padding=size // 2)
        self.size = size

    def cost(self) -> int:
        return self.size**2


class Doubled(nn.Linear):
    """A linear layer that doubles what torch's forward() returns."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = SamePadded(3, 6), PlainNorm(6), SamePadded(6, 6, 1)
        self.head = Doubled(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.a, SamePadded) and isinstance(self.norm, PlainNorm)
        x = torch.relu(self.b(torch.relu(self.norm(self.a(x))))) / self.a.cost()
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def test_layers_of_own_classes_are_quantised_and_stay_of_their_class(tmp_path: Path) -> None:
    compressor = started(OwnLayers(), images())
    assert not compressor.left_in_float
    report = reported(compressor)
    assert [report[name].removable for name in ("a", "b", "head")] == [6, 6, 0]
    assert report["a"].kind == "SamePadded"
    check_exact(compressor, images())
    model = compressor.model
    want = computed(model, images(), training=False)

    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(again.a) is type(model.a)
    torch.testing.assert_close(computed(again, images(), training=False), want, rtol=0, atol=0)

    dense = to_dense(model)
    assert type(dense.a) is SamePadded and type(dense.norm) is PlainNorm
    assert type(dense.head) is Doubled
    torch.testing.assert_close(computed(dense, images(), training=False), want)
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", OwnLayers())
    assert isinstance(loaded.a, SamePadded) and loaded.a.cost() == 9
    torch.testing.assert_close(computed(loaded, images(), training=False), want, rtol=0, atol=0)


class WithDepth(nn.Conv2d):
    bit_depth = 8  # a name that a quantised layer needs


class WithSlots(nn.Conv2d):
    __slots__ = ("extra",)


class Switched(nn.Conv2d):
    def train(self, mode: bool = True) -> "Switched":
        return super().train(mode)


class Rescaled(nn.Conv2d):
    """Limits the norms of its rows at every call, as networks for EEG do."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(input)


class Packed(nn.Linear):
    """Stores its weight in another shape, as some quantised layers do."""

    def __init__(self, ins: int, outs: int, size: int) -> None:
        super().__init__(ins, outs)
        self.weight = nn.Parameter(self.weight.detach().reshape(-1, 1))

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.reshape(self.out_features, self.in_features)
        return F.linear(input.transpose(1, 3), weight, self.bias).transpose(1, 3)


class Renewed(nn.Conv2d):
    """Applies a mask to its weight in place at every call, which changes no value any more."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(torch.ones_like(self.weight))
        return super().forward(input)


class Refilled(nn.Conv2d):
    """Applies a mask to its weight through `.data`, unseen by autograd, as PixelCNNs do."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data *= torch.ones_like(self.weight)
        return super().forward(input)


class Replaced(nn.Conv2d):
    """Assigns itself a new weight at every call."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight = nn.Parameter(self.weight.detach().clone())
        return super().forward(input)


class WithoutAny(nn.Conv2d):
    """Has no attribute `bias`, not even None."""

    def __init__(self, ins: int, outs: int, size: int) -> None:
        super().__init__(ins, outs, size)
        del self.bias

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


class WithCompute(nn.Conv2d):
    """Has a method of a name that a quantised layer needs."""

    def compute(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input)


class WithFanIn(nn.Conv2d):
    """Has an attribute of a name that a quantised layer needs."""

    def __init__(self, ins: int, outs: int, size: int) -> None:
        super().__init__(ins, outs, size)
        self.fan_in = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / self.fan_in


class WithExponent(nn.Conv2d):
    """Has a parameter of a name that a quantised layer needs."""

    def __init__(self, ins: int, outs: int, size: int) -> None:
        super().__init__(ins, outs, size)
        self.exponent = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.exponent


class Tagged(nn.Conv2d):
    tags: dict[str, str] = {}  # noqa: RUF012

    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.tags[tag] = cls.__name__


class Softplus(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return F.softplus(bias)


def with_rows(ins: int, outs: int, size: int) -> nn.Module:
    conv = nn.Conv2d(ins, outs, size)
    conv.register_buffer("rows", torch.arange(3))  # a user's buffer, under a name of ours
    return conv


def with_made_bias(ins: int, outs: int, size: int) -> nn.Module:
    conv = nn.Conv2d(ins, outs, size)
    nn.utils.parametrize.register_parametrization(conv, "bias", Softplus())
    return conv


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (WithDepth, "has what a quantised layer needs"),
        (WithSlots, "has what a quantised layer needs"),
        (Switched, "changes more than how it computes"),
        (Tagged, "changes more than how it computes"),
        (Rescaled, "its forward() changes its weight"),
        (Renewed, "its forward() changes its weight"),
        (Refilled, "its forward() changes its weight"),
        (Replaced, "its forward() changes its weight"),
        (WithoutAny, "its weight or bias is of another shape or type"),
        (WithCompute, "has what a quantised layer needs"),
        (WithFanIn, "has what a quantised layer needs"),
        (WithExponent, "has what a quantised layer needs"),
        (with_rows, "has what a quantised layer needs"),
        (Packed, "its weight or bias is of another shape or type"),
        (with_made_bias, "its weight is computed from other parameters"),
    ],
)
def test_classes_that_do_not_go_with_ours_stay_in_float(
    conv: Callable[[int, int, int], nn.Module], why: str
) -> None:
    model = nn.Sequential(block(3, 4), conv(4, 6, 1), block(6, 4), nn.Conv2d(4, 2, 1))
    kind = type(model[1])
    compressor = started(model, images())
    assert type(model[1]) is kind
    assert why in compressor.left_in_float["1"]
    check_exact(compressor, images(), shrinks=False)


def test_a_batch_norm_with_a_computed_weight_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Softplus())
    compressor = Compressor(model.double(), images(), 0.0, bits=8)
    kill(model, "0", [0, 3])
    before = computed(model, images(), training=True)
    compressor.cut()
    torch.testing.assert_close(computed(model, images(), training=True), before)


class Built(nn.Conv2d):
    def __new__(cls, ins: int, outs: int) -> "Built":
        return super().__new__(cls)

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs, 1)


def test_a_layer_with_a_constructor_of_its_own_is_copied() -> None:
    compressor = started(nn.Sequential(Built(3, 6), nn.Conv2d(6, 2, 1)), images())
    model = copy.deepcopy(compressor.model)
    assert isinstance(model, nn.Sequential) and isinstance(model[0], Built)


# --- with a forward() of their own ----------------------------------------------------------------


class Causal(nn.Conv1d):
    """A convolution over time that reads only the past."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Same(nn.Conv2d):
    """Pads by the size of the image and calls F.conv2d, as timm's Conv2dSame does."""

    def forward(self, input: Tensor) -> Tensor:
        size, step, kernel = input.shape[-1], self.stride[0], self.weight.shape[-2:]
        pad = max((-(-size // step) - 1) * step + kernel[0] - size, 0)
        input = F.pad(input, [pad // 2, pad - pad // 2] * 2)
        return F.conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class NormedConv(nn.Conv2d):
    """Applies a norm of its own and an activation, as detectron2's Conv2d does."""

    def __init__(self, ins: int, outs: int, *args: Any, **options: Any) -> None:
        super().__init__(ins, outs, *args, **options)
        self.norm = nn.BatchNorm2d(outs)

    def forward(self, input: Tensor) -> Tensor:
        x = F.conv2d(input, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        return F.relu(self.norm(x))


class Mixed(nn.Linear):
    """Casts its weight and bias to the dtype of its input, as layers of diffusion models do."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(dtype=input.dtype), bias)


class Tokens(nn.Linear):
    """Reads and returns tensors with channels in dimension 1, as a convolution does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(2).transpose(1, 2)).transpose(1, 2)


class Up(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.silu(super().forward(input, output_size))


def followed() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return name → a network of layers whose own forward() can be followed, and its input."""
    return {
        "causal": (
            nn.Sequential(Causal(3, 6, 3), nn.ReLU(), Causal(6, 5, 2, dilation=2), nn.Tanh(),
                          Causal(5, 6, 3), nn.Conv1d(6, 2, 1)),
            images(4, 3, 9),
        ),
        "same": (
            nn.Sequential(Same(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
                          Same(6, 6, 5, stride=2, groups=6), nn.ReLU(), Same(6, 2, 1)),
            images(4, 3, 9, 9),
        ),
        "normed": (
            nn.Sequential(NormedConv(3, 6, 3), NormedConv(6, 6, 3, groups=2, bias=False),
                          NormedConv(6, 4, 1), nn.Conv2d(4, 2, 1)),
            images(),
        ),
        "mixed": (nn.Sequential(Mixed(8, 6), nn.GELU(), Mixed(6, 5), nn.ReLU(), Mixed(5, 2)),
                  images(4, 8)),
        "tokens": (nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Tokens(6, 5), nn.ReLU(),
                                 nn.Conv1d(5, 2, 1)), images()),
        "up": (nn.Sequential(nn.Conv2d(3, 4, 3), Up(4, 6, 2, stride=2), Up(6, 3, 3)), images()),
    }  # fmt: skip


@pytest.mark.parametrize("name", followed())
def test_a_layer_with_a_forward_of_its_own_is_followed(name: str, tmp_path: Path) -> None:
    model, x = followed()[name]
    fresh = copy.deepcopy(model).double()
    compressor = started(model, x)
    assert not compressor.left_in_float
    *inner, last = compressor.report().layers
    assert all(layer.removable == layer.channels for layer in inner) and not last.removable
    float_macs = compressor.size().macs
    check_exact(compressor, x)
    assert compressor.size().macs < float_macs

    want = computed(model, x, training=False)
    for other in (to_dense(model), copy.deepcopy(model)):
        torch.testing.assert_close(computed(other, x, training=False), want)
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", fresh)
    torch.testing.assert_close(computed(loaded, x, training=False), want, rtol=0, atol=0)


def test_it_computes_with_the_quantised_weight_and_learns() -> None:
    """A layer's own forward() computes with the quantised weight and passes it a gradient."""
    model = nn.Sequential(Causal(3, 4, 3), nn.ReLU(), Causal(4, 2, 2)).double()
    plain = nn.Sequential(Causal(3, 4, 3), nn.ReLU(), Causal(4, 2, 2)).double()
    x = images(4, 3, 9)
    compressor = Compressor(model, x, gamma=0.01, bits=3)
    with torch.no_grad():
        for name, layer in compressor.layers.items():
            plain.get_parameter(f"{name}.weight").copy_(layer.quantized_weight())
            plain.get_parameter(f"{name}.bias").copy_(model.get_parameter(f"{name}.bias"))
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    weight, twin = (net.get_parameter("0.weight") for net in (model, plain))
    assert weight.grad is not None and twin.grad is not None
    inside = weight.grad != 0  # saturated weights have no gradient
    torch.testing.assert_close(weight.grad[inside], twin.grad[inside])
    assert model[0].weight is weight
    assert compressor.formats.collected.samples[compressor.layers["0"]] == 4


def test_it_still_counts_its_macs() -> None:
    """MACs are counted in layers with a forward() of their own."""
    model = nn.Sequential(Same(3, 6, 3, stride=2), nn.Flatten(), Doubled(96, 2)).double()
    compressor = Compressor(model, images(), 0.0, bits=4)
    assert compressor.size().macs == 3 * 6 * 9 * 16 + 96 * 2


class Standardised(nn.Conv2d):
    """Standardises its weight: rows have a mean of zero and a learnt gain, as in NFNets."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * self.gain
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Adapted(nn.Linear):
    """Adds a product with two small learnt matrices, as LoRA does."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.down = nn.Parameter(torch.randn(2, ins))
        self.up = nn.Parameter(torch.randn(outs, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.down.T @ self.up.T


class Regularised(nn.Linear):
    """Uses its weight a second time, apart from the product with its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) - self.weight.square().sum(1)


class BiasTwice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.bias


class WithoutBias(nn.Linear):
    """Has a bias, but does not add it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class ByValues(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.sum() > 0 else super().forward(-input)


class TwoProducts(nn.Linear):
    """Subtracts a second product with its weight, of another tensor than its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) - F.linear(input.abs(), self.weight)


class Backwards(nn.Conv2d):
    """Computes a transposed convolution with its weight, as tied decoders do."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv_transpose2d(input, self.weight, self.bias)


class ByChannels(nn.Conv2d):
    """Takes its number of channels, not `groups`, as its number of groups."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, groups=self.in_channels)


class OneGroup(nn.Conv2d):
    """Repeats its weight `groups` times, to compute a convolution of a single group."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight.repeat(1, self.groups, 1, 1), self.bias)


class ByWidth(nn.Linear):
    """Scales its output by the number of channels that it reads."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = super().forward(input) / self.in_features**0.5
        return y


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Standardised(6, 6, 1), "computes with its weight in a way of its own"),
        (Standardised(6, 6, 1, groups=3), "computes with its weight in a way of its own"),
        (
            Regularised(6, 5),
            "computes with its weight or bias, or with their sizes, in a way of its own",
        ),
        (
            BiasTwice(6, 5),
            "computes with its weight or bias, or with their sizes, in a way of its own",
        ),
        (WithoutBias(6, 5), "adds something else than its bias"),
        (ByValues(6, 5), "cannot be traced"),
        (TwoProducts(6, 5), "adds something else than its bias"),
        (Backwards(6, 6, 1), "computes as another kind of layer"),
        (ByChannels(6, 6, 1, groups=6), "does not take its number of groups from .groups"),
    ],
)
def test_what_cannot_be_followed_keeps_its_channels_but_not_its_rows(
    layer: nn.Module, why: str
) -> None:
    """Layers whose computation is not that of torch's keep channels, but lose rows without bits."""
    conv = isinstance(layer, nn.Conv2d)
    first: nn.Module = nn.Conv2d(3, 6, 1) if conv else nn.Linear(3, 6)
    x = images() if conv else images(4, 3)
    outs = 6 if conv else 5
    last: nn.Module = nn.Conv2d(outs, 2, 1) if conv else nn.Linear(outs, 2)
    model = nn.Sequential(first, nn.ReLU(), layer, nn.ReLU(), last)
    compressor = started(model, x)
    assert not compressor.left_in_float
    report = reported(compressor)
    assert report["0"].removable == report["2"].removable == 0
    assert why in report["2"].why
    check_exact(compressor, x)
    assert len(compressor.layers["2"].rows) < outs
    torch.testing.assert_close(computed(to_dense(model), x, False), computed(model, x, False))


def test_one_that_counts_its_groups_keeps_its_rows() -> None:
    """A cut of rows may change the number of groups, which this layer's forward() reads."""
    layer = OneGroup(6, 6, 1, groups=3)
    compressor = started(nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.Conv2d(6, 2, 1)), images())
    why = "its rows stay too: 1 is asked for its width, its statistics or its groups"
    assert reported(compressor)["1"].why == why
    check_exact(compressor, images(), shrinks=False)
    assert len(compressor.layers["1"].rows) == 6


@pytest.mark.parametrize("layer", [Adapted(6, 6), ByWidth(6, 6)])
def test_what_it_reads_beside_its_input_stays(layer: nn.Module) -> None:
    """Channels stay if a layer also reads them in a way of its own, or reads how many there are."""
    x = images(4, 3)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 2))
    compressor = started(model, x)
    assert reported(compressor)["0"].removable == 0
    check_exact(compressor, x)


def test_other_tensors_of_its_class_are_counted_and_stored(tmp_path: Path) -> None:
    """Parameters that a user's class adds to a layer are counted in float, saved and loaded."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), Adapted(6, 6), nn.Linear(6, 2))

    x = images(4, 3)
    compressor = started(build(), x)
    size = compressor.size()
    assert size.layers[1].weights == 36 + 24
    assert size.q_bits == 8 * (18 + 36 + 12) + 32 * 24
    plain = started(nn.Sequential(nn.Linear(6, 6)), images(4, 6)).size().layers[0]
    assert size.layers[1].stored_bits == plain.stored_bits + 64 * 24
    want = computed(compressor.model, x, training=False)
    selfcompress.save(compressor.model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", build().double())
    torch.testing.assert_close(computed(loaded, x, training=False), want, rtol=0, atol=0)


def test_one_that_is_called_twice_is_tied() -> None:
    """Both calls of a layer share their channels, which are removed together."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), Mixed(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.b(torch.relu(self.b(torch.relu(self.a(x))))))
            return y

    compressor = started(Twice(), images(4, 3))
    assert reported(compressor)["b"].removable == 6
    check_exact(compressor, images(4, 3))


def test_one_that_somebody_hooks_keeps_its_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 6), Mixed(6, 6), nn.Linear(6, 2))
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    compressor = started(model, images(4, 3))
    report = reported(compressor)
    assert report["0"].removable == report["1"].removable == 0
    check_exact(compressor, images(4, 3))


def test_it_may_be_in_a_part_of_a_model_that_cannot_be_traced() -> None:
    """A layer with its own forward() is followed in traceable parts of an untraceable model."""

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Mixed(3, 6), nn.ReLU(), Mixed(6, 5))
            self.head = Mixed(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.body(x)) if x.sum() < 1e9 else x
            return y

    compressor = started(Untraceable(), images(4, 3))
    report = reported(compressor)
    assert report["body.0"].removable == 6 and report["head"].removable == 0
    check_exact(compressor, images(4, 3))


def test_it_may_be_in_a_part_that_fails_after_it() -> None:
    """A layer in a module that cannot be traced keeps its channels, and so does the one before."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Mixed(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return x if x.sum() < 1e9 else -x

    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), Mixed(5, 6), Part(), nn.Linear(6, 2))
    compressor = started(model, images(4, 3))
    report = reported(compressor)
    assert report["0"].removable == 5
    assert report["2"].removable == report["3.inner"].removable == 0
    assert "3.forward(), which torch.fx cannot trace" in report["3.inner"].why
    check_exact(compressor, images(4, 3))


def test_a_training_with_it_is_compiled() -> None:
    model = nn.Sequential(Causal(3, 6, 3), nn.ReLU(), Causal(6, 2, 2)).double()
    x = images(4, 3, 9)
    compressor = Compressor(model, x, 0.01, bits=8)
    kill(model, "0", [1, 4])
    compressor.cut()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


SIZES: dict[str, Callable[[nn.Linear], Any]] = {
    "shape": lambda layer: layer.weight.shape[1],
    "size": lambda layer: layer.weight.size(1),
    "sizes": lambda layer: layer.weight.size()[0],
    "all": lambda layer: sum(layer.weight.shape),
    "numel": lambda layer: layer.weight.numel(),
    "len": lambda layer: len(layer.bias),
}


class BySize(nn.Linear):
    """Divides its output by a size of its weight or bias."""

    def __init__(self, what: str) -> None:
        super().__init__(6, 5)
        self.what = what

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = super().forward(input) / SIZES[self.what](self)
        return y


@pytest.mark.parametrize("what", SIZES)
def test_one_that_computes_with_sizes_of_its_weight_keeps_its_channels(what: str) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), BySize(what), nn.ReLU(), nn.Linear(5, 2))
    compressor = started(model, images(4, 3))
    report = reported(compressor)
    assert report["0"].removable == report["2"].removable == 0
    assert "or with their sizes" in report["2"].why
    check_exact(compressor, images(4, 3))


class Pieces(nn.Linear):
    """Splits its input and calls itself for each piece."""

    def forward(self, input: Tensor, whole: bool = True) -> Tensor:
        if whole:
            return torch.cat([self.forward(piece, False) for piece in input.split(2)])
        return super().forward(input)


class Held(nn.Linear):
    """Looks its weight and bias up in dicts of parameters."""

    def forward(self, input: Tensor) -> Tensor:
        weight = dict(self.named_parameters())["weight"]
        return F.linear(input, weight, self._parameters["bias"])


class Act(nn.Linear):
    """Sets an activation that its class has as None, and has a scale that may be set later."""

    act: Callable[[Tensor], Tensor] | None = None
    scale = 1.0

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs)
        self.act = torch.sin

    def forward(self, input: Tensor) -> Tensor:
        out = self.scale * super().forward(input)
        return out if self.act is None else self.act(out)


class UpBlock(nn.ConvTranspose2d):
    """A transposed convolution that applies a convolution of its own to its output."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs, 2, stride=2)
        self.conv = nn.Conv2d(outs, outs, 3)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        y: Tensor = self.conv(torch.relu(super().forward(input, output_size)))
        return y


@pytest.mark.parametrize("layer", [Pieces(6, 6), Held(6, 6), Act(6, 6), UpBlock(6, 6)])
def test_users_ways_that_work(layer: nn.Module, tmp_path: Path) -> None:
    """Unusual layers are followed exactly, and survive to_dense(), save() and load()."""
    conv = isinstance(layer, nn.ConvTranspose2d)
    ends: list[nn.Module] = [nn.Linear(3, 6), nn.Linear(6, 2)]
    if conv:
        ends = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)]
    x = images(4, 3, 5, 5) if conv else images(4, 3)
    model = nn.Sequential(ends[0], nn.ReLU(), layer, nn.ReLU(), ends[1]).double()
    fresh = copy.deepcopy(model)
    plain = computed(model, x, training=False)
    compressor = started(model, x, bits=16)
    for got, want in zip(computed(model, x, training=False), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0.01, atol=0.01)
    check_exact(compressor, x)
    want_now = computed(model, x, training=False)
    torch.testing.assert_close(computed(to_dense(model), x, training=False), want_now)
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", fresh)
    torch.testing.assert_close(computed(loaded, x, training=False), want_now, rtol=0, atol=0)


def test_what_is_set_on_a_layer_later_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 6), Act(6, 2))
    started(model, images(4, 3))
    layer: Any = model[1]
    layer.scale, layer.act = 3.0, torch.cos
    dense = to_dense(model)
    torch.testing.assert_close(
        computed(dense, images(4, 3), False), computed(model, images(4, 3), False)
    )


def test_a_trace_of_the_users_own_does_not_miss_the_quantiser() -> None:
    """A plain torch.fx trace must fail rather than record the weight before quantisation."""
    model = nn.Sequential(Doubled(3, 6), Doubled(6, 2))
    started(model, images(4, 3), bits=2)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)


class Recursive(nn.Linear):
    """Calls super() with its object's class, which is another one in the layer that replaces it."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = super(self.__class__, self).forward(input)
        return y


def test_a_class_that_does_not_bear_it_is_named() -> None:
    """A class that does not run as a quantised layer is named in the error, and can be excluded."""
    model = nn.Sequential(nn.Linear(3, 6), Recursive(6, 2)).double()
    with pytest.raises(
        ValueError, match=r"does not run: .*exclude those of your own classes \(1\)"
    ):
        Compressor(model, images(4, 3), 0.01, bits=4)
    again = nn.Sequential(nn.Linear(3, 6), Recursive(6, 2)).double()
    Compressor(again, images(4, 3), 0.01, exclude=["1"], bits=4)


class OtherKernel(nn.Conv2d):
    """Has a kernel_size of 3 by 3 pixels, but a weight of a single pixel."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs, 3)
        self.weight = nn.Parameter(torch.randn(outs, ins, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias)


def test_a_layer_in_float_of_another_kernel_than_it_says_is_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 6, 1), OtherKernel(6, 4), nn.Conv2d(4, 2, 1))

    model, x = build(), images(2, 3, 5, 5).float()
    compressor = Compressor(model, x, 0.01, bits=4)
    assert set(compressor.left_in_float) == {"1"}
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", build())
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=0)
