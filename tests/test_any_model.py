"""Any model: what cannot be followed is never cut wrongly, and the report says why it stays."""

# mypy: disable-error-code="no-untyped-call"

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import check_exact, computed, images, reported, started
from networks import (
    Chain,
    NormAct,
    NormRelu,
    OwnNorms,
    Residual,
    block,
    kill,
)
from torch import Tensor, nn
from torch.optim import SGD

import selfcompress
from selfcompress import Compressor
from selfcompress.convert import quantize_layers
from selfcompress.dense import to_dense
from selfcompress.layers.attention import QuantAttention
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers

TOKENS = torch.randint(10, (4, 6), generator=torch.Generator().manual_seed(0))
SEQUENCE = images(4, 6, 8)

# --- attention ------------------------------------------------------------------------------------

ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
    "bias of keys": {"add_bias_kv": True, "batch_first": True},
    "bias of keys, zeros": {"add_bias_kv": True, "add_zero_attn": True},
}

CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "all weights": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * 3 + [True] * 2] * 4)},
    "bool mask": {"attn_mask": torch.ones(6, 5).triu(1).bool()},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 30).view(6, 5).double()},
    "both masks": {
        "attn_mask": torch.ones(6, 5).triu(3).bool(),
        "key_padding_mask": torch.tensor([[False] * 4 + [True]] * 4),
        "need_weights": False,
    },
}


def attention(options: dict[str, Any]) -> tuple[nn.MultiheadAttention, QuantAttention]:
    """Return a float attention and its quantised twin at 16 bits, which share no parameters."""
    torch.manual_seed(0)
    both = nn.ModuleList([nn.MultiheadAttention(8, 2, **options)]).double()
    for parameter in both.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    twin = copy.deepcopy(both)
    quantize_layers(twin, bits=16)
    one, other = both[0], twin[0]
    assert isinstance(one, nn.MultiheadAttention)
    assert isinstance(other, QuantAttention)
    return one, other


def given(options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query of 6 tokens, and keys and values of 5, in a batch of 4."""
    shapes = ((4, 6, 8), (4, 5, 8), (4, 5, 8))
    tensors = [images(*shape) + i for i, shape in enumerate(shapes)]
    q, k, v = (t if options.get("batch_first") else t.transpose(0, 1) for t in tensors)
    return q, k, v


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_at_16_bits_computes_what_torch_computes(kind: str, call: str) -> None:
    one, other = attention(ATTENTIONS[kind])
    inputs = given(ATTENTIONS[kind])
    with warnings.catch_warnings(record=True) as wanted_warnings:
        warnings.simplefilter("always")
        want, want_weights = one(*inputs, **CALLS[call])
    with warnings.catch_warnings(record=True) as got_warnings:
        warnings.simplefilter("always")
        got, got_weights = other(*inputs, **CALLS[call])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    assert (got_weights is None) == (want_weights is None)
    if want_weights is not None:
        torch.testing.assert_close(got_weights, want_weights, rtol=0, atol=2e-3)
    assert [str(w.message) for w in got_warnings] == [str(w.message) for w in wanted_warnings]
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(*inputs, **CALLS[call])[0], got)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_one_sequence_without_a_batch(causal: bool) -> None:
    one, other = attention({"batch_first": True})
    x = images(6, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=x.dtype) if causal else None
    want = one(x, x, x, attn_mask=mask, is_causal=causal, need_weights=False)[0]
    got = other(x, x, x, attn_mask=mask, is_causal=causal, need_weights=False)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_rows_of_attention_die_and_are_cut_and_come_back_in_float(kind: str) -> None:
    """Dead rows of attention are cut exactly, and `to_dense` returns torch's own attention."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, **ATTENTIONS[kind])
            self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.norm(x + self.attention(x, x, x)[0]))
            return y

    compressor = started(Model(), SEQUENCE)
    assert set(compressor.layers) == {"attention.in_proj", "attention.out_proj", "out"}
    before = {n: len(m.rows) for n, m in compressor.layers.items()}
    check_exact(compressor, SEQUENCE)
    for name, layer in compressor.layers.items():
        assert 0 < len(layer.rows) < before[name], name
        assert layer.weight.shape[0] == len(layer.rows)
    compressor.size()
    want = computed(compressor.model, SEQUENCE, False)
    dense = to_dense(compressor.model)
    assert type(dense.get_submodule("attention")) is nn.MultiheadAttention
    assert not quantized_layers(dense)
    torch.testing.assert_close(computed(dense, SEQUENCE, False), want)


