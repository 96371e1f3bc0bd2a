"""Bit depths go to where one more bit would cost as much as it is worth to the task."""

# mypy: disable-error-code="no-untyped-call"

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD

from selfcompress import Compressor
from selfcompress.convert import quantize_layers
from selfcompress.formats import (
    AT_ONCE,
    FIT_INTERVAL,
    ROUNDING,
    TASK_SHARE,
    FormatStepper,
    _given_up,
)  # fmt: skip
from selfcompress.layers.quantized import quantized_layers
from selfcompress.quantizer import fake_quantize, fit_exponent, integer_depth
from selfcompress.size import q_bits

GAMMA = 0.01


def linear(**options: object) -> tuple[Compressor, SGD]:
    """Return a compressor of one layer of 3 rows and 5 columns (15 weights), and an optimiser.

    The optimiser has a learning rate of 0.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    settings = {"gamma": GAMMA, "bits": 8} | options
    compressor = Compressor(model, torch.randn(2, 5), **settings)  # type: ignore[arg-type]
    return compressor, SGD(compressor.weights(), lr=0.0)


def wanted(compressor: Compressor) -> Tensor:
    return compressor.formats.wanted(GAMMA)


def batch(size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def test_what_a_row_wants_is_the_minimum_of_price_and_harm() -> None:
    """The wanted depth minimises the price of the bits plus the harm that rounding does."""
    compressor, optimizer = linear()
    x, y = batch()
    (layer,) = compressor.layers.values()
    (F.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
    gradient, weight = layer.weight.grad, layer.weight.detach()
    assert gradient is not None
    worth = 0.5 * 32 * (gradient * weight).square().sum(1)
    compressor.step(optimizer)
    depths = torch.linspace(0, 12, 12001)
    harm = TASK_SHARE * worth[:, None] * ROUNDING * 4.0**-depths
    cheapest = (harm + GAMMA * 5 / 15 * depths).argmin(1)
    torch.testing.assert_close(wanted(compressor), depths[cheapest], atol=2e-3, rtol=0)
    # A γ that is 100 times as high costs log2(100) / 2 bits.
    less = compressor.formats.wanted(100 * GAMMA)
    torch.testing.assert_close(less, wanted(compressor) - math.log2(100) / 2)
    assert (compressor.formats.wanted(1e-12) == 8).all()  # never more than at the start


@pytest.mark.parametrize("scale", [7.0, 1e-3])
def test_scaling_the_loss_changes_nothing(scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        compressor, optimizer = linear()
        x, y = batch()
        (factor * (F.cross_entropy(compressor.model(x), y) + compressor.penalty())).backward()
        compressor.step(optimizer)
        found.append(wanted(compressor))
    assert (found[0] > 0).all()
    torch.testing.assert_close(*found)


def test_a_batch_in_parts_is_worth_what_it_is_worth_whole() -> None:
    """Wanted depths are the same if the gradients of a batch are accumulated from its parts."""
    found = []
    for parts in (1, 4):
        compressor, optimizer = linear()
        x, y = batch()
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.cross_entropy(compressor.model(x_part), y_part) + compressor.penalty()
            (loss / parts).backward()
        compressor.step(optimizer)
        found.append(wanted(compressor))
    torch.testing.assert_close(*found)


def test_it_is_averaged_over_steps() -> None:
    """The worth of rows is an EMA over steps, here with a decay of 0.8."""
    compressor, optimizer = linear(gamma=0.0, bit_step=0.2)
    (layer,) = compressor.layers.values()
    squares = []
    for seed in range(3):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        (compressor.model(x).square().mean() + compressor.penalty()).backward()
        assert layer.weight.grad is not None
        squares.append((layer.weight.grad * layer.weight.detach()).square().sum(1))
        compressor.step(optimizer)
    shares = torch.tensor([0.8**2, 0.8, 1.0])
    mean = (torch.stack(squares) * shares[:, None]).sum(0) / shares.sum()
    worth = 0.5 * 8 * mean
    depth = 0.5 * torch.log2(2 * math.log(2) * ROUNDING * TASK_SHARE * worth * 3 / GAMMA)
    torch.testing.assert_close(wanted(compressor), depth)


def test_a_batch_without_finite_gradients_says_nothing_of_worth() -> None:
    compressor, optimizer = linear()
    (layer,) = compressor.layers.values()
    x, y = batch()
    (F.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
    compressor.step(optimizer)
    optimizer.zero_grad()
    before = wanted(compressor)
    (compressor.model(x * torch.inf).sum() + compressor.penalty()).backward()
    assert layer.weight.grad is not None and not layer.weight.grad.isfinite().all()
    compressor.step(optimizer)
    assert wanted(compressor).equal(before) and before.isfinite().all()


def test_rows_that_nothing_reads_go_and_the_others_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        model.get_parameter("2.weight")[:, 4:] = 0
    compressor = Compressor(model, torch.randn(2, 5), 1e-5, bits=4, bit_step=0.05, interval=10**6)
    optimizer = SGD(compressor.weights(), lr=0.0)
    x, y = batch()
    for _ in range(100):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + compressor.penalty()).backward()
        compressor.step(optimizer)
    assert compressor.layers["0"].live_rows().tolist() == [True] * 4 + [False] * 4
    assert compressor.layers["2"].live_rows().all()


def test_a_row_turns_round_if_it_is_wanted_again() -> None:
    """The depth of a row that is being given up rises again if the row is worth its bits again."""
    compressor, optimizer = linear(bit_step=0.1)
    (layer,) = compressor.layers.values()
    x, y = batch()

    def step(share: float) -> None:
        optimizer.zero_grad()
        task = F.cross_entropy(compressor.model(x), y)
        (share * task + compressor.penalty()).backward()
        compressor.step(optimizer)

    for _ in range(4):
        step(0.0)
    fallen = layer.bit_depth.detach().min()
    assert 0 < fallen < 7  # of one row; the others wait for their turn
    for _ in range(60):
        step(1e4)
    assert (layer.bit_depth == 8).all()  # and none gets more than it started with


@pytest.mark.parametrize(("want", "bits"), [(0.9, 0), (1.1, 2), (1.9, 2), (2.1, 3), (6.9, 7)])
def test_a_row_ends_at_the_whole_bits_that_it_wants(want: float, bits: int) -> None:
    """A depth ends at the wanted one, rounded up to whole bits, or at 0 if that would be 1 bit."""
    compressor, optimizer = linear(gamma=1e-9, bit_step=0.1, interval=10**6)
    (layer,) = compressor.layers.values()
    x, y = batch()
    for _ in range(200):
        optimizer.zero_grad()
        (F.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
        compressor.step(optimizer)
        wanted = compressor.formats.wanted(1.0)  # they are 1 bit less when γ is 4 times as high
        compressor.gamma = 4 ** float(wanted.min() - want)
    assert integer_depth(layer.bit_depth).min() == bits


ROW = st.tuples(st.floats(-9, 9) | st.sampled_from([-math.inf, 0.9, 1.0, 1.9]), st.integers(0, 8))


@given(
    st.lists(st.tuples(st.lists(ROW), st.integers(0, 3)), min_size=1).filter(
        lambda layers: any(rows for rows, _ in layers)
    )
)
def test_few_rows_of_a_layer_are_given_up_at_once_the_least_wanted_first(
    layers: list[tuple[list[tuple[float, int]], int]],
) -> None:
    sizes = [len(rows) for rows, _ in layers]
    rows = torch.tensor([row for rows, _ in layers for row in rows], dtype=torch.float64)
    layer_of = torch.arange(len(layers)).repeat_interleave(torch.tensor(sizes))
    least = torch.tensor([least for _, least in layers])
    given_up = _given_up(rows[:, 0], rows[:, 1], layer_of, least[layer_of], len(layers))
    for part, up, spared in zip(rows.split(sizes), given_up.split(sizes), least, strict=True):
        wanted, depth = part.T
        going, unwanted = up & (depth > 0), (wanted < 1) & (depth > 0)
        assert not (going & ~unwanted).any()
        live = int((depth > 0).sum())
        assert live - int(going.sum()) >= min(int(spared), live)
        if live > spared:
            assert (
                going.any()
                == (unwanted & (wanted <= wanted[depth > 0].sort()[0][live - spared - 1])).any()
            )
        waiting = unwanted & ~going
        if going.any() and waiting.any():
            assert wanted[going].max() <= wanted[waiting].min()
            limited = depth[going].sum() > AT_ONCE * depth.sum()  # rows wait only for a limit
            assert limited or live - int(going.sum()) == spared
        if going.any():
            assert depth[going].sum() - depth[going].max() <= AT_ONCE * depth.sum()


@pytest.mark.parametrize("trained", [0, 5])
@pytest.mark.parametrize("frozen", ["at first", "its weight", "whole"])
def test_a_layer_that_is_frozen_stays_as_it_is(trained: int, frozen: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    if frozen == "at first":
        model[0].requires_grad_(False)
    compressor = Compressor(model, torch.randn(2, 5), 10.0, bits=8)
    layer, optimizer = compressor.layers["0"], SGD(compressor.weights(), lr=0.1)
    x, y = batch()

    def step() -> None:
        optimizer.zero_grad()
        (F.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)

    start = layer.bit_depth.detach().clone()
    for _ in range(trained):
        step()
    assert torch.equal(layer.bit_depth, start) == (trained == 0 or frozen == "at first")
    (layer if frozen == "whole" else layer.weight).requires_grad_(False)
    before = [p.detach().clone() for p in (layer.bit_depth, layer.exponent)]
    for _ in range(2 * FIT_INTERVAL):
        step()
    assert torch.equal(layer.bit_depth, before[0])
    assert torch.equal(layer.exponent, before[1])


def test_what_is_frozen_when_the_step_comes_was_trained_all_the_same() -> None:
    """Formats are stepped if the layer had gradients, even if it is frozen when the step comes.

    Loops do so that freeze a discriminator except in its own step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    compressor = Compressor(model, torch.randn(2, 5), 0.3, bits=8)
    layer, optimizer = compressor.layers["0"], SGD(compressor.weights(), lr=0.1)
    x, y = batch()
    start = [p.detach().clone() for p in (layer.bit_depth, layer.exponent)]
    for _ in range(30):
        layer.requires_grad_(True)
        optimizer.zero_grad()
        (F.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
        optimizer.step()
        layer.requires_grad_(False)
        compressor.step(optimizer)
    assert compressor.formats.adam.state[layer.bit_depth]["step"] == 30
    assert (layer.bit_depth < start[0]).any()
    assert (layer.exponent != start[1]).all()


def test_a_step_waits_for_nothing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fake tensors have a device but no values: reading a value fails, as does mixing devices.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        quantize_layers(model, bits=8, integer_bits=True, exclude=(), read_elsewhere=set())
        layers = quantized_layers(model)
        formats = FormatStepper(layers, 64, 8, 0.01, told_apart=False)
        monkeypatch.setattr(
            formats.adam, "step", lambda: None
        )  # torch's own, which reads a count of steps
        for _ in range(2):
            formats.note_loss_scale(torch.ones(()))
            for layer in layers.values():
                formats.collected.norms[layer] = torch.ones(len(layer.rows))
                formats.collected.exponents[layer] = torch.ones(len(layer.rows))
            assert q_bits(list(quantized_layers(model).values())).device.type == "cuda"
            formats.step(0.01, 2.0, [1, 1], fit=True)
        state = formats.adam.state[layers["0"].bit_depth]
        assert {kept.device.type for kept in state.values()} == {"cuda"}


@pytest.mark.parametrize("bits", range(2, 8))
def test_rounding_takes_what_is_said_of_normal_weights(bits: int) -> None:
    """The rounding error of normal weights is about what `ROUNDING` says, at every bit depth."""
    rows = torch.randn(64, 2000, generator=torch.Generator().manual_seed(0))
    depth = torch.full((64,), float(bits))
    error = fake_quantize(rows, depth, fit_exponent(rows, depth)) - rows
    share = float(error.square().mean() / rows.square().mean())
    print(bits, share * 4**bits)
    assert 0.4 < share / (ROUNDING * 4.0**-bits) < 2
