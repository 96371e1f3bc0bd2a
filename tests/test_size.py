"""Sizes are as counted by hand, and the penalty's gradient reaches the bit depths."""

# mypy: disable-error-code="no-untyped-call"

import pytest
import safetensors.torch
import torch
from networks import Chain, Flat, compressor_of
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from models import build
from models.resnet9 import ResNet9
from selfcompress import About, Compressor, LayerSize, Size
from selfcompress.file.write import pack
from selfcompress.formats import GIVING_UP
from selfcompress.graph.channels import ChannelGraph
from selfcompress.report import make_report
from selfcompress.size import measure, q_bits

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def chain(gamma: float = 0.01, exclude: tuple[str, ...] = ()) -> tuple[Chain, Compressor]:
    """Build conv 3→6, conv 6→7 at 8x8 and linear 7→5, of 162 + 378 + 35 weights."""
    model = Chain(bias=True)
    return model, compressor_of(model, X, gamma, exclude=exclude)


def set_bits(model: nn.Module, layer: str, bits: list[float]) -> None:
    with torch.no_grad():
        model.get_parameter(f"{layer}.bit_depth").copy_(torch.tensor(bits))


def by_name(size: Size) -> dict[str, LayerSize]:
    return {layer.name: layer for layer in size.layers}


def test_q_bits_are_equation_4() -> None:
    model, compressor = chain()
    set_bits(model, "a.0", [0, 1, 2, 2.5, 3, 8])
    set_bits(model, "b.0", [4, 4, 0, 0.2, 1, 1, 1])
    set_bits(model, "head.linear", [2, 2, 2, 2, 2])
    expected = 27 * (0 + 1 + 2 + 3 + 3 + 8) + 54 * (4 + 4 + 0 + 1 + 1 + 1 + 1) + 7 * 10
    assert q_bits(list(compressor.layers.values())).item() == expected
    assert compressor.size().q_bits == expected
    assert compressor.size().float_bits == 32 * (162 + 378 + 35)
    assert compressor.size().q_percent == pytest.approx(100 * expected / (32 * 575))
    assert compressor.penalty().item() == pytest.approx(0.01 * expected / 575)


def test_q_counts_fractions_only_in_fractional_mode() -> None:
    model = Chain()
    compressor = Compressor(model, X, 0.01, integer_bits=False)
    set_bits(model, "a.0", [0, 1, 2, 2.5, 3, 8])
    set_bits(model, "b.0", [0.0] * 7)
    set_bits(model, "head.linear", [0.5] * 5)
    assert q_bits(list(compressor.layers.values())).item() == pytest.approx(27 * 16.5 + 7 * 2.5)
    assert compressor.size().q_bits == pytest.approx(27 * 16.5 + 7 * 2.5)


def test_q_counts_the_inputs_a_layer_has_now() -> None:
    model, compressor = chain()
    set_bits(model, "a.0", [0, 0, 4, 4, 4, 4])
    with torch.no_grad():
        model.get_parameter("a.1.bias")[:2] = -1
    compressor.cut()
    assert compressor.size().q_bits == 27 * 16 + 36 * 28 + 7 * 20
    assert compressor.size().float_bits == 32 * 575


@pytest.mark.parametrize("integer_bits", [True, False])
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_the_gradient_of_the_penalty_is_gamma_fan_in_over_n(
    gamma: float, integer_bits: bool
) -> None:
    model = Chain()
    compressor = Compressor(model, X, gamma, bits=3, integer_bits=integer_bits)
    layers = {"a.0": 27, "b.0": 54, "head.linear": 7}
    depths = [model.get_parameter(f"{name}.bit_depth") for name in layers]
    grads = torch.autograd.grad(compressor.penalty(), depths)
    for grad, fan_in in zip(grads, layers.values(), strict=True):
        expected = gamma * fan_in / 575
        torch.testing.assert_close(grad, torch.full_like(grad, expected))
    assert compressor.penalty().item() == pytest.approx(gamma * 3)


def test_the_penalty_moves_every_bit_depth_that_the_task_has_no_use_for() -> None:
    model = Chain()
    compressor = Compressor(model, X, 0.1)
    start = [p.detach().clone() for n, p in model.named_parameters() if n.endswith("bit_depth")]
    optimizer = torch.optim.SGD(compressor.weights(), lr=0.1)
    for _ in range(3):
        (0 * model(X).sum() + compressor.penalty()).backward()
        compressor.step(optimizer)
    now: list[Tensor] = [p for n, p in model.named_parameters() if n.endswith("bit_depth")]
    moved = torch.cat(start) - torch.cat(now)
    # Rows that are given up lose bits fast; the others wait for that, and lose some meanwhile.
    slow, fast = moved.min(), moved.max()
    assert slow > 0.001
    torch.testing.assert_close(fast, GIVING_UP * slow, rtol=1e-3, atol=0)
    assert torch.minimum((moved - slow).abs(), (moved - fast).abs()).max() < 1e-3