def test_attention_learns_and_is_cut_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(encoder, nn.Linear(8, 5))
    x = SEQUENCE.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressor = Compressor(model, x, 1.0, interval=10, bit_step=0.2, bits=4)
    optimizer = SGD(compressor.weights(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        (model(x).square().mean() + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)
    assert compressor.cuts
    assert all(len(m.rows) >= 1 for name, m in compressor.layers.items() if "attn" in name)
    assert any(len(m.rows) < m.out_width for m in compressor.layers.values())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_torchs_transformers_take_no_fast_path_past_the_quantisers(
    kind: str, batch_first: bool
) -> None:
    """In eval mode without gradients, torch's transformer layers must not take their fast path.

    It would compute with the weights that are not quantised.
    """
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    model = layer if kind == "layer" else nn.TransformerEncoder(layer, 2)
    whole = nn.Sequential(model, nn.Linear(8, 5))
    compressor = started(whole, SEQUENCE, bits=2)
    whole.eval()
    with_gradients = whole(SEQUENCE)
    with torch.no_grad():
        without = whole(SEQUENCE)
    with torch.inference_mode():
        inference = whole(SEQUENCE)
    torch.testing.assert_close(without, with_gradients, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inference.clone(), with_gradients.detach(), rtol=1e-12, atol=1e-12)
    padding = torch.tensor([[False] * 4 + [True] * 2] * (4 if batch_first else 6))[:, :6]
    padding = padding if batch_first else padding[:, :4]
    one = model(SEQUENCE, src_key_padding_mask=padding)
    with torch.no_grad():
        two = model(SEQUENCE, src_key_padding_mask=padding)
    torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
    check_exact(compressor, SEQUENCE)
    for name, entry in reported(compressor).items():
        assert entry.quantized, name


@pytest.mark.parametrize("norm_first", [False, True])
def test_hidden_channels_of_torchs_transformers_can_go(norm_first: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own warning about norm_first
        body = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first), 2
        )
    compressor = started(nn.Sequential(body, nn.Linear(8, 5)), SEQUENCE, bits=2)
    assert torch.backends.mha.get_fastpath_enabled()
    assert {n: e.removable for n, e in reported(compressor).items() if "linear1" in n} == {
        "0.layers.0.linear1": 16, "0.layers.1.linear1": 16,
    }  # fmt: skip
    with torch.no_grad():
        layer = compressor.layers["0.layers.0.linear1"]
        layer.bit_depth[:6] = 0
        assert layer.bias is not None
        layer.bias[:6] = 0
    check_exact(compressor, SEQUENCE)
    assert compressor.layers["0.layers.0.linear2"].in_width == layer.out_width <= 10
    with torch.no_grad():  # in the dense copy, ordinary layers take torch's fast path again
        dense = to_dense(compressor.model).eval()(SEQUENCE)
        torch.testing.assert_close(dense, compressor.model.eval()(SEQUENCE))


def test_attention_of_other_keys_stays_in_float() -> None:
    """Attention whose keys and values have another width than its queries is not quantised."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
            self.narrow, self.out = nn.Linear(8, 4), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            keys = self.narrow(x)
            y: Tensor = self.out(self.attention(x, keys, keys)[0])
            return y

    compressor = started(Model(), SEQUENCE)
    entry = reported(compressor)["attention"]
    assert not entry.quantized
    assert "another width" in entry.why
    check_exact(compressor, SEQUENCE)


def test_a_part_of_attention_cannot_be_excluded_unnoticed() -> None:
    """Excluding attention's out_proj leaves it in float or is refused; it is never ignored."""
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)
    ).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compressor = Compressor(model, SEQUENCE, 0.1, exclude=["0.self_attn.out_proj"], bits=4)
        except ValueError as error:
            assert "out_proj" in str(error)  # noqa: PT017
        else:
            assert "0.self_attn.out_proj" not in compressor.layers


# --- models that torch.fx cannot trace ------------------------------------------------------------


class Wayward(nn.Module):
    """Runs a module with control flow that depends on the data, so that it is untraceable."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x if x.sum() < 1e9 else -x)
        return y


class WaywardSequence(nn.Sequential):
    """An untraceable sequence, whose forward() calls the layers one after the other."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for module in self:
            x = module(x) if float(x.sum()) < 1e9 else x
        return x


