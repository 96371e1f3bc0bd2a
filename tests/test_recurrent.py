"""Recurrent layers: their weights are quantised, and cutting their rows changes no output."""

# mypy: disable-error-code="no-untyped-call"

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import check_exact, computed, reported, started, trained_on_words
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import selfcompress
from selfcompress import Compressor
from selfcompress.dense import to_dense
from selfcompress.layers.recurrent import QuantLSTM

TOKENS = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([6, 5, 3, 1])


class Reader(nn.Module):
    """An embedding, a recurrent layer, and linear layers that read its last step."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(50, 5), kind(5, 6, batch_first=True, **options)
        with torch.no_grad():
            width = self.rnn(torch.zeros(1, 1, 5))[0].shape[-1]
        self.a, self.b = nn.Linear(width, 7), nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(self.rnn(self.words(tokens))[0][:, -1])))
        return y


class Packed(Reader):
    """A reader of packed sentences of several lengths."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = pack_padded_sequence(self.words(tokens), LENGTHS, batch_first=True)
        out, lengths = pad_packed_sequence(self.rnn(x)[0], batch_first=True)
        y: Tensor = self.b(torch.relu(self.a(out[torch.arange(4), lengths - 1])))
        return y


class Stepping(nn.Module):
    """A network that calls a recurrent cell for every step."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.words, self.cell, self.head = nn.Embedding(50, 5), kind(5, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        state = None
        for step in range(6):
            state = self.cell(self.words(tokens[:, step]), state)
        y: Tensor = self.head(state[0] if isinstance(state, tuple) else state)
        return y


class Named(nn.LSTM):
    """A user's own class, which doubles what torch's forward() returns."""

    def forward(self, x: Tensor, state: Any = None) -> Any:  # type: ignore[override]
        out, state = super().forward(x, state)
        return 2 * out, state


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Reader(nn.LSTM),
    "deep": lambda: Reader(nn.LSTM, num_layers=2, bidirectional=True),
    "projected": lambda: Reader(nn.LSTM, proj_size=4),
    "gru": lambda: Reader(nn.GRU, num_layers=2),
    "plain, without biases": lambda: Reader(nn.RNN, bias=False),
    "own": lambda: Reader(Named),
    "packed": lambda: Packed(nn.GRU),
    "lstm cell": lambda: Stepping(nn.LSTMCell),
    "gru cell": lambda: Stepping(nn.GRUCell),
    "plain cell": lambda: Stepping(nn.RNNCell),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_its_rows_go_and_it_computes_the_same(name: str, tmp_path: Path) -> None:
    """Outputs stay the same after a cut, to_dense(), save() and load(), and load_state_dict()."""
    build = NETWORKS[name]
    plain = build().double()
    model = copy.deepcopy(plain)
    compressor = started(model, TOKENS)
    assert not compressor.left_in_float
    layers = {n.rpartition(".")[2]: layer for n, layer in compressor.layers.items()}
    matrices = [n for n, p in plain.named_parameters() if ".weight_" in n and p.dim() == 2]
    assert {n.rpartition(".")[2] for n in matrices} <= layers.keys()
    rows = len(layers[matrices[0].rpartition(".")[2]].rows)
    check_exact(compressor, TOKENS)
    assert len(layers[matrices[0].rpartition(".")[2]].rows) < rows

    want = computed(model, TOKENS, training=False)
    dense = to_dense(model)
    kinds = [type(module) for module in dense.modules()]
    assert kinds == [type(module) for module in plain.modules()]
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in plain.named_parameters()]
    torch.testing.assert_close(computed(dense, TOKENS, training=False), want)
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", build().double())
    torch.testing.assert_close(computed(loaded, TOKENS, training=False), want, rtol=0, atol=0)
    again = Compressor(build().double(), TOKENS, 0.01, bits=8)
    again.load_state_dict(compressor.state_dict())
    torch.testing.assert_close(computed(again.model, TOKENS, False), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_with_all_bits_it_learns_as_torchs_does(name: str) -> None:
    """At 16 bits, outputs and the gradients of weights that do not saturate are as torch's."""
    plain = NETWORKS[name]().double()
    model = copy.deepcopy(plain)
    compressor = Compressor(model, TOKENS, 0.0, bits=16)
    outputs = [net(TOKENS) for net in (plain, model)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)
    for out in outputs:
        out.square().sum().backward()
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    for layer_name, layer in compressor.layers.items():
        want = gradients.get(layer_name, gradients.get(f"{layer_name}.weight"))
        assert want is not None and layer.weight.grad is not None
        inside = layer.weight.grad != 0  # saturated weights have no gradient
        assert inside.sum() >= 0.8 * (want != 0).sum()
        got = layer.weight.grad[inside]
        torch.testing.assert_close(
            got, want[inside], rtol=0.02, atol=1e-3 * float(want.abs().max())
        )


