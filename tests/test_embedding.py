"""Embeddings: every dimension of their vectors is a row with a bit depth, and can be cut."""

# mypy: disable-error-code="no-untyped-call"

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import check_exact, computed, reported, started, trained_on_words
from networks import kill
from torch import Tensor, nn

import selfcompress
from selfcompress import Compressor
from selfcompress.dense import to_dense
from selfcompress.layers.embeddings import QuantEmbedding
from selfcompress.layers.quantized import QuantizedLayer, quantized_layers

TOKENS = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))


class Sentences(nn.Module):
    """Embeddings of words and positions, without a norm that would mix their dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 12, padding_idx=0), nn.Embedding(8, 12)
        self.a, self.b = nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        y: Tensor = self.b(torch.relu(self.a(x)).mean(1))
        return y


def test_its_dimensions_go_with_all_that_reads_them(tmp_path: Path) -> None:
    """Dimensions of embeddings are cut with all that reads them; files and dense copies agree."""
    compressor = started(Sentences(), TOKENS)
    report = reported(compressor)
    assert [report[name].removable for name in ("words", "places", "a", "b")] == [12, 12, 9, 0]
    assert compressor.size().macs == 6 * 12 * 9 + 9 * 3  # a lookup multiplies nothing
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
    """A layer quantises the vectors that are read, or all if that is fewer; both give the same."""
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
    assert not results[0][0][1].any()  # the vector for padding gets no gradient


@pytest.mark.parametrize("options", [{"padding_idx": 1}, {"scale_grad_by_freq": True}])
def test_few_and_many_indices_teach_the_same(options: dict[str, Any]) -> None:
    """Gradients equal those of a lookup in the whole weight, though the padding vector is not 0.

    It need not be 0 in an embedding that was trained elsewhere.
    """
    torch.manual_seed(0)
    plain = nn.Embedding(9, 4, **options).double()
    with torch.no_grad():
        plain.weight.normal_()
    layer = QuantEmbedding.from_float(plain, 3, True)
    indices = torch.tensor([[0, 1, 1], [3, 0, 7]])
    factors = torch.arange(24.0, dtype=torch.float64).view(2, 3, 4)
    few = torch.autograd.grad((layer(indices) * factors).sum(), [layer.weight, layer.exponent])
    looked_up = F.embedding(
        indices, layer.quantized_weight(), plain.padding_idx, None, 2.0, plain.scale_grad_by_freq
    )
    many = torch.autograd.grad((looked_up * factors).sum(), [layer.weight, layer.exponent])
    for a, b in zip(few, many, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dead", [[0, 3], list(range(12))])
def test_rows_that_are_cut_leave_zeros_where_the_dimension_stays(dead: list[int]) -> None:
    """A cut row whose dimension cannot be removed leaves zeros in its place."""
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
    """An embedding counts the samples of a batch by the first dimension of its indices."""
    compressor = started(Sentences(), TOKENS)
    compressor.model(TOKENS)
    assert compressor.layers["words"].samples == 4
    single = started(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.arange(5))
    single.model(torch.arange(7))
    assert [layer.samples for layer in single.layers.values()] == [7, 7]


class Offset(nn.Embedding):
    """A user's class that adds 2 to its indices, as BART's embedding of positions does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