def nested() -> nn.Module:
    deep = nn.Sequential(block(3, 6), Wayward(nn.Sequential(block(6, 7), block(7, 6))))
    return nn.Sequential(deep, block(6, 5), nn.Flatten(), nn.Linear(320, 5))


class Mixed(nn.Module):
    """An untraceable model that calls a sequence of blocks, and then one of these blocks again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 6), block(6, 6), block(6, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() < 1e9:
            x = self.stem[1](x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Borrower(nn.Module):
    """An untraceable module that calls a layer which its parent calls too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.layer(x)


class Lender(nn.Module):
    """A traceable model with an untraceable part, which calls one of the model's layers again.

    Args:
        first: whether that part is registered before the layer, so that the layer's name is the
            one that it has in the part.
    """

    def __init__(self, first: bool) -> None:
        super().__init__()
        layer = nn.Linear(6, 6, bias=False)
        self.a = nn.Linear(8, 6, bias=False)
        if first:
            self.borrower = Borrower(layer)
        self.layer = layer
        if not first:
            self.borrower = Borrower(layer)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer(F.relu(self.a(x))))
        y: Tensor = self.out(F.relu(self.borrower(x)))
        return y


class Optional(nn.Module):
    """Takes another path when an argument is given that the training loop never gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pre = nn.Linear(8, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor, done: Any = None) -> Tensor:
        x = torch.relu(self.stem(x))
        if done is None:
            x = torch.relu(self.pre(x))
        y: Tensor = self.head(x)
        return y


class InPart(nn.Module):
    """An untraceable model around one with an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.more = Optional(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.more(self.part(x if x.sum() < 1e9 else -x))
        return y


class TwoWays(nn.Module):
    """An untraceable model that calls its part twice, once with the optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.more = Optional(), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x if x.sum() < 1e9 else -x)
        y = self.part(torch.relu(self.more(y)), True)
        return y


class OnlyInTraining(nn.Module):
    """A model with a branch that runs only in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.train_only, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.training:
            x = x + torch.relu(self.train_only(x))
        y: Tensor = self.head(x)
        return y


FLAT = images(4, 8)
UNTRACEABLE: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "the model": (lambda: Wayward(Chain(bias=True)), images()),
    "the model's own layers": (
        lambda: WaywardSequence(block(3, 6), block(6, 5), nn.Flatten(), nn.Linear(320, 5)),
        images(),
    ),
    "a submodule": (
        lambda: nn.Sequential(block(3, 6), Wayward(block(6, 7)), block(7, 5), nn.Flatten()),
        images(),
    ),
    "a sub-submodule": (nested, images()),
    "wayward in wayward": (
        lambda: Wayward(nn.Sequential(block(3, 6), Wayward(Residual(False).one), block(5, 4))),
        images(),
    ),
    "a layer of a part called directly": (Mixed, images()),
    "a layer lent": (lambda: Lender(first=False), FLAT),
    "a layer lent, named there": (lambda: Lender(first=True), FLAT),
    "an optional argument": (Optional, FLAT),
    "an optional argument in a part": (InPart, FLAT),
    "a part called with another flag": (TwoWays, FLAT),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_models_that_cannot_be_traced_are_cut_exactly(name: str) -> None:
    build, x = UNTRACEABLE[name]
    torch.manual_seed(0)
    check_exact(started(build(), x), x)


def test_a_branch_for_training_alone_is_cut_exactly() -> None:
    check_exact(started(OnlyInTraining(), FLAT), FLAT)


def test_insides_are_followed_on_their_own() -> None:
    """In an untraceable model, channels inside of modules that can be traced can be removed."""
    compressor = started(Wayward(Chain(bias=True)), images())
    assert reported(compressor)["inner.a.0"].removable == 6
    compressor = started(nested(), images())
    assert reported(compressor)["0.1.inner.0.0"].removable == 7
    compressor = started(UNTRACEABLE["wayward in wayward"][0](), images())
    assert all(e.why or e.removable for e in compressor.report().layers)


def test_the_model_that_cannot_be_traced_is_named_with_the_reason() -> None:
    with pytest.warns(UserWarning, match=r"cannot trace WaywardSequence \(.+\): channels are only"):
        compressor = Compressor(
            WaywardSequence(block(3, 4), nn.Flatten()), images().float(), 0.1, bits=4
        )
    (entry,) = compressor.report().layers
    assert entry.removable == 0 or not entry.why


def test_an_optional_argument_does_not_hinder() -> None:
    """Arguments that are never passed are traced with their default values."""

    class Flagged(Chain):
        def forward(self, x: Tensor, features: bool = False, mask: Any = None) -> Tensor:
            x = self.b(self.a(x))
            if mask is not None:
                x = x * mask
            if features:
                return x
            y: Tensor = self.head(x)
            return y

    compressor = started(Flagged(), images())
    assert reported(compressor)["a.0"].removable == 6
    assert reported(compressor)["b.0"].removable == 7
    check_exact(compressor, images())


# --- weights read past forward, shared, called twice ----------------------------------------------


class ReadsWeight(nn.Module):
    """Uses the weight of `fc` outside of that layer's forward(), in the way of `read`."""

    def __init__(self, read: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.fc, self.last = nn.Linear(8, 6), nn.Linear(6, 7), nn.Linear(7, 5)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y: Tensor = self.last(torch.relu(self.read(self.fc, x)))
        return y


READS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "F.linear": lambda fc, x: F.linear(x, fc.weight, fc.bias),
    "t": lambda fc, x: x @ fc.weight.t(),
    "T": lambda fc, x: x @ fc.weight.T,
    "mT": lambda fc, x: x @ fc.weight.mT,
    "data": lambda fc, x: F.linear(x, fc.weight.data),
    "detach": lambda fc, x: F.linear(x, fc.weight.detach()),
    "einsum": lambda fc, x: torch.einsum("bi,oi->bo", x, fc.weight),
    "row": lambda fc, x: fc(x) * fc.weight[:, 0],
    "norm": lambda fc, x: fc(x) / fc.weight.norm(),
    "parameters": lambda fc, x: fc(x) + sum(p.mean() for p in fc.parameters()),
}


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("how", READS)
def test_a_weight_read_past_forward_leaves_its_layer_in_float(how: str, traced: bool) -> None:
    """A layer whose weight is read outside of the layer's own forward() is not quantised."""
    model = ReadsWeight(READS[how])
    compressor = started(model if traced else Wayward(model), FLAT)
    entry = reported(compressor)["fc" if traced else "inner.fc"]
    assert not entry.quantized
    assert "read past its own forward" in entry.why
    assert entry.why in str(compressor)
    check_exact(compressor, FLAT)


def test_shape_of_a_weight_may_be_read() -> None:
    """A layer is quantised although the device and dtype of its weight are read elsewhere."""

    def read(fc: nn.Linear, x: Tensor) -> Tensor:
        y: Tensor = fc(x.to(fc.weight.device, fc.weight.dtype)) / 7
        return y

    compressor = started(ReadsWeight(read), FLAT)
    assert reported(compressor)["fc"].quantized
    check_exact(compressor, FLAT, shrinks=False)


class Tied(nn.Module):
    """A language model whose output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(10, 8), nn.Linear(8, 12)
        self.back, self.out = nn.Linear(12, 8), nn.Linear(8, 10, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y: Tensor = self.out(x + self.back(torch.relu(self.hidden(x))))
        return y


class TiedLayers(nn.Module):
    """Two linear layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return y


def test_tied_weights_stay_tied() -> None:
    compressor = started(Tied(), TOKENS, exclude="embedding")
    entries = reported(compressor)
    assert not entries["out"].quantized
    assert "shares a parameter" in entries["out"].why
    assert entries["hidden"].removable == 12
    check_exact(compressor, TOKENS)
    model = compressor.model
    assert model.get_parameter("out.weight") is model.get_parameter("embedding.weight")
    compressor = started(TiedLayers(), FLAT)
    assert {n for n, e in reported(compressor).items() if e.quantized} == {"c"}
    check_exact(compressor, FLAT)
    assert compressor.model.get_parameter("a.weight") is compressor.model.get_parameter("b.weight")


class CalledTwice(nn.Module):
    """Runs one block twice in a row, under one name or two."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.stem, self.mid, self.head = block(3, 6), block(6, 6, bias=True), nn.Linear(6, 5)
        self.again = self.mid if names == 2 else nn.Identity()
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x))
        x = self.again(x) if self.names == 2 else self.mid(x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.mark.parametrize("names", [1, 2])
def test_a_layer_called_twice_is_cut_exactly(names: int) -> None:
    torch.manual_seed(0)
    compressor = started(CalledTwice(names), images())
    check_exact(compressor, images())


# --- several inputs and outputs -------------------------------------------------------------------


class ManyOutputs(Chain):
    """A chain with two outputs, which `pack` puts in a tuple, a dict or nested containers."""

    def __init__(self, pack: Callable[..., Any]) -> None:
        super().__init__(bias=True)
        self.pack, self.side = pack, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        b = self.b(a)
        return self.pack(self.head(b), self.side(a.mean((2, 3))))


@pytest.mark.parametrize(
    "pack",
    [
        lambda y, z: (y, z),
        lambda y, z: {"out": y, "side": z},
        lambda y, z: [{"out": y}, (z, None, 3)],
    ],
)
@pytest.mark.parametrize("traced", [True, False])
def test_several_outputs(pack: Callable[..., Any], traced: bool) -> None:
    model: nn.Module = ManyOutputs(pack)
    compressor = started(model if traced else Wayward(model), images())
    prefix = "" if traced else "inner."
    entries = reported(compressor)
    assert entries[f"{prefix}a.0"].removable == 6
    assert entries[f"{prefix}side"].removable == 0
    check_exact(compressor, images())


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(3, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.out(torch.relu(self.a(x) + self.b(y)))
            return z

    inputs = (images(4, 8), images(4, 3))
    check_exact(started(Two(), inputs), inputs)


# --- recurrent networks, embeddings, torchvision --------------------------------------------------


class Recurrent(nn.Module):
    """An embedding, a linear layer, an LSTM or GRU, and two more linear layers."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embedding, self.project = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.rnn = kind(8, 6, batch_first=True, bidirectional=True)
        self.hidden, self.out = nn.Linear(12, 7), nn.Linear(7, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.rnn(torch.relu(self.project(self.embedding(tokens))))
        y: Tensor = self.out(torch.relu(self.hidden(x)))
        return y


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks(kind: Any) -> None:
    compressor = started(Recurrent(kind), TOKENS)
    entries = reported(compressor)
    assert entries["hidden"].removable == 7
    assert entries["project"].removable == 0
    assert "rnn" in entries["project"].why
    check_exact(compressor, TOKENS)


def test_weights_of_embeddings_and_recurrent_layers_count_as_weights() -> None:
    compressor = started(Recurrent(nn.LSTM), TOKENS)
    weights = sum(p.numel() for p in compressor.model.parameters() if p.dim() > 1)
    size = compressor.size()
    assert size.float_bits == 32 * weights
    quantized = sum(layer.weight.numel() for layer in compressor.layers.values())
    assert size.q_bits == 32 * (weights - quantized) + 8 * quantized


@pytest.mark.parametrize(
    "name", ["lraspp_mobilenet_v3_large", pytest.param("fcn_resnet50", marks=pytest.mark.slow)]
)
def test_segmentation_networks(name: str) -> None:
    """All channels can be removed but those of one layer (of two in LR-ASPP); cuts are exact."""
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4)
    x = images(2, 3, 32, 32)
    compressor = started(model, x)
    stuck = [e.name for e in compressor.report().layers if e.removable < e.channels]
    assert len(stuck) == (2 if "lraspp" in name else 1), stuck
    parameters = compressor.size().parameters
    check_exact(compressor, x, modes=(False,))
    assert compressor.size().parameters < 0.6 * parameters


# --- min_channels, exclude, report ----------------------------------------------------------------


@pytest.mark.parametrize("build", [Chain, lambda: Residual(False)])
def test_min_channels_holds_for_every_layer(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    compressor = Compressor(
        build(), images().float(), 30.0, min_channels=3, interval=5, bit_step=0.5, bits=4
    )
    optimizer = SGD(compressor.weights(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        (compressor.model(images().float()).square().mean() + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)
    for name, layer in compressor.layers.items():
        assert len(layer.rows) >= 3, name
    assert sum(len(m.rows) for m in compressor.layers.values()) <= 4 * len(compressor.layers)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [(["a"], {"a.0"}), (["a.0", "head"], {"a.0", "head.linear"}), (["b.0"], {"b.0"})],
)
def test_excluded_layers_are_reported_in_float_and_cut_along(
    exclude: list[str], left: set[str]
) -> None:
    compressor = started(Chain(bias=True), images(), exclude=exclude)
    entries = reported(compressor)
    assert {n for n, e in entries.items() if not e.quantized} == left
    assert all("excluded" in entries[n].why for n in left)
    check_exact(compressor, images())


class TwoNames(nn.Module):
    """A layer that is registered under two names, and called by both.

    Args:
        past_it: whether the second call is one of F.linear with the weight instead.
    """

    def __init__(self, past_it: bool = False) -> None:
        super().__init__()
        self.past_it = past_it
        self.stem, self.first, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        x = F.linear(x, self.first.weight) if self.past_it else self.second(x)
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize(
    ("exclude", "past_it"),
    [([], False), (["first"], False), (["second"], False), ([], True)],
)
def test_a_layer_of_two_names_is_quantised_or_left_by_both(
    exclude: list[str], past_it: bool
) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    compressor = started(TwoNames(past_it), x, exclude=exclude)
    model = compressor.model
    assert model.first is model.second
    assert isinstance(model.first, QuantizedLayer) == (not exclude and not past_it)
    assert set(compressor.left_in_float) == ({"first"} if exclude or past_it else set())
    check_exact(compressor, x)


def test_the_report_reads_well() -> None:
    """As text, the report has a header, one line per layer, and a summary."""
    model = nn.Sequential(
        block(3, 6),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1)),
        Wayward(block(6, 4)),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(256, 5),
    )
    compressor = started(model, images(), exclude=["3"])
    text = str(compressor)
    lines = text.splitlines()
    entries = compressor.report().layers
    assert lines[0].split() == "layer type bits removable why not all".split()
    assert len(lines) == len(entries) + 2
    for entry, line in zip(entries, lines[1:-1], strict=True):
        words = line.split()
        assert words[:3] == [entry.name, entry.kind, "learned" if entry.quantized else "float"]
        assert f"{entry.removable:,} of {entry.channels:,}" in line
        assert line.endswith(entry.why)
        assert line == line.rstrip()
        if entry.removable < entry.channels:
            assert entry.why
    assert {e.name: e.quantized for e in entries} == {
        "0.0": True, "1": False, "2.inner.0": True, "3": False, "5": True,
    }  # fmt: skip
    whys = {e.name: e.why for e in entries}
    assert "computed from other parameters" in whys["1"]
    assert "excluded" in whys["3"]
    assert "output of the model" in whys["5"]
    assert lines[-1].startswith("3 of 5 layers are quantised, with ")
    check_exact(compressor, images())


def test_layers_that_nobody_calls_are_reported() -> None:
    model = Chain()
    model.spare = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="not called on example_input: spare"):
        compressor = started(model, images())
    entry = reported(compressor)["spare"]
    assert entry.removable == 0
    assert "not called" in entry.why