def test_gamma_zero_has_no_penalty() -> None:
    model = Chain()
    compressor = Compressor(model, X, 0.0)
    before = model.get_parameter("a.0.bit_depth").detach().clone()
    assert compressor.penalty().item() == 0
    compressor.penalty().backward()
    compressor.step(torch.optim.SGD(compressor.weights(), lr=0.1))
    assert torch.equal(model.get_parameter("a.0.bit_depth"), before)


def test_stored_bits_by_hand() -> None:
    model, compressor = chain()
    set_bits(model, "a.0", [0, 1, 2, 2.5, 3, 8])
    layers = by_name(compressor.size())
    # 5 live rows of 27 weights with 1 + 2 + 3 + 3 + 8 bits; their formats; 6 biases; placement.
    assert layers["a.0"].stored_bits == 27 * 17 + 5 * 40 + 6 * 32 + 6
    assert layers["a.0"].channels == 5
    assert layers["a.0"].out_width == 6
    assert layers["a.0"].mean_bits == pytest.approx(17 / 5)
    assert layers["a.0"].weights == 135
    assert layers["a.1"].stored_bits == 4 * 6 * 32
    assert layers["b.0"].stored_bits == 54 * 28 + 7 * 40 + 7 * 32
    assert layers["head.linear"].stored_bits == 7 * 20 + 5 * 40
    size = compressor.size()
    assert size.stored_bits == sum(layer.stored_bits for layer in size.layers)
    assert size.parameters == 162 + 6 + 12 + 378 + 7 + 14 + 35
    assert size.weights == 135 + 378 + 35
    assert size.weights_percent == pytest.approx(100 * 548 / 575)
    assert size.stored_percent == pytest.approx(100 * size.stored_bits / (32 * 575))


def test_stored_bits_of_what_is_placed_after_a_cut() -> None:
    model, compressor = chain()
    set_bits(model, "a.0", [0, 0, 4, 4, 4, 4])
    with torch.no_grad():
        model.get_parameter("a.1.bias")[:2] = torch.tensor([-1.0, 1.0])
    compressor.cut()
    layers = by_name(compressor.size())
    # One of two dead channels stays, as the constant of a norm: 5 channels, 4 rows to place.
    assert layers["a.0"].stored_bits == 27 * 16 + 4 * 40 + 5 * 32 + 5
    assert layers["a.1"].stored_bits == 4 * 5 * 32
    assert layers["b.0"].stored_bits == 45 * 28 + 7 * 40 + 7 * 32
    compressor.cut()
    assert by_name(compressor.size()) == layers


def test_stored_bits_of_folded_norms_and_floats_of_16_bits() -> None:
    _, compressor = chain()
    full, folded = by_name(compressor.size()), by_name(compressor.size(fold_norms=True))
    half, both = by_name(compressor.size(half=True)), compressor.size(fold_norms=True, half=True)
    # 6 rows of 27 weights at 4 bits, their formats, 6 biases; a norm of 6 channels.
    assert full["a.0"].stored_bits == folded["a.0"].stored_bits == 27 * 24 + 6 * 40 + 6 * 32
    assert half["a.0"] == by_name(both)["a.0"]
    assert half["a.0"].stored_bits == 27 * 24 + 6 * 24 + 6 * 16
    norms = [size["a.1"].stored_bits for size in (full, folded, half, by_name(both))]
    assert norms == [4 * 6 * 32, 2 * 6 * 32, 4 * 6 * 16, 2 * 6 * 16]
    assert both.q_bits == compressor.size().q_bits


def test_an_excluded_layer_counts_at_32_bits() -> None:
    _, compressor = chain(exclude=("b",))
    size = compressor.size()
    layer = by_name(size)["b.0"]
    assert layer.q_bits == 378 * 32
    assert layer.stored_bits == (378 + 7) * 32
    assert layer.mean_bits == 32
    assert size.float_bits == 32 * 575
    assert size.q_bits == 27 * 24 + 378 * 32 + 7 * 20
    assert compressor.penalty().item() == pytest.approx(0.01 * (27 * 24 + 7 * 20) / 575)