def test_its_macs_and_weights_are_counted() -> None:
    compressor = started(Reader(nn.LSTM), TOKENS)
    layers = {layer.name: layer for layer in compressor.size().layers}
    assert layers["rnn.weight_ih_l0"].macs == 6 * 24 * 5
    assert layers["rnn.weight_hh_l0"].macs == 6 * 24 * 6
    with torch.no_grad():  # it computes at its full width all the same
        compressor.layers["rnn.weight_hh_l0"].bit_depth[:2] = 0
    assert {n.name: n.macs for n in compressor.size().layers}["rnn.weight_hh_l0"] == 6 * 24 * 6
    compressor = started(Reader(nn.LSTM), TOKENS)
    assert compressor.size().q_percent == 25
    assert "a part of rnn" in reported(compressor)["rnn.weight_hh_l0"].why
    excluded = started(Reader(nn.LSTM), TOKENS, exclude=["rnn"])
    assert excluded.left_in_float == {"rnn": "it is excluded"}
    assert {n.name: n.macs for n in excluded.size().layers}["rnn"] == 6 * 24 * (5 + 6)


def test_files_with_it_in_float_load(tmp_path: Path) -> None:
    """Earlier versions wrote files with recurrent layers in float, which must still load."""
    compressor = started(Reader(nn.GRU), TOKENS, exclude=["rnn"])
    want = computed(compressor.model, TOKENS, training=False)
    selfcompress.save(compressor.model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", Reader(nn.GRU).double())
    assert type(loaded.get_submodule("rnn")) is nn.GRU
    torch.testing.assert_close(computed(loaded, TOKENS, training=False), want, rtol=0, atol=0)


class Dropped(nn.LSTM):
    """Computes a weight before every call, as AWD-LSTMs drop connections."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.raw = self._parameters.pop("weight_hh_l0")

    def forward(self, x: Tensor, state: Any = None) -> Any:  # type: ignore[override]
        assert self.raw is not None
        dropped = F.dropout(self.raw, 0.0, self.training)
        vars(self)["weight_hh_l0"] = dropped
        self._flat_weights[1] = dropped
        return super().forward(x, state)


def test_one_whose_weight_is_computed_stays_in_float() -> None:
    compressor = started(Reader(Dropped), TOKENS)
    assert compressor.left_in_float == {"rnn": "its weight is computed from other parameters"}
    check_exact(compressor, TOKENS)


class Gated(nn.GRU):
    """Has layers of its own beside its matrices."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor, state: Any = None) -> Any:  # type: ignore[override]
        out, state = super().forward(x, state)
        return self.norm(out * torch.sigmoid(self.gate(out))), state


def test_layers_inside_of_it_are_layers(tmp_path: Path) -> None:
    """Layers that a user's recurrent class contains are quantised and cut like others."""
    model = Reader(Gated)
    fresh = copy.deepcopy(model).double()
    kinds = [type(module) for module in model.modules()]
    compressor = started(model, TOKENS)
    assert "rnn.gate" in compressor.layers and not compressor.left_in_float
    check_exact(compressor, TOKENS)
    dense = to_dense(model)
    assert [type(module) for module in dense.modules()] == kinds
    assert dense.state_dict().keys() == fresh.state_dict().keys()
    want = computed(model, TOKENS, training=False)
    torch.testing.assert_close(computed(dense, TOKENS, training=False), want)
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", copy.deepcopy(fresh))
    torch.testing.assert_close(computed(loaded, TOKENS, training=False), want, rtol=0, atol=0)


class MakesState(Stepping):
    """Makes its first state with the device and dtype of its cell's weight."""

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.cell.weight_hh
        state = torch.zeros(len(tokens), 6, device=weight.device, dtype=weight.dtype)
        for step in range(6):
            state = self.cell(self.words(tokens[:, step]), state)
        y: Tensor = self.head(state)
        return y


def test_one_that_is_asked_for_its_weights_stays_in_float() -> None:
    compressor = started(MakesState(nn.GRUCell), TOKENS)
    assert compressor.left_in_float == {"cell": "its weight is read past its own forward()"}
    check_exact(compressor, TOKENS)


def test_to_reset_it_leaves_the_formats() -> None:
    """reset_parameters() draws the weights anew and leaves the bit depths."""
    model = Reader(nn.LSTM)
    compressor = Compressor(model, TOKENS, 0.0, bits=8)
    before = compressor.layers["rnn.weight_hh_l0"].weight.clone()
    model.rnn.reset_parameters()
    layer = compressor.layers["rnn.weight_hh_l0"]
    assert (layer.bit_depth == 7.5).all()
    assert not torch.equal(layer.weight, before) and layer.weight.abs().max() <= 6**-0.5


def test_a_training_with_it_shrinks() -> None:
    compressor, accuracy = trained_on_words(lambda: Reader(nn.GRU), 0.1)
    assert compressor.size().stored_percent < 25
    assert len(compressor.layers["rnn.weight_hh_l0"].rows) < 18
    assert accuracy > 0.9


def test_it_is_copied_and_compiled() -> None:
    model = Reader(nn.LSTM)
    Compressor(model, TOKENS, 0.0, bits=8)
    copied = copy.deepcopy(model)
    assert isinstance(copied.rnn, QuantLSTM)
    torch.testing.assert_close(copied(TOKENS), model(TOKENS), rtol=0, atol=0)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