def test_hooks_that_a_user_has_put_on_a_layer_go_on_being_called() -> None:
    model = Chain()
    calls: list[str] = []
    model.a[0].register_forward_hook(lambda *args: calls.append("conv"))
    model.a[1].register_forward_pre_hook(lambda *args: calls.append("norm"))
    started(model, images())
    calls.clear()
    model(images())
    assert calls == ["conv", "norm"]


def test_a_grouped_convolution_with_a_bias_can_lose_single_rows() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 5, 1)
    )
    compressor = started(model, images())
    kill(model, "2", [1])
    model.get_parameter("2.bias").data[1] = -1.0
    before = computed(model, images(), False)
    assert compressor.cut()
    torch.testing.assert_close(computed(model, images(), False), before)
    assert isinstance(model[2], QuantizedLayer)
    assert model[2].out_width == len(model[2].rows) == 5


# --- batch norms of users' own classes ------------------------------------------------------------


class SameNorm(nn.BatchNorm2d):
    """A batch norm class whose forward() only calls torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class BareNorm(SameNorm):
    """A `SameNorm` without weight and bias."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)


class BatchStatistics(SameNorm):
    """A `SameNorm` without running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)


@pytest.mark.parametrize("norm", [NormAct, NormRelu, SameNorm, BareNorm, BatchStatistics])
def test_channels_go_through_batch_norms_of_own_classes(norm: type[nn.BatchNorm2d]) -> None:
    """Channels can be removed through a batch norm of a user's class, which keeps that class."""
    compressor = started(OwnNorms(norm), images())
    check_exact(compressor, images())
    model = compressor.model
    assert isinstance(model, OwnNorms) and type(model.norm) is norm
    layers = reported(compressor)
    assert [name for name, layer in layers.items() if layer.removable < layer.channels] == [
        "head.linear"
    ]
    for name in ("stem", "inner.2"):
        kill(model, name, [0])
        bias = compressor.layers[name].bias
        assert bias is not None
        bias.data.zero_()
    if model.norm.bias is not None:
        model.norm.bias.data.zero_()
    model.last.bias.data.zero_()
    was = compressor.layers["stem"].out_width
    compressor.cut()
    kept = compressor.layers["stem"].out_width
    assert 1 < kept < was and model.norm.num_features == kept
    held = [*model.norm.parameters(), *model.norm.buffers()]
    assert all(len(tensor) == kept for tensor in held if tensor.dim())


