"""A size asked for instead of γ: the path to it, and the γ that keeps a network on the path.

What every row is worth is known (see `formats.py`), so for any γ the rows and bits that it leads to
can be told, and so the size, roughly; how roughly is measured now and then. While γ would rise, the
size is to follow a path from that at the start to the target, a bit faster at first; then to stay.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from selfcompress.formats import FormatStepper
from selfcompress.layers.quantized import of_rows
from selfcompress.quantizer import integer_depth
from selfcompress.schedule import RISE, Schedule
from selfcompress.size import Size

SLOWING = 1.5  # the logarithm of what is to go is as (1 - time)^SLOWING
LOWEST, HIGHEST = 1e-30, 1e20  # of γ: as the square of what a loss is multiplied with
HALVINGS = 40  # of the interval between them, to find γ
CONTROLS = 100  # times on the path that γ is set
MEASUREMENTS = 20  # times on the path that the size is measured, and after every cut

_STATE = ("start", "ratio", "weights", "measured_at", "set_at")


class SizePath:
    """The way of a network in training to a size.

    Args:
        target: where the path ends, in any unit.
        least: the smallest size that the network can have, in the same.
        at_first: all sizes of the network at the start.
        schedule: of the penalty; the path takes the time in which γ would rise.
        formats: of the network.
        measure: the size of the network, were it cut now.
    """

    def __init__(
        self,
        target: float,
        least: float,
        at_first: Size,
        schedule: Schedule,
        formats: FormatStepper,
        measure: Callable[[], float],
    ) -> None:
        self.target, self.least, self.schedule = target, least, schedule
        self.formats, self.measure = formats, measure
        rows = sum(len(layer.bit_depth) for layer in formats.layers.values())
        # Bits that a row takes beside its weights: its format, a norm's entry.
        self.besides = (at_first.stored_bits - at_first.q_bits) / rows
        self.start: float | None = None  # the size where the path begins
        self.ratio = 1.0  # of the size beyond `least` to the rough one, when last measured
        self.weights = 0  # of the quantised layers then
        self.measured_at = self.set_at = 0.0

    def gamma(self, step: int) -> float | None:
        """γ for `step`; None if it is to stay."""
        progress = self.schedule.progress(step) / RISE
        if progress < 0 or not self.formats.judged:
            return None
        if self.start is not None and progress - self.set_at < 1 / CONTROLS:
            return None
        weights = sum(layer.weight.numel() for layer in self.formats.layers.values())
        if weights != self.weights or progress - self.measured_at >= 1 / MEASUREMENTS:
            size = self.measure()
            self.ratio = max(1.0, size - self.least) / max(1.0, self._rough_size())
            self.weights, self.measured_at = weights, progress
            if self.start is None:
                self.start = size
        self.set_at = progress
        return self._gamma_for((self._planned(progress) - self.least) / self.ratio)

    def _planned(self, progress: float) -> float:
        """The size that γ has to lead to after `progress` of the path."""
        assert self.start is not None
        left = max(0.0, 1 - progress) ** SLOWING
        return float(self.target * max(1.0, self.start / self.target) ** left)

    def _gamma_for(self, size: float) -> float:
        """The smallest γ that leads to a rough size of at most `size`, or the largest there is."""
        low, high = math.log(LOWEST), math.log(HIGHEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            small = self._rough_size(math.exp(middle)) <= size
            low, high = (low, middle) if small else (middle, high)
        return math.exp(high)

    @torch.no_grad()
    def _rough_size(self, gamma: float | None = None) -> float:
        """Bits of all rows as they are, or if they had what they are worth at `gamma`."""
        layers = list(self.formats.layers.values())
        bits = integer_depth(torch.cat([layer.bit_depth for layer in layers]))
        if gamma is not None:
            wanted = self.formats.wanted(gamma)
            # What is between two depths is rounded up: half a bit more on average.
            then = (wanted + 0.5).clamp(min=2).clamp(max=self.formats.most_bits)
            then = torch.where(wanted < 1, 0, then)
            bits = then.where(bits > 0, 0)
        weights = of_rows(layers, [layer.fan_in for layer in layers]).double()
        return float((weights * bits + self.besides * (bits > 0)).sum())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: what a run needs to go on as if it had not stopped."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])
