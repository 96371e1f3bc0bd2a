"""Fit a network's file to a number of bytes: a bit less, or more, where the task minds least.

What another format of a row does to the loss is estimated to first order, as the mean square over
batches of g · Δ: g the gradient of the quantised weight, Δ what the format adds to it. Rows that
matter least, for the bits that the file saves, are trimmed first; where there is room, those that
matter most get a bit more.
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

_ROUNDS = 20  # of trimming, or filling, at most; in each, a row moves by one bit or loses all
_TABLE_BITS = 4  # up to this depth integers are counted one by one to estimate their entropy


class _Formats(NamedTuple):
    """(rows,) bit depths and exponents of all layers, one after the other."""

    depth: Tensor
    exponent: Tensor


class Fitter:
    """Changes the formats of a network in training until its file has the size it should.

    Args:
        compressor: frozen already: nothing else may step the formats.
        optimizer: of the weights; cut along.
        losses: the task's loss on a few batches, one after the other, with gradients.
        file_bytes: the size of the network's file, were it cut now.
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
        """Trim to `limit` bytes at most, then fill up to `least` or more: the bytes of the file.

        Rows get no more than `most_bits`. The result is above `limit` only if nothing more can
        be taken, and below `least` if nothing more that fits can be given.
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
        """Take bits, or all, from the rows where it costs least; whether there was any to take.

        At a price of bits every row chooses by itself what to give: as it is best for the loss
        plus the price. The lowest price is looked for at which the file is small enough.
        """
        choices = [self._now()]
        for less in (1, 2, MAX_BITS):
            depth = integer_depth(choices[0].depth) - less
            # No row comes to one bit: `formats.py` says why.
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
            # A bit above the price at which a row changes its mind.
            price = prices[count - 1] * (1 + 1e-9) if count else -1.0
            best = (harm - price * saved).argmin(0, keepdim=True)
            depth, exponent = (
                torch.stack(part).gather(0, best)[0] for part in zip(*choices, strict=True)
            )
            return _Formats(depth, exponent)

        self._set(at(self._fewest(len(prices), at, lambda: self.file_bytes() <= limit)))
        return len(prices) > 0

    def _fill(self, limit: int, most_bits: int) -> bool:
        """Give a bit to the rows where it changes most, as many as there is room for; if any."""
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
        """The smallest count, up to `most`, at whose formats it is `done`, or else `most`."""
        low, high = 0, most
        while low < high:
            middle = (low + high) // 2
            self._set(at(middle))
            low, high = (low, middle) if done() else (middle + 1, high)
        return low

    def _steps(self, depth: Tensor) -> _Formats:
        """The formats of all rows at `depth`: (rows,) whole bits."""
        steps = map(_step, self._layers, self._split(depth))
        return _Formats(*(torch.cat(part) for part in zip(*steps, strict=True)))

    def _by_layer(self, formats: _Formats) -> list[_Formats]:
        return [_Formats(*pair) for pair in zip(*map(self._split, formats), strict=True)]

    def _split(self, values: Tensor) -> list[Tensor]:
        """(rows,) values of all layers → those of each."""
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
        """(rows,) the bits of the file that each step takes off, estimated.

        A row is taken to need, beside its weights, its share of everything that is not weights.
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
        """For each kind of steps, (rows,) the mean square over batches of what it does to the loss.

        The squares of the gradient's product with the step, summed up batch by batch.
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
    """Have every layer compute with the same weights as ever, but see their whole gradient.

    The straight-through gradient is masked where a weight saturates. On the same grid with all
    bits there are, the quantised weights come out as they are and none saturates.
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
    """The formats at `depth`: (rows,) whole bits. A row of nothing but zeros needs none."""
    exponent = fit_exponent(layer.weight_by_row(), depth)
    zero = (fake_quantize(layer.weight_by_row(), depth, exponent) == 0).flatten(1).all(1)
    return _Formats(torch.where(zero, 0, depth), exponent)


@torch.no_grad()
def _change(layer: QuantizedLayer, step: _Formats) -> Tensor:
    """(rows, fan-in ...): what `step` adds to the quantised weight."""
    weight = layer.weight_by_row()
    now = layer.by_row(layer.quantized_weight())
    return fake_quantize(weight, step.depth, step.exponent) - now


def _weight_bits(layer: QuantizedLayer, formats: _Formats) -> Tensor:
    """(rows,) what the weights of each row take in a file, by the entropy of its integers."""
    depth = integer_depth(formats.depth)
    integers = quantized_integers(
        layer.weight_by_row(), *formats, integer_bits=layer.integer_bits
    ).flatten(1)
    fine = (depth - _TABLE_BITS).clamp(min=0).int()  # bits that are taken as incompressible
    coarse = integers >> fine[:, None]
    entropy = fine.float()
    for level in range(-(2 ** (_TABLE_BITS - 1)), 2 ** (_TABLE_BITS - 1)):
        share = (coarse == level).float().mean(1)
        entropy -= torch.special.xlogy(share, share) / math.log(2)
    return entropy * layer.fan_in