class Called(nn.Embedding):
    """A user's class that calls F.embedding."""

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
    """Multiplies an embedding by the square root of its width, as the first transformer did."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 9), nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(tokens) * self.embedding.embedding_dim**0.5)
        return y


def test_a_width_that_is_computed_with_stays() -> None:
    """A layer whose width forward() computes with keeps all of its channels."""
    compressor = started(Scaled(), TOKENS)
    assert "embedding.embedding_dim" in reported(compressor)["embedding"].why
    check_exact(compressor, TOKENS)


class Codebook(nn.Module):
    """Looks up vectors by indices that are computed from the output of a layer."""

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
    """Channels from which indices are computed are not removed."""
    x = torch.randn(8, 5, dtype=torch.float64)
    compressor = started(Codebook(), x)
    report = reported(compressor)
    assert report["encoder"].removable == 0 and report["codes"].removable == 6
    check_exact(compressor, x)


def test_indices_of_zero_are_no_silence() -> None:
    """An index that is 0 is not taken for a channel that is zero and could be removed."""

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


class Bags(nn.Module):
    """Bags of words; in mode "sum", a layer computes the weight of each word."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(50, 8, mode=mode, padding_idx=0)
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
        self.amounts = nn.Linear(1, 6) if mode == "sum" else None  # other modes take no weights

    def forward(self, tokens: Tensor, amounts: Tensor) -> Tensor:
        much = None if self.amounts is None else self.amounts(amounts)
        x = self.bags(tokens, per_sample_weights=much)
        y: Tensor = self.head(torch.relu(self.hidden(x)))
        return y


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_words_lose_dimensions_as_well(mode: str, tmp_path: Path) -> None:
    x = TOKENS, torch.randn(4, 1, dtype=torch.float64)
    compressor = started(Bags(mode), x)
    report = reported(compressor)
    assert report["bags"].removable == 8 and report["hidden"].removable == 6
    check_exact(compressor, x)
    model = compressor.model
    assert len(compressor.layers["bags"].rows) < 8
    want = computed(model, x, training=False)
    dense = to_dense(model)
    assert type(dense.bags) is nn.EmbeddingBag and dense.bags.mode == mode
    torch.testing.assert_close(computed(dense, x, training=False), want)
    selfcompress.save(model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", Bags(mode).double())
    torch.testing.assert_close(computed(loaded, x, training=False), want, rtol=0, atol=0)


class OwnBag(nn.EmbeddingBag):
    """A user's class: twice the mean of a sentence's words."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * F.embedding_bag(tokens, self.weight, mode="mean")


def test_bags_with_a_forward_of_their_own_are_quantised() -> None:
    model = nn.Sequential(OwnBag(50, 8), nn.Linear(8, 6), nn.Linear(6, 3))
    compressor = started(model, TOKENS)
    assert not compressor.left_in_float
    assert isinstance(model[0], OwnBag) and isinstance(model[0], QuantizedLayer)
    check_exact(compressor, TOKENS, shrinks=False)


# --- an output layer with the same weight ---------------------------------------------------------


class Tied(nn.Module):
    """A model whose output layer shares the weight of its embedding.

    Args:
        head_first: whether the output layer is registered before the embedding, and has a bias.
        normed: whether a LayerNorm, which freezes all dimensions, is before the output layer.
    """

    def __init__(self, head_first: bool = False, normed: bool = True) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(8, 50)
        self.words, self.inner, self.outer = nn.Embedding(50, 8), nn.Linear(6, 7), nn.Linear(7, 8)
        self.norm = nn.LayerNorm(8) if normed else nn.Identity()
        if not head_first:
            self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.inner(self.words(tokens)[..., :6]))
        y: Tensor = self.head(self.norm(self.outer(x)))
        return y


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_first", [False, True])
def test_an_output_layer_reads_the_quantised_weight_of_the_embedding(
    head_first: bool, normed: bool, tmp_path: Path
) -> None:
    compressor = started(Tied(head_first, normed), TOKENS)
    assert not compressor.left_in_float and "head" not in compressor.layers
    size = compressor.size()
    assert size.macs == 6 * (6 * 7 + 7 * 8 + 8 * 50)
    assert size.q_percent == 25  # the shared weight counts once, as it did at the start
    model = compressor.model
    torch.testing.assert_close(
        model.get_submodule("head").weight, compressor.layers["words"].dense_weight()
    )
    check_exact(compressor, TOKENS)
    words = compressor.layers["words"]
    assert len(words.rows) < 8 == words.out_width

    want = computed(model, TOKENS, training=False)
    dense = to_dense(model)
    assert dense.get_parameter("head.weight") is dense.get_parameter("words.weight")
    torch.testing.assert_close(computed(dense, TOKENS, training=False), want)
    selfcompress.save(model, tmp_path / "net.scnn")
    fresh = Tied(head_first, normed).double()
    loaded = selfcompress.load(tmp_path / "net.scnn", fresh)
    torch.testing.assert_close(computed(loaded, TOKENS, training=False), want, rtol=0, atol=0)
    again = Compressor(Tied(head_first, normed).double(), TOKENS, 0.01, bits=8)
    again.load_state_dict(compressor.state_dict())
    torch.testing.assert_close(computed(again.model, TOKENS, False), want, rtol=0, atol=0)
    copied = copy.deepcopy(model)
    assert copied.get_submodule("head").embedding is copied.get_submodule("words")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


def test_to_tie_it_again_changes_nothing() -> None:
    """Tying the same weight again has no effect, and another weight is refused."""
    model = Tied().double()
    compressor = Compressor(model, TOKENS, 0.0, bits=8)
    before = model(TOKENS)
    model.head.weight = model.words.weight
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=0)
    assert "head.weight" not in model.state_dict() and len(compressor.weights()) == 7
    with pytest.raises(ValueError, match="takes no other"):
        model.head.weight = nn.Parameter(torch.zeros(50, 8))


def test_both_uses_of_a_shared_weight_teach_it() -> None:
    """A shared weight gets the gradients of the embedding and of the output layer."""
    torch.manual_seed(0)
    plain = Tied().double()
    model = copy.deepcopy(plain)
    compressor = Compressor(model, TOKENS, 0.0, bits=16)
    for net in (plain, model):
        net(TOKENS).square().mean().backward()
    got, want = (net.get_parameter("words.weight").grad for net in (model, plain))
    assert got is not None and want is not None
    inside = got != 0  # saturated weights have no gradient
    torch.testing.assert_close(got[inside], want[inside], rtol=0.01, atol=1e-4)
    assert len(compressor.weights()) == len(list(plain.parameters()))


class Thrice(Tied):
    """A tied model with a second embedding that shares the weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.Embedding(50, 8)
        self.others.weight = self.words.weight


class Halved(nn.Linear):
    """A user's linear class."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class OwnHead(Tied):
    """A tied model whose output layer is of a user's class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Halved(8, 50)
        self.head.weight = self.words.weight


@pytest.mark.parametrize(
    ("build", "exclude"),
    [(Tied, ["head"]), (Tied, ["words"]), (Thrice, []), (OwnHead, [])],
)
def test_who_shares_a_weight_otherwise_stays_in_float(
    build: Callable[[], nn.Module], exclude: list[str]
) -> None:
    """Layers that share a weight in a way that is not supported stay in float."""
    compressor = started(build(), TOKENS, exclude=exclude)
    assert {"words"} <= compressor.left_in_float.keys()
    if build is Tied:
        assert "head" in compressor.left_in_float
    check_exact(compressor, TOKENS)


def test_files_with_embeddings_in_float_load(tmp_path: Path) -> None:
    """Files with embeddings in float, as older versions wrote them, still load."""
    compressor = started(Tied(), TOKENS, exclude=["words", "head"])
    want = computed(compressor.model, TOKENS, training=False)
    selfcompress.save(compressor.model, tmp_path / "net.scnn")
    loaded = selfcompress.load(tmp_path / "net.scnn", Tied().double())
    assert type(loaded.get_submodule("words")) is nn.Embedding
    torch.testing.assert_close(computed(loaded, TOKENS, training=False), want, rtol=0, atol=0)


# --- training -------------------------------------------------------------------------------------


def test_a_training_on_words_shrinks_them() -> None:
    compressor, accuracy = trained_on_words(Sentences, 0.3)
    words = compressor.layers["words"]
    assert len(words.rows) < words.out_width < 12 and compressor.size().stored_percent < 10
    assert accuracy > 0.95


def test_it_is_compiled() -> None:
    """A model with cut embeddings compiles into one graph that computes the same."""
    model = Sentences()
    compressor = Compressor(model, TOKENS, 0.0, bits=8)
    kill(model, "words", [1, 4])
    kill(model, "places", [1, 4, 5])
    compressor.cut()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
