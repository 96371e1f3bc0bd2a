"""Fake-quantise a weight with one learnable bit depth and exponent per output channel (eq. 1).

q(x, b, e) = 2^e · round(clamp(2^-e · x, -2^(b-1), 2^(b-1) - 1)), rounding to nearest, ties to even.

Every equation number in this package refers to Cséfalvay & Imber, "Self-Compressing Neural
Networks", arXiv 2301.13142. Two consequences of eq. (1) worth keeping in mind: a channel of zero
bits quantises to exactly 0 (both bounds of the clamp are -1/2, which rounds to 0), and one bit
stores the two levels {-1, 0} · 2^e.
"""

import math
from typing import Any

import torch
from torch import Tensor

MAX_BITS = 16
"""The largest bit depth of a channel; its integers still fit an int16."""

EXPONENT_FLOOR = -24.0
"""The exponent of a channel whose weights are all zero, where log2 would be minus infinity."""


def integer_depth(bit_depth: Tensor) -> Tensor:
    """Return the whole bits that each channel is stored in: `bit_depth` (any shape) rounded up."""
    return bit_depth.detach().ceil()


def fake_quantize(
    weight: Tensor, bit_depth: Tensor, exponent: Tensor, *, integer_bits: bool = True
) -> Tensor:
    """Quantise `weight` (rows first) by eq. (1), with a straight-through estimator for rounding.

    Args:
        weight: (rows, ...) float tensor; a row is one output channel.
        bit_depth: (rows,) bits per weight, ≥ 0.
        exponent: (rows,) real exponents; the step between levels is 2^exponent.
        integer_bits: round the bit depth up in the forward pass, so that the levels used are the
            levels that can be stored. False is the paper's fractional bit depth.

    Returns:
        A tensor of `weight`'s shape and dtype. It is computed in at least float32, also under
        autocast.
    """
    quantized: Tensor = _FakeQuantize.apply(weight, bit_depth, exponent, integer_bits)
    return quantized


@torch.no_grad()
def quantized_integers(
    weight: Tensor, bit_depth: Tensor, exponent: Tensor, *, integer_bits: bool = True
) -> Tensor:
    """Return the integers that `fake_quantize` multiplies with 2^exponent, as files store them.

    Args:
        weight, bit_depth, exponent, integer_bits: as for `fake_quantize`.

    Returns:
        An int32 tensor of `weight`'s shape. In a row whose `integer_depth` is b its values are from
        -2^(b-1) to 2^(b-1) - 1, or all 0 if b is 0.
    """
    # In at least float32, dividing n · 2^e by 2^e gives n to within a thousandth.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    quantized = fake_quantize(wide, bit_depth, exponent, integer_bits=integer_bits)
    column = (-1,) + (1,) * (weight.dim() - 1)
    return (quantized / torch.exp2(exponent.to(wide.dtype).view(column))).round().to(torch.int32)


class _FakeQuantize(torch.autograd.Function):
    """Eq. (1) and its straight-through gradients in closed form.

    With s = 2^-e·x, and "saturated" where s is strictly outside the clamp:

                 inside            saturated
        ∂q/∂x    1                 0
        ∂q/∂b    0                 ±ln2 · 2^(e+b-1)   (the sign of the side it left on)
        ∂q/∂e    ln2 · (q - x)     ln2 · q
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bit_depth: Tensor, exponent: Tensor, integer_bits: bool
    ) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        column = (-1,) + (1,) * (weight.dim() - 1)
        bits = (bit_depth.ceil() if integer_bits else bit_depth).to(dtype).view(column)
        half_range = torch.exp2(bits - 1)
        step = torch.exp2(exponent.to(dtype).view(column))
        scaled = weight.to(dtype) / step
        # Do not clamp in place, nor cast to the dtype it has already: compiled by torch 2.11, both
        # give wrong gradients without any error.
        clamped = scaled.clamp(-half_range, half_range - 1)
        quantized = clamped.round() * step
        ctx.save_for_backward(weight, step, half_range, quantized, clamped == scaled)
        return quantized if weight.dtype == dtype else quantized.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, half_range, quantized, inside = ctx.saved_tensors
        grad = grads[0].to(step.dtype)
        # In a row of zero bits everything is outside the clamp, so a gradient that is not finite
        # becomes 0 here (multiplying with a mask would make it NaN).
        grad_inside = torch.where(inside, grad, 0)

        over_row = list(range(1, weight.dim()))
        grad_bits = grad_exponent = None
        if ctx.needs_input_grad[1]:
            scaled = weight.to(step.dtype) / step
            # -1 below the range, 0 inside, +1 above.
            side = (scaled > half_range - 1).to(step.dtype) - (scaled < -half_range).to(step.dtype)
            per_level = (grad * side).sum(over_row) if over_row else grad * side
            grad_bits = math.log(2) * per_level * (half_range * step).flatten()
        if ctx.needs_input_grad[2]:
            per_step = grad * quantized - grad_inside * weight
            grad_exponent = math.log(2) * (per_step.sum(over_row) if over_row else per_step)
        return grad_inside.to(weight.dtype), grad_bits, grad_exponent, None


@torch.no_grad()
def fit_exponent(weight: Tensor, bit_depth: Tensor) -> Tensor:
    """Return the exponent of each row at which eq. (1) has the least squared error on `weight`.

    Tries half powers of two around the exponent that just avoids saturation, which covers both
    "clip nothing" and "clip the tails to resolve the bulk".

    Args:
        weight: (rows, ...).
        bit_depth: (rows,); rows of fewer than one bit are fitted as if they had one.

    Returns:
        (rows,) float32 exponents; `EXPONENT_FLOOR` where a row is all zero, and for a weight on the
        meta device, where there is nothing to fit.
    """
    rows = weight.detach().float().flatten(1)
    if rows.numel() == 0 or rows.is_meta:
        return rows.new_full((rows.shape[0],), EXPONENT_FLOOR)
    bits = integer_depth(bit_depth).clamp(min=1)
    largest = rows.abs().amax(1)
    widest = torch.log2(largest.clamp(min=2.0**EXPONENT_FLOOR)) - (bits - 1)
    half_range = torch.exp2(bits - 1)[:, None]
    best, best_error = widest.clone(), torch.full_like(widest, math.inf)
    for half in range(-2, 5):
        exponent = widest - half / 2
        step = torch.exp2(exponent)[:, None]
        quantized = (rows / step).clamp(-half_range, half_range - 1).round() * step
        error = (quantized - rows).square().sum(1)
        better = error < best_error
        best = torch.where(better, exponent, best)
        best_error = torch.where(better, error, best_error)
    return torch.where(largest > 0, best, torch.full_like(best, EXPONENT_FLOOR))