@pytest.mark.parametrize("norm", [NormAct, BareNorm])
def test_a_network_of_own_batch_norms_is_saved_made_dense_and_goes_on(
    norm: type[nn.BatchNorm2d], tmp_path: Path
) -> None:
    """With users' batch norms, runs resume bit for bit; files and dense copies compute the same."""

    def begin() -> tuple[Compressor, SGD]:
        torch.manual_seed(0)
        compressor = Compressor(OwnNorms(norm), x, 0.3, bits=4, interval=5)
        return compressor, SGD(compressor.weights(), 0.05, 0.9)

    def train(compressor: Compressor, optimizer: SGD, steps: int) -> None:
        for _ in range(steps):
            loss = F.cross_entropy(compressor.model(x), labels) + compressor.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            compressor.step(optimizer)

    x, labels = images(16, 3, 8, 8).float(), torch.arange(16) % 4
    compressor, optimizer = begin()
    train(compressor, optimizer, 60)
    model = compressor.model
    assert isinstance(model, OwnNorms)
    assert len(model.inner[1].bias) < 8  # type: ignore[arg-type]
    buffer = io.BytesIO()
    torch.save(compressor.state_dict(optimizer), buffer)
    buffer.seek(0)
    again, its_optimizer = begin()
    again.load_state_dict(torch.load(buffer, weights_only=True), its_optimizer)
    train(compressor, optimizer, 20)
    train(again, its_optimizer, 20)
    for a, b in zip(model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)

    compressor.finish([x], optimizer)
    want = model.eval()(x)
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", OwnNorms(norm))
    assert torch.equal(loaded(x), want)
    assert isinstance(loaded, OwnNorms) and isinstance(model.inner[1], NormRelu)
    for made, saved in ((loaded.inner[1], model.inner[1]), (loaded.norm, model.norm)):
        assert made.num_features == saved.num_features == len(saved.get_buffer("running_mean"))
    torch.testing.assert_close(to_dense(model).eval()(x), want, rtol=0, atol=1e-5)