def test_other_parameters_and_buffers_are_stored_and_counters_are_not() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.prelu = nn.Conv2d(3, 4, 1), nn.PReLU(4)
            self.register_buffer("table", torch.zeros(10, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.prelu(self.conv(x))
            return y

    size = Compressor(Scaled(), X, 0.01, bits=4).size()
    assert size.stored_bits == 12 * 4 + 4 * 40 + 4 * 32 + 4 * 32 + 10 * 64


def test_resnet9_is_the_papers() -> None:
    model = ResNet9()
    assert sum(p.numel() for p in model.parameters()) == 6_573_120
    compressor = Compressor(model, torch.randn(1, 3, 32, 32), 0.01, bits=4)
    size = compressor.size()
    assert size.parameters == 6_573_120
    assert round(size.macs / 1e5) == 3793
    assert size.weights == 6_563_520 + 5_120
    assert size.float_bits == 32 * 6_568_640
    assert size.q_percent == 12.5


def test_macs_and_parameters_fall_with_a_cut() -> None:
    model, compressor = chain()
    start = compressor.size()
    assert start.macs == 64 * (162 + 378) + 35
    set_bits(model, "a.0", [0, 0, 0, 4, 4, 4])
    with torch.no_grad():
        model.get_parameter("a.1.bias")[:3] = -1
    compressor.cut()
    size = compressor.size()
    assert size.macs == 64 * (81 + 3 * 63) + 35
    assert size.parameters == start.parameters - 3 * (27 + 1 + 2 + 63)


def test_macs_of_a_linear_layer_over_a_sequence_count_every_step() -> None:
    compressor = Compressor(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 5, 8), 0.01)
    assert compressor.size().macs == 5 * 8 * 4


def test_the_table_names_every_layer() -> None:
    compressor = Compressor(Flat(), X, 0.01)
    text = str(compressor.size())
    for name in ("a.0", "a.1", "hidden", "out", "in all"):
        assert name in text
    assert f"{compressor.size().stored_bits:,}" in text


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Embedding(50, 16), (torch.randint(50, (4, 6)),)),
        (nn.EmbeddingBag(50, 16), (torch.randint(50, (4, 6)),)),
        (nn.LSTM(12, 16), (torch.randn(6, 4, 12),)),
        (nn.LSTM(12, 16, proj_size=5, bidirectional=True), (torch.randn(6, 4, 12),)),
        (nn.GRUCell(12, 16), (torch.randn(4, 12),)),
        (nn.MultiheadAttention(16, 2), (torch.randn(6, 4, 16),) * 3),
        (nn.Bilinear(12, 8, 5), (torch.randn(4, 12), torch.randn(4, 8))),
    ],
)
def test_channels_of_other_modules_in_float_are_those_of_their_output(
    module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    out = module(*inputs)
    width = (out[0] if isinstance(out, tuple) else out).shape[-1]
    model = nn.Sequential(module)
    layer = by_name(measure(model, None, 1))["0"]
    assert (layer.channels, layer.out_width) == (width, width)
    assert make_report(model, ChannelGraph(), {"0": "excluded"}).layers[0].channels == width


class Tied(nn.Module):
    """A model with a tied head, a recurrent layer, and a linear layer whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, 16), spectral_norm(nn.Linear(16, 12))
        self.step, self.body = nn.GRU(12, 8, bidirectional=True), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.step(self.mix(self.embed(x)))[0]))
        return y


def test_shared_and_computed_weights_count_once() -> None:
    recurrent = 2 * 3 * 8 * (12 + 8)
    model = Tied()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    compressor = Compressor(model, torch.randint(50, (4, 6)), 0.0, bits=8)
    gates = {
        f"step.weight_{kind}_l0{way}": 3 * 8 * reads
        for way in ("", "_reverse")
        for kind, reads in (("ih", 12), ("hh", 8))
    }
    counts = {"embed": 800, "mix": 192, **gates, "body": 256, "head": 0}
    assert sum(gates.values()) == recurrent
    assert compressor.starting_weights == sum(counts.values())
    size = compressor.size()
    layers = by_name(size)
    assert {name: layers[name].weights for name in counts} == counts
    assert size.q_bits == 8 * (800 + 256 + recurrent) + 32 * 192
    assert layers["head"].stored_bits == 0
    assert layers["head"].macs == 6 * 800
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    entries = {entry.name: entry for entry in compressor.report().layers}
    assert {n: e.weights for n, e in entries.items()} == counts
    assert {n: e.channels for n, e in entries.items()} == {
        "embed": 16, "mix": 12, **dict.fromkeys(gates, 24), "body": 16, "head": 50,
    }  # fmt: skip
    assert [n for n, e in entries.items() if e.quantized] == ["embed", *gates, "body", "head"]
    assert entries["head"].why == "it shares its weight with embed"
    assert "7 of 8 layers are quantised, with 91 % of the weights" in str(compressor)


class Unknown(nn.Module):
    """A user's layer with a matrix, and a (1, 6) parameter that counts as a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 6))
        self.scale, self.shift = nn.Parameter(torch.ones(1, 6)), nn.Parameter(torch.zeros(6))
        self.embed_dim = [8, 6]  # not the number that it is in torch's attention

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix * self.scale + self.shift


def test_weights_of_unknown_layers_count_in_float() -> None:
    model = nn.Sequential(nn.Linear(4, 8), Unknown(), nn.Linear(6, 2))
    compressor = Compressor(model, torch.randn(3, 4), 0.0, bits=8)
    assert compressor.starting_weights == 32 + 48 + 12
    size = compressor.size()
    assert size.q_bits == 8 * (32 + 12) + 32 * 48
    assert by_name(size)["1"].weights == 48
    assert [entry.channels for entry in compressor.report().layers] == [8, 0, 2]
    why = "its parameters (matrix, scale, shift) are of no known layer"
    assert compressor.left_in_float == {"1": why}
    assert "2 of 3 layers are quantised, with 48 % of the weights" in str(compressor)


@pytest.mark.parametrize("name", ["resnet9", "mobilenetv2"])
@pytest.mark.parametrize("cut", [False, True])
def test_stored_bits_are_those_of_the_file(name: str, cut: bool) -> None:
    """Stored bits are those of a file except for names and shapes.

    A file has 4 bits fewer for each bit depth, and fills up the last byte of every stream.
    """
    torch.manual_seed(0)
    model = build(name, 10, 8, 32)
    compressor = Compressor(model, torch.randn(2, 3, 32, 32), 0.0, multiple=8)
    with torch.no_grad():
        for layer in compressor.layers.values():
            layer.bit_depth[torch.rand(len(layer.bit_depth)) < 0.4] = 0
    if cut:
        compressor.cut()
        with torch.no_grad():  # rows that are not cut yet
            compressor.layers["linear"].bit_depth[:3] = 0
    storages: list[dict[str, bool]] = [{}, {"fold_norms": True, "half": True}]
    for storage in storages:
        file = pack(model, About(), entropy_coding=False, **storage)
        streams = safetensors.torch.load(file)
        del streams["header"]
        bits = sum(8 * stream.numel() * stream.element_size() for stream in streams.values())
        rows = sum(int(layer.live_rows().sum()) for layer in compressor.layers.values())
        assert (
            0
            <= bits - (compressor.size(**storage).stored_bits - 4 * rows)
            < 8 * (len(compressor.layers) + 3)
        )


class Untraceable(nn.Module):
    """A model of which torch.fx can trace only `body`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3))
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if x.mean() < 1e9 else x
        x = self.body(self.body(x))
        y: Tensor = self.up(x)
        return y


@pytest.mark.parametrize("exclude", [(), ("first", "up")])
def test_macs_count_what_runs_traced_or_not(exclude: tuple[str, ...]) -> None:
    model, x = Untraceable(), torch.randn(4, 3, 16, 16)
    with FlopCounterMode(display=False) as flops:
        model(x)
    with pytest.warns(UserWarning, match="cannot trace"):
        compressor = Compressor(model, x, 0.0, bits=4, exclude=exclude)
    assert 2 * 4 * compressor.size().macs == flops.get_total_flops()


@pytest.mark.parametrize("exclude", [(), ("0.self_attn",)])
def test_macs_of_a_transformer_are_those_of_its_weights(exclude: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5))
    compressor = Compressor(model, torch.randn(4, 6, 8), 0.0, exclude=exclude)
    assert compressor.size().macs == 6 * (4 * 8 * 8 + 2 * 8 * 16 + 8 * 5)


def test_macs_of_attention_between_two_sequences() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = (
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.Linear(8, 5),
            )

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            y: Tensor = self.head(self.attention(key=other, value=other, query=x)[0])
            return y

    compressor = Compressor(Cross(), (torch.randn(4, 6, 8), torch.randn(4, 3, 8)), 0.0)
    assert compressor.size().macs == 64 * (6 + 3 + 3) + 64 * 6 + 6 * 40


def test_macs_are_of_one_sample_of_a_dict_too() -> None:
    class OfDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 10)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            y: Tensor = self.layer(batch["x"])
            return y

    compressor = Compressor(OfDict(), ({"x": torch.randn(4, 8)},), 0.0)
    assert compressor.size().macs == 80
