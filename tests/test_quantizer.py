"""The quantiser computes eq. (1), and its gradients are the closed form in its docstring."""

# mypy: disable-error-code="no-untyped-call"

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfcompress.quantizer import EXPONENT_FLOOR, fake_quantize, fit_exponent

LN2 = math.log(2)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def reference(x: float, b: float, e: float, integer_bits: bool) -> float:
    """Return eq. (1) as computed with Python's doubles, whose round() ties to even."""
    b = math.ceil(b) if integer_bits else b
    low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
    return 2**e * round(min(max(x / 2**e, low), high))


def quantize_row(
    row: list[float], b: float, e: float, dtype: torch.dtype, integer_bits: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (q, x, b, e) of a single row; x, b and e are leaves that require gradients."""
    x = torch.tensor([row], dtype=dtype, requires_grad=True)
    bits = torch.tensor([b], dtype=dtype, requires_grad=True)
    exponent = torch.tensor([e], dtype=dtype, requires_grad=True)
    return fake_quantize(x, bits, exponent, integer_bits=integer_bits), x, bits, exponent


@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(st.floats(-40, 40), min_size=1, max_size=6),
    b=st.one_of(st.floats(0, 8), st.integers(0, 8).map(float)),
    e=st.floats(-6, 3),
    integer_bits=st.booleans(),
)
def test_forward_is_equation_1(row: list[float], b: float, e: float, integer_bits: bool) -> None:
    q = quantize_row(row, b, e, torch.float64, integer_bits)[0]
    expected = [reference(x, b, e, integer_bits) for x in row]
    np.testing.assert_allclose(q[0].detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(levels=st.lists(st.integers(-600, 600), min_size=1, max_size=6), b=st.integers(0, 8))
def test_forward_is_equation_1_in_float32_down_to_the_ties(levels: list[int], b: int) -> None:
    # Quarters of a level are exact in float32, so that ties are ties there too.
    row = [level / 4 * 2**-3 for level in levels]
    q = quantize_row(row, b, -3, torch.float32)[0]
    assert q[0].tolist() == [reference(x, b, -3, True) for x in row]


@pytest.mark.parametrize("integer_bits", [True, False])
def test_zero_bits_give_exactly_zero(integer_bits: bool) -> None:
    x = torch.cat([torch.randn(5, 100) * 10.0**k for k in range(-4, 5)])
    q = fake_quantize(x, torch.zeros(45), torch.randn(45) * 5, integer_bits=integer_bits)
    assert (q == 0).all()


@DTYPES
def test_ties_go_to_even(dtype: torch.dtype) -> None:
    q = quantize_row([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], 8, 0, dtype)[0]
    assert q[0].tolist() == [0, 2, 2, 0, -2, -2]


def test_each_row_has_its_own_format() -> None:
    x = torch.full((3, 2, 1, 1), 0.7)
    q = fake_quantize(x, torch.tensor([0.0, 2.0, 8.0]), torch.tensor([0.0, -1.0, -4.0]))
    assert q[:, 0, 0, 0].tolist() == [0, 0.5, 0.6875]
    assert q.shape == x.shape


def test_integer_mode_rounds_the_bit_depth_up() -> None:
    x, e = torch.linspace(-5, 5, 41).repeat(4, 1), torch.zeros(4)
    up = fake_quantize(x, torch.tensor([0.01, 1.01, 2.5, 3.0]), e)
    assert torch.equal(up, fake_quantize(x, torch.tensor([1.0, 2.0, 3.0, 3.0]), e))
    assert up.unique().numel() == 8
    fractional = fake_quantize(x, torch.tensor([0.01, 1.01, 2.5, 3.0]), e, integer_bits=False)
    assert not torch.equal(up, fractional)


@DTYPES
@pytest.mark.parametrize("integer_bits", [True, False])
@pytest.mark.parametrize("e", [0.0, -3.0, 0.7, -1.3])
@pytest.mark.parametrize("b", [0.0, 1.0, 2.0, 1.6, 4.0])
def test_gradients_are_the_closed_form(
    b: float, e: float, integer_bits: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    x0 = (torch.randn(50) * 3 * 2**e).tolist()
    q, x, bits, exponent = quantize_row(x0, b, e, dtype, integer_bits)
    weights = torch.randn(50, dtype=dtype)
    (q[0] * weights).sum().backward()

    used = math.ceil(b) if integer_bits else b
    low, high = -(2 ** (used - 1)), 2 ** (used - 1) - 1
    grad_x, grad_b, grad_e = [], 0.0, 0.0
    for value, w in zip(x[0].tolist(), weights.tolist(), strict=True):
        s, quantized = value / 2**e, reference(value, b, e, integer_bits)
        inside = low <= s <= high
        grad_x.append(w if inside else 0.0)
        if not inside:
            grad_b += w * (1 if s > high else -1) * LN2 * 2 ** (e + used - 1)
        grad_e += w * LN2 * (quantized - value if inside else quantized)
    rtol, atol = (1e-4, 1e-4) if dtype is torch.float32 else (1e-9, 0.0)
    assert x.grad is not None
    assert bits.grad is not None
    assert exponent.grad is not None
    np.testing.assert_allclose(x.grad[0].numpy(), grad_x, rtol, atol)
    np.testing.assert_allclose(bits.grad.numpy(), [grad_b], rtol, atol)
    np.testing.assert_allclose(exponent.grad.numpy(), [grad_e], rtol, atol)


@DTYPES
@pytest.mark.parametrize(
    ("value", "b", "inside"),
    [
        (-2.0, 2, True), (1.0, 2, True), (-2.25, 2, False), (1.25, 2, False),
        (-1.0, 1, True), (0.0, 1, True), (0.25, 1, False), (-1.25, 1, False),
        (-0.5, 0, True), (-0.25, 0, False), (-0.75, 0, False), (0.0, 0, False),
        (0.5, 3, True), (1.5, 3, True), (-2.5, 3, True),
    ],
)  # fmt: skip
def test_gradients_on_the_bounds_and_at_ties(
    value: float, b: float, inside: bool, dtype: torch.dtype
) -> None:
    e = -2.0
    q, x, bits, exponent = quantize_row([value * 2**e], b, e, dtype)
    q.sum().backward()
    assert x.grad is not None
    assert bits.grad is not None
    assert exponent.grad is not None
    side = 0 if inside else math.copysign(1, value - (2 ** (b - 1) - 1))
    assert x.grad.item() == (1 if inside else 0)
    assert bits.grad.item() == pytest.approx(side * LN2 * 2 ** (e + b - 1), rel=1e-6)
    off = q.item() - value * 2**e if inside else q.item()
    assert exponent.grad.item() == pytest.approx(LN2 * off, rel=1e-6)


@pytest.mark.parametrize("value", [-7.3, 6.1])
@pytest.mark.parametrize("b", [2.0, 3.0])
def test_gradients_are_finite_differences_where_all_is_saturated(value: float, b: float) -> None:
    # At a whole bit depth the bounds of the clamp are whole, and eq. (1) is smooth in e. It is not
    # smooth in b, where the estimator skips the rounding: the value before it is differentiated.
    def clamped(b: float, e: float) -> float:
        bound = 2 ** (b - 1) - 1 if value > 0 else -(2 ** (b - 1))
        return float(2**e * bound)

    h = 1e-6
    q, _, bits, exponent = quantize_row([value], b, -0.4, torch.float64, integer_bits=False)
    q.sum().backward()
    assert bits.grad is not None
    assert exponent.grad is not None
    by_b = (clamped(b + h, -0.4) - clamped(b - h, -0.4)) / (2 * h)
    assert bits.grad.item() == pytest.approx(by_b, rel=1e-5)

    def actual(e: float) -> float:
        return quantize_row([value], b, e, torch.float64, integer_bits=False)[0].item()

    by_e = (actual(-0.4 + h) - actual(-0.4 - h)) / (2 * h)
    assert exponent.grad.item() == pytest.approx(by_e, rel=1e-5)


def test_only_the_gradients_asked_for_are_made() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    b, e = torch.full((3,), 4.0), torch.full((3,), -3.0)
    fake_quantize(x, b, e).sum().backward()
    assert x.grad is not None
    assert b.grad is None
    assert e.grad is None


def test_autocast_changes_nothing() -> None:
    x0, upstream = torch.randn(8, 30), torch.randn(8, 30)
    results = []
    for enabled in (False, True):
        x = x0.clone().requires_grad_()
        b = torch.full((8,), 7.0, requires_grad=True)
        e = torch.linspace(-6, -4, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            q = fake_quantize(x, b, e)
        q.backward(upstream)
        assert x.grad is not None
        assert b.grad is not None
        assert e.grad is not None
        results.append((q, x.grad, b.grad, e.grad))
    assert results[1][0].dtype is torch.float32
    for outside, inside in zip(*results, strict=True):
        assert torch.equal(outside, inside)


def test_bfloat16_weights_come_back_as_such_but_are_quantised_in_float32() -> None:
    x = torch.randn(4, 50).bfloat16().requires_grad_()
    b, e = torch.full((4,), 8.0, requires_grad=True), torch.full((4,), -5.3, requires_grad=True)
    q = fake_quantize(x, b, e)
    assert q.dtype is torch.bfloat16
    assert torch.equal(q, fake_quantize(x.detach().float(), b, e).bfloat16())
    q.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.bfloat16
    assert e.grad is not None
    assert e.grad.dtype is torch.float32


def test_an_all_zero_channel_gets_the_floor() -> None:
    weight = torch.randn(3, 5)
    weight[1] = 0
    e = fit_exponent(weight, torch.tensor([4.0, 4.0, 0.0]))
    assert e[1] == EXPONENT_FLOOR
    assert e.isfinite().all()
    assert e.dtype is torch.float32
    q = fake_quantize(weight, torch.full((3,), 4.0), e)
    assert q.isfinite().all()
    assert (q[1] == 0).all()
    assert fit_exponent(torch.randn(0, 5), torch.zeros(0)).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8), spread=st.floats(1, 12), scale=st.floats(-6, 6),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_fitted_exponent_beats_not_clipping(
    bits: int, spread: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Powers of normal numbers: anything from bell-shaped to a few huge outliers.
    weight = torch.randn(4, 40, generator=generator)
    weight = weight.sign() * weight.abs() ** (spread / 4) * 2**scale
    b = torch.full((4,), float(bits))

    def error(e: Tensor) -> Tensor:
        return (fake_quantize(weight, b, e) - weight).square().sum(1)

    no_clipping = torch.log2(weight.abs().amax(1)) - (bits - 1)
    fitted = error(fit_exponent(weight, b))
    # `no_clipping` puts the largest magnitude at the lowest level, which is negative; an exponent
    # larger by one makes it fit above zero, too.
    assert (fitted <= error(no_clipping) * (1 + 1e-5)).all()
    assert (fitted <= error(no_clipping + 1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_twice_the_weights_have_one_more_exponent(bits: int) -> None:
    weight, b = torch.randn(16, 3, 3, 3), torch.full((16,), float(bits))
    fitted = fit_exponent(weight, b)
    torch.testing.assert_close(fit_exponent(2 * weight, b), fitted + 1, rtol=0, atol=1e-4)


def test_clipping_the_tail_is_tried() -> None:
    """With one outlier, the best exponent for two bits clips it, to resolve the other weights."""
    weight = torch.cat([torch.linspace(-1, 1, 400), torch.tensor([3.0])])[None]
    b = torch.tensor([2.0])
    assert fit_exponent(weight, b) < math.log2(3) - 1


def test_a_dead_row_has_no_gradient_though_what_comes_back_is_not_finite() -> None:
    """The gradient of √ at 0, which is what a dead row computes, is infinite."""
    weight = torch.randn(3, 4, requires_grad=True)
    quantized = fake_quantize(weight, torch.tensor([4.0, 0.0, 4.0]), torch.full((3,), -3.0))
    quantized.square().sum(1).sqrt().sum().backward()
    assert weight.grad is not None
    assert (weight.grad[1] == 0).all() and weight.grad[[0, 2]].isfinite().all()