def test_a_dead_channel_leaves_a_bias_in_an_own_batch_norm_that_goes_to_zero() -> None:
    """A user's batch norm that reads a dead channel has a lingering bias, to be driven to 0."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), SameNorm(4), nn.Sigmoid(), nn.Conv2d(4, 4, 1), SameNorm(4),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    compressor = started(model, images())
    kill(model, "3", [1])
    with torch.no_grad():
        model[4].get_parameter("bias")[1] = 0.5
    compressor.lingering.look()
    # Not lingering: biases of rows that a norm reads, and of norms whose channel is live.
    assert {n: p.tolist() for n, p in compressor.lingering.positions.items()} == {"4.bias": [1]}


@pytest.mark.parametrize("held", [False, True])
def test_own_batch_norms_in_eval_mode_keep_what_they_make_of_constants(held: bool) -> None:
    """A norm with a constant input keeps its output in evaluation only if held in eval mode.

    Held means that it is in eval mode while the network trains.
    """
    model = nn.Sequential(nn.Conv2d(3, 4, 1), SameNorm(4), nn.Sigmoid(), nn.Conv2d(4, 2, 1))
    compressor = started(model, images())
    model[1].train(not held)
    (compressor.model(images()).sum() + compressor.penalty()).backward()
    kill(model, "0", [1])
    before = computed(model[:2].eval(), images(), training=False)[0]
    compressor.cut()
    after = computed(model[:2], images(), training=False)[0]
    changed = bool((before[:, 1] - after[:, 1]).abs().max() > 1e-6)
    assert changed != held  # other norms output β after the cut, as they do in training


class Branch(nn.Module):
    """A part of `RunsTwice`, which is traced on its own because the whole model cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 1, bias=False), NormAct(6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.norm(self.a(x)))
        return y


