"""The schedule lets a network learn, raises γ, allows fewer bits, and freezes, in that order."""

# mypy: disable-error-code="no-untyped-call"

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import Chain
from torch.optim import SGD

from selfcompress import Compressor, Schedule
from selfcompress.schedule import COARSE_FROM, RISE, RISE_FROM

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_gamma_is_nothing_then_rises_by_equal_factors_then_stays() -> None:
    schedule = Schedule(1000, begin=0.2, end=0.7)
    assert schedule.share(199) == 0
    assert schedule.share(200) == pytest.approx(RISE_FROM)
    middle, top = 200 + round(500 * RISE / 2), 200 + round(500 * RISE)
    assert schedule.share(middle) == pytest.approx(math.sqrt(RISE_FROM))
    assert schedule.share(top) == schedule.share(999) == 1
    flat = Schedule(1000, begin=0.2, end=0.7, rise=False)
    assert [flat.share(step) for step in (199, 200, 999)] == [0, 1, 1]


def test_channels_keep_their_bits_until_most_are_gone_and_have_two_at_the_end() -> None:
    """`least_bits` is the starting depth until `COARSE_FROM`, and then falls to 2."""
    schedule = Schedule(1000, begin=0.0, end=1.0)
    coarse = round(1000 * COARSE_FROM)
    assert [schedule.least_bits(step, 8.0) for step in (0, coarse, 1000)] == [8, 8, 2]
    assert schedule.least_bits((coarse + 1000) // 2, 8.0) == pytest.approx(5, abs=0.02)
    assert schedule.least_bits(1000, 1.0) == 1


@given(
    st.integers(1, 10_000), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10_000),
    st.floats(1, 16),
)  # fmt: skip
def test_it_is_in_its_bounds_everywhere(
    steps: int, one: float, other: float, step: int, bits: float
) -> None:
    """γ's fraction never falls and `least_bits` never rises, and both stay within their bounds."""
    assume(one != other)
    schedule = Schedule(steps, min(one, other), max(one, other))
    assert 0 <= schedule.share(step) <= schedule.share(step + 1) <= 1
    assert min(2, bits) <= schedule.least_bits(step + 1, bits) <= schedule.least_bits(step, bits)
    assert schedule.least_bits(step, bits) <= bits
    assert 0 < schedule.bit_step <= 0.1


@pytest.mark.parametrize(
    "numbers", [(0, 0.1, 0.8), (10, 0.8, 0.1), (10, -0.1, 0.5), (10, 0.1, 1.1), (10, 0.5, 0.5)]
)
def test_nonsense_is_refused(numbers: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|does not hold"):
        Schedule(*numbers)


def test_a_compressor_follows_it() -> None:
    model = Chain()
    schedule = Schedule(20, begin=0.25, end=0.75)
    compressor = Compressor(model, X, 0.1, bits=8, schedule=schedule)
    optimizer = SGD(compressor.weights(), lr=0.1)
    start = {n: layer.bit_depth.detach().clone() for n, layer in compressor.layers.items()}
    prices = []
    for step in range(20):
        assert compressor.frozen == (step >= 15)
        prices.append(compressor.price)
        (model(X).square().mean() + compressor.penalty()).backward()
        compressor.step(optimizer)
        if step == 4:
            assert all(torch.equal(compressor.layers[n].bit_depth, b) for n, b in start.items())
    assert prices == pytest.approx([0.1 * schedule.share(step) for step in range(20)])
    assert any(not torch.equal(compressor.layers[n].bit_depth, b) for n, b in start.items())
