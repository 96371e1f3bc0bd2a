"""Fit a network's file to a number of bytes by changing the bit depths of rows.

The effect on the loss of giving a row another format is estimated to first order, as the sum over
batches of (g · Δ)², with g the gradient of the quantised weight and Δ its change under the format.
Rows with the least effect for each bit that the file saves lose bits first; where there is room,
rows with the largest effect for each bit that the file grows get a bit more.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from selfcompress.compressor import Compressor
from selfcompress.layers.quantized import QuantizedLayer
from selfcompress.quantizer import (
    MAX_BITS,
    fake_quantize,
    fit_exponent,
    integer_depth,
    quantized_integers,
)
from selfcompress.training.runs import STORAGE

_ROUNDS = 20  # of trimming, or filling, at most; in one, a row loses 1, 2 or all bits, or gains 1
_TABLE_BITS = 4  # highest bits of the integers whose values are counted to estimate an entropy


class _Formats(NamedTuple):
    """(rows,) bit depths and exponents, of one layer or of all layers one after the other."""

    depth: Tensor
    exponent: Tensor


class Fitter:
    """Changes the formats of a network in training until its file has a given size.

    Args:
        compressor: already frozen, so that nothing else steps the formats.
        optimizer: the optimiser of the weights, whose state is cut with the network.
        losses: yields the task's loss on a few batches, one after the other, with gradients.
        file_bytes: returns the bytes that the file would have if the network were cut now.
    """

    def __init__(
        self,
        compressor: Compressor,
        optimizer: Optimizer,
        losses: Callable[[], Iterable[Tensor]],
        file_bytes: Callable[[], int],
    ) -> None:
        self.compressor, self.optimizer = compressor, optimizer
        self.losses, self.file_bytes = losses, file_bytes

    @property
    def _layers(self) -> list[QuantizedLayer]:
        return list(self.compressor.layers.values())

    def fit(self, limit: int, least: int, most_bits: int) -> int:
        """Trim the file to at most `limit` bytes, then fill it up to at least `least` bytes.

        No row is given more than `most_bits`.

        Returns:
            The bytes of the file: above `limit` only if no more bits can be removed, and below
            `least` only if no more bits that fit can be added.
        """
        for _ in range(_ROUNDS):
            if self.file_bytes() <= limit or not self._trim(limit):
                break
            self.compressor.cut(self.optimizer)
        for _ in range(_ROUNDS):
            if self.file_bytes() >= least or not self._fill(limit, most_bits):
                break
        return self.file_bytes()

    def _trim(self, limit: int) -> bool:
        """Remove bits from the rows where it affects the loss least; return whether any could be.

        For a given price per bit, each row takes the format with the least sum of its effect on
        the loss and the price of its bits. The lowest price is searched for at which the file has
        at most `limit` bytes.
        """
        choices = [self._now()]
        for less in (1, 2, MAX_BITS):
            depth = integer_depth(choices[0].depth) - less
            # No row is left with one bit: `formats.py` says why.
            choices.append(self._steps(depth.where(depth > 1, 0)))
        saved = torch.stack([self._saved(choice) for choice in choices]).double()
        harm = torch.stack(self._harm(choices)).double()
        harm = harm.where((saved > 0) & harm.isfinite(), math.inf)
        harm[0] = 0
        prices = torch.cat(
            [
                (harm[b] - harm[a]) / (saved[b] - saved[a])
                for a, b in itertools.combinations(range(len(choices)), 2)
            ]
        )
        prices = prices[(prices >= 0) & prices.isfinite()].unique()

        def at(count: int) -> _Formats:
            # Slightly above the price at which a row's best format changes.
            price = prices[count - 1] * (1 + 1e-9) if count else -1.0
            best = (harm - price * saved).argmin(0, keepdim=True)
            depth, exponent = (
                torch.stack(part).gather(0, best)[0] for part in zip(*choices, strict=True)
            )
            return _Formats(depth, exponent)

        self._set(at(self._fewest(len(prices), at, lambda: self.file_bytes() <= limit)))
        return len(prices) > 0

    def _fill(self, limit: int, most_bits: int) -> bool:
        """Give one more bit to as many rows as `limit` has room for; return whether to any.

        Rows with the largest effect on the loss for each bit that the file grows come first.
        """
        before = self._now()
        depth = integer_depth(before.depth)
        more = self._steps((depth + 1).clamp(max=MAX_BITS))
        added = -self._saved(more)
        (harm,) = self._harm([more])
        possible = (depth > 0) & (depth < most_bits) & (added > 0) & harm.isfinite()
        use = torch.where(possible, harm / added, -1)
        order = use.argsort(stable=True, descending=True)[: int(possible.sum())]

        def at(count: int) -> _Formats:
            chosen = order[:count]
            return _Formats(
                *(b.index_copy(0, chosen, m[chosen]) for b, m in zip(before, more, strict=True))
            )

        count = self._fewest(len(order), at, lambda: self.file_bytes() > limit)
        self._set(at(count))
        if self.file_bytes() > limit:
            count -= 1
            self._set(at(count))
        return count > 0

    def _fewest(self, most: int, at: Callable[[int], _Formats], done: Callable[[], bool]) -> int:
        """Return the smallest count at whose formats `done()` holds, or `most` if there is none."""
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            self._set(at(middle))
            low, high = (low, middle) if done() else (middle + 1, high)
        return low

    def _steps(self, depth: Tensor) -> _Formats:
        """Return the formats of all rows at `depth`, (rows,) whole bits, with fitted exponents."""
        steps = map(_step, self._layers, self._split(depth))
        return _Formats(*(torch.cat(part) for part in zip(*steps, strict=True)))

    def _by_layer(self, formats: _Formats) -> list[_Formats]:
        return [_Formats(*pair) for pair in zip(*map(self._split, formats), strict=True)]

    def _split(self, values: Tensor) -> list[Tensor]:
        """Split (rows,) values of all layers into those of each layer."""
        return list(values.split([len(layer.bit_depth) for layer in self._layers]))

    def _now(self) -> _Formats:
        return _Formats(
            torch.cat([layer.bit_depth.detach() for layer in self._layers]),
            torch.cat([layer.exponent.detach() for layer in self._layers]),
        )

    @torch.no_grad()
    def _set(self, formats: _Formats) -> None:
        for layer, (depth, exponent) in zip(self._layers, self._by_layer(formats), strict=True):
            layer.bit_depth.copy_(depth)
            layer.exponent.copy_(exponent)
        self.compressor.connection.keep()

    def _saved(self, steps: _Formats) -> Tensor:
        """Estimate (rows,) the bits that the file saves when each row takes its format in `steps`.

        Beside its weights, a row is taken to need an equal share of everything but weights.
        """
        size = self.compressor.size(**STORAGE)
        rows = sum(layer.channels for layer in size.layers)
        share = (size.stored_bits - size.q_bits) / max(1, rows)
        parts = []
        for layer, step in zip(self._layers, self._by_layer(steps), strict=True):
            now = _Formats(layer.bit_depth.detach(), layer.exponent.detach())
            goes = (now.depth > 0).float() - (step.depth > 0).float()
            parts.append(_weight_bits(layer, now) - _weight_bits(layer, step) + share * goes)
        return torch.cat(parts)

    def _harm(self, kinds: list[_Formats]) -> list[Tensor]:
        """Estimate, for each of `kinds`, (rows,) the effect of each row's new format on the loss.

        It is the sum over batches of the squared product of gradient and weight change.
        """
        layers = self._layers
        changes = [
            [_change(*pair) for pair in zip(layers, self._by_layer(steps), strict=True)]
            for steps in kinds
        ]
        sums = [[torch.zeros_like(layer.exponent) for layer in layers] for _ in kinds]
        with _on_the_grid(layers):
            for loss in self.losses():
                weights = [layer.weight for layer in layers]
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                for layer_index, gradient in enumerate(gradients):
                    if gradient is None:
                        continue
                    by_row = layers[layer_index].by_row(gradient)
                    for change, total in zip(changes, sums, strict=True):
                        product = (by_row * change[layer_index]).flatten(1).sum(1)
                        total[layer_index] += product.square()
        return [torch.cat(total) for total in sums]


@contextmanager
def _on_the_grid(layers: list[QuantizedLayer]) -> Iterator[None]:
    """Let gradients reach saturated weights too, within a `with` block.

    The straight-through gradient is zero where a weight saturates. Inside, the weights are replaced
    by their quantised values and all bit depths by `MAX_BITS`: layers compute the same, as their
    grids stay the same, and no weight saturates.
    """
    kept = [(p, p.detach().clone()) for layer in layers for p in (layer.weight, layer.bit_depth)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(layer.quantized_weight())
            layer.bit_depth.fill_(MAX_BITS)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


@torch.no_grad()
def _step(layer: QuantizedLayer, depth: Tensor) -> _Formats:
    """Return a layer's formats at `depth`, (rows,) whole bits; rows that become zeros get none."""
    exponent = fit_exponent(layer.weight_by_row(), depth)
    zero = (fake_quantize(layer.weight_by_row(), depth, exponent) == 0).flatten(1).all(1)
    return _Formats(torch.where(zero, 0, depth), exponent)


@torch.no_grad()
def _change(layer: QuantizedLayer, step: _Formats) -> Tensor:
    """Return (rows, fan-in ...) the change of the quantised weight under the formats `step`."""
    weight = layer.weight_by_row()
    now = layer.by_row(layer.quantized_weight())
    return fake_quantize(weight, step.depth, step.exponent) - now


def _weight_bits(layer: QuantizedLayer, formats: _Formats) -> Tensor:
    """Estimate (rows,) the bits of each row's weights in a file, by the entropy of its integers."""
    depth = integer_depth(formats.depth)
    integers = quantized_integers(
        layer.weight_by_row(), *formats, integer_bits=layer.integer_bits
    ).flatten(1)
    fine = (depth - _TABLE_BITS).clamp(min=0).int()  # lowest bits, taken as incompressible
    coarse = integers >> fine[:, None]
    entropy = fine.float()
    for level in range(-(2 ** (_TABLE_BITS - 1)), 2 ** (_TABLE_BITS - 1)):
        share = (coarse == level).float().mean(1)
        entropy -= torch.special.xlogy(share, share) / math.log(2)
    return entropy * layer.fan_in
