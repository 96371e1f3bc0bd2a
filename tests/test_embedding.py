"""Embeddings: every dimension of their vectors is a row with a bit depth, and may go."""

# mypy: disable-error-code="no-untyped-call"

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import check_exact, computed, reported, started
from networks import kill
from torch import Tensor, nn

import selfcompress
from selfcompress import Compressor, Schedule
from selfcompress.dense import to_dense
from selfcompress.layers import QuantEmbedding, quantized_layers

TOKENS = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))


class Sentences(nn.Module):
    """Words and places, without a norm that would mix dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 12, padding_idx=0), nn.Embedding(8, 12)
        self.a, self.b = nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        y: Tensor = self.b(torch.relu(self.a(x)).mean(1))
        return y


def test_its_dimensions_go_with_all_that_reads_them(tmp_path: Path) -> None:
    compressor = started(Sentences(), TOKENS)
    report = reported(compressor)
    assert [report[name].removable for name in ("words", "places", "a", "b")] == [12, 12, 9, 0]
    assert compressor.size().macs == 6 * 12 * 9 + 9 * 3  # looking up multiplies nothing
    check_exact(compressor, TOKENS)
    model = compressor.model
    words = model.get_submodule("words")
    assert isinstance(words, QuantEmbedding) and words.embedding_dim < 12
    assert words.weight.shape == (50, len(words.rows))

    want = computed(model, TOKENS, training=False)
    dense = to_dense(model)
    assert type(dense.get_submodule("words")) is nn.Embedding
    assert dense.get_submodule("words").padding_idx == 0
    torch.testing.assert_close(computed(dense, TOKENS, training=False), want)
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", Sentences().double())
    torch.testing.assert_close(computed(loaded, TOKENS, training=False), want, rtol=0, atol=0)


@pytest.mark.parametrize("dead", [[], [1, 2, 5], list(range(6))])
def test_few_and_many_indices_read_the_same(dead: list[int]) -> None:
    """Quantised are the vectors that are read, or all of them, whichever are fewer."""
    torch.manual_seed(0)
    layer = QuantEmbedding.from_float(nn.Embedding(5, 6, padding_idx=1).double(), 3, True)
    with torch.no_grad():
        layer.bit_depth[dead] = 0
    many = torch.tensor([[0, 1, 2], [3, 4, 0]])
    results = []
    for indices in (many[:, :2], many):
        out = layer(indices)[:, :2]
        torch.testing.assert_close(out, layer.dense_weight()[many[:, :2]], rtol=0, atol=0)
        factors = torch.arange(24.0, dtype=torch.float64).view(2, 2, 6)
        gradients = torch.autograd.grad((out * factors).sum(), [layer.weight, layer.exponent])
        results.append(gradients)
    for few, all_of_them in zip(*results, strict=True):
        torch.testing.assert_close(few, all_of_them)
    assert not results[0][0][1].any()  # padding learns nothing


@pytest.mark.parametrize("dead", [[0, 3], list(range(12))])
def test_rows_that_are_cut_leave_zeros_where_the_dimension_stays(dead: list[int]) -> None:
    model = nn.Sequential(nn.Embedding(50, 12), nn.LayerNorm(12), nn.Linear(12, 3)).double()
    compressor = Compressor(model, TOKENS, 0.0, bits=8)
    assert reported(compressor)["0"].removable == 0
    kill(model, "0", dead)
    for x in (TOKENS, TOKENS.repeat(3, 1)):
        before = model(x)
        torch.testing.assert_close(compressor.preview()(x), before, rtol=0, atol=1e-12)
    kept = quantized_layers(compressor.preview())["0"]
    assert len(kept.rows) == 12 - len(dead) and kept.out_width == 12


def test_it_counts_samples_by_its_indices() -> None:
    compressor = started(Sentences(), TOKENS)
    compressor.model(TOKENS)
    assert compressor.layers["words"].samples == 4
    single = started(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.arange(5))
    single.model(torch.arange(7))
    assert [layer.samples for layer in single.layers.values()] == [7, 7]


class Offset(nn.Embedding):
    """Reads two places further on, as BART's places are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


class Called(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx)


@pytest.mark.parametrize("kind", [Offset, Called])
def test_a_users_own_embedding_is_followed(kind: Any) -> None:
    model = nn.Sequential(kind(52, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    compressor = started(model, TOKENS)
    assert reported(compressor)["0"].removable == 8
    check_exact(compressor, TOKENS)
    assert type(to_dense(model)[0]) is kind  # type: ignore[index]


class Scaled(nn.Module):
    """As the first transformer had it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 9), nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(tokens) * self.embedding.embedding_dim**0.5)
        return y


def test_a_width_that_is_computed_with_stays() -> None:
    compressor = started(Scaled(), TOKENS)
    assert "embedding.embedding_dim" in reported(compressor)["embedding"].why
    check_exact(compressor, TOKENS)


class Codebook(nn.Module):
    """Indices come from what a layer has made."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes, self.decoder = (
            nn.Linear(5, 7),
            nn.Embedding(7, 6),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(torch.relu(self.codes(self.encoder(x).argmax(1))))
        return y


def test_what_indices_are_made_of_stays() -> None:
    x = torch.randn(8, 5, dtype=torch.float64)
    compressor = started(Codebook(), x)
    report = reported(compressor)
    assert report["encoder"].removable == 0 and report["codes"].removable == 6
    check_exact(compressor, x)


def test_indices_of_zero_are_no_silence() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.arange(6))
            self.embedding, self.head = nn.Embedding(6, 9), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.relu(x + self.embedding(self.places)))
            return y

    x = torch.randn(4, 6, 9, dtype=torch.float64)
    compressor = started(Places(), x)
    assert compressor.cut() is None
    check_exact(compressor, x)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sparse": True}, "its gradients are sparse"),
        ({"max_norm": 1.0}, "its forward() changes its weight"),
    ],
)
def test_what_cannot_be_quantised_stays_in_float(options: dict[str, Any], why: str) -> None:
    model = nn.Sequential(nn.Embedding(50, 8, **options), nn.Linear(8, 6), nn.Linear(6, 3))
    compressor = started(model, TOKENS)
    assert compressor.left_in_float == {"0": why}
    check_exact(compressor, TOKENS)


class Tied(nn.Module):
    """Reads and writes words with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.inner(self.words(tokens))))
        return y


def test_one_that_shares_its_weight_stays_in_float() -> None:
    compressor = started(Tied(), TOKENS)
    why = "it shares a parameter with another module"
    assert compressor.left_in_float == {"words": why, "head": why}
    check_exact(compressor, TOKENS)


def test_a_training_on_words_shrinks_them() -> None:
    torch.manual_seed(0)
    model = Sentences()
    tokens = torch.randint(50, (256, 6))
    labels = (tokens < 10).sum(1).clamp(max=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    compressor = Compressor(model, tokens[:8], 0.3, bits=8, schedule=Schedule(300))
    for _ in range(300):
        loss = F.cross_entropy(model(tokens), labels) + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compressor.step(optimizer)
    compressor.finish([tokens], optimizer)
    words = compressor.layers["words"]
    assert len(words.rows) < words.out_width < 12 and compressor.size().stored_percent < 10
    assert (model(tokens).argmax(1) == labels).float().mean() > 0.95


def test_it_is_compiled() -> None:
    model = Sentences()
    compressor = Compressor(model, TOKENS, 0.0, bits=8)
    kill(model, "words", [1, 4])
    kill(model, "places", [1, 4, 5])
    compressor.cut()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