class RunsTwice(nn.Module):
    """An untraceable model that runs its part twice."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = Branch(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.branch(self.branch(x if x.sum() > 0 else -x)))
        return y


class NormsTwice(nn.Module):
    """Calls one batch norm on the outputs of two layers, so that its statistics are of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.head = SameNorm(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.a(x)).relu() + self.norm(self.b(x)).relu())
        return y


class TrainingHead(nn.Module):
    """A model with a second head, with a batch norm, that runs only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.more = nn.Sequential(nn.Conv2d(6, 6, 1), NormAct(6), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y: Tensor = self.head(x) + self.more(x) if self.training else self.head(x)
        return y


@pytest.mark.parametrize(
    ("model", "layers"),
    [(RunsTwice(), ["branch.a"]), (NormsTwice(), ["a", "b"]), (TrainingHead(), ["a", "more.0"])],
)
def test_own_batch_norms_may_run_twice_or_in_training_alone(
    model: nn.Module, layers: list[str]
) -> None:
    compressor = started(model, images())
    assert all(reported(compressor)[layer].removable == 6 for layer in layers)
    check_exact(compressor, images(), shrinks=False)


def test_an_own_batch_norm_of_two_constants_is_followed_no_further() -> None:
    """A batch norm that is called on two different constants has statistics of both and stays."""
    model = NormsTwice()
    compressor = started(model, images())
    for name, constant in (("a", 1.0), ("b", -3.0)):
        kill(model, name, [0])
        getattr(model, name).bias.data[0] = constant
    # In training, ReLU then gives 0 for both constants; in evaluation, for one of them.
    model.norm.bias.data[0] = -0.1
    before = computed(model, images(), training=False)
    compressor.cut()
    torch.testing.assert_close(computed(model, images(), training=False), before)
    assert model.norm.num_features == 6


class CalledPast(nn.Module):
    """A model whose batch norm is also called by a part that cannot be traced."""

    class Part(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if x.sum() > 0 else self.norm(-x)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 1), NormAct(6), nn.Conv2d(6, 6, 1)
        self.part, self.head = self.Part(self.norm), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.part(self.b(self.norm(self.a(x)))))
        return y


class TakenApart(nn.Module):
    """A model that calls F.batch_norm with a weight computed from the norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 6, 1), SameNorm(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        x = F.batch_norm(
            self.a(x), n.running_mean, n.running_var, n.weight.softmax(0), n.bias, self.training
        )
        y: Tensor = self.head(x)
        return y


class Shared(nn.Module):
    """A model with two batch norms that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 1), SameNorm(6), nn.Conv2d(6, 6, 1)
        self.next, self.head = SameNorm(6), nn.Conv2d(6, 2, 1)
        self.next.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.next(self.b(self.norm(self.a(x)))))
        return y


class NeverInTraining(nn.BatchNorm2d):
    """A batch norm class that uses its running statistics in training too."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize(
    ("model", "layer", "why"),
    [
        (CalledPast(), "a", "also called by code that cannot be traced"),
        (TakenApart(), "a", "reads other tensors than those of one batch norm"),
        (Shared(), "a", "has entries that are not indexed by its channels alone"),
        (OwnNorms(NeverInTraining), "stem", "takes no statistics in training"),
    ],
)
def test_channels_stay_at_batch_norms_that_are_used_in_other_ways(
    model: nn.Module, layer: str, why: str
) -> None:
    """Channels are not removed at a batch norm that is used in a way that is not understood."""
    compressor = started(model, images())
    assert why in reported(compressor)[layer].why
    check_exact(compressor, images(), shrinks=False)


class Remembers(nn.Module):
    """An untraceable model whose part keeps its activations in a cache, and reads the first.

    The model makes a new cache at every call.
    """

    class Cache:
        def __init__(self) -> None:
            self.kept: list[Tensor] = []

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, cache: "Remembers.Cache") -> Tensor:
            cache.kept.append(torch.relu(self.a(x)))
            y: Tensor = self.b(cache.kept[0])
            return y

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = self.Part(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError("too much")
        y: Tensor = self.head(self.part(x, self.Cache()))
        return y


def test_a_cache_that_a_part_fills_is_empty_when_it_is_traced() -> None:
    """A part is traced with an empty cache, not with one that a run has filled."""
    compressor = started(Remembers(), SEQUENCE)
    assert compressor.graph.untraceable.keys() == {""}
    check_exact(compressor, SEQUENCE)
