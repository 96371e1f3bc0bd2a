"""Set γ during training so that a network reaches a given size.

From what every row is worth (see `formats.py`) follow, for any γ, the rows and bits that it leads
to, and so a rough size; its ratio to the true size is measured now and then. In the time in which
the schedule would raise γ, the size is to follow a path from its starting value to the target,
somewhat faster at first; after that it is to stay there.
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

SLOWING = 1.5  # log(planned size / target) falls as (1 - fraction of the path gone)^SLOWING
LOWEST, HIGHEST = 1e-30, 1e20  # bounds of γ: wide, as it goes with the square of the loss's scale
HALVINGS = 40  # bisections of the interval between the logarithms of these, to find γ
CONTROLS = 100  # how often γ is set along the path
MEASUREMENTS = 20  # how often the size is measured along the path; also after every cut

_STATE = ("start", "ratio", "weights", "measured_at", "set_at")


class SizePath:
    """A path from a network's size at the start to a target size, and the γ that follows it.

    Args:
        target: the size at the end of the path, in any unit (bits or bytes).
        least: the smallest size that the network can have, in the unit of `target`.
        at_first: all sizes of the network at the start.
        schedule: the schedule of the penalty; the path takes the time in which γ would rise.
        formats: the stepper of the network's formats, which knows what rows are worth.
        measure: returns the size that the network would have if it were cut now, in that unit.
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
        # Bits that a row takes besides its weights, on average: its format, a norm's entry.
        self.besides = (at_first.stored_bits - at_first.q_bits) / rows
        self.start: float | None = None  # the size where the path begins
        self.ratio = 1.0  # last measured: (size - `least`) / rough size
        self.weights = 0  # number of weights of the quantised layers when last measured
        self.measured_at = self.set_at = 0.0  # as fractions of the path

    def gamma(self, step: int) -> float | None:
        """Return the γ to use from `step` on, or None if it is to stay as it is."""
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
        """Return the size that γ is to lead to, after a fraction `progress` of the path."""
        assert self.start is not None
        left = max(0.0, 1 - progress) ** SLOWING
        return float(self.target * max(1.0, self.start / self.target) ** left)

    def _gamma_for(self, size: float) -> float:
        """Return the smallest γ that leads to a rough size of at most `size`, else `HIGHEST`."""
        low, high = math.log(LOWEST), math.log(HIGHEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            small = self._rough_size(math.exp(middle)) <= size
            low, high = (low, middle) if small else (middle, high)
        return math.exp(high)

    @torch.no_grad()
    def _rough_size(self, gamma: float | None = None) -> float:
        """Return the bits of all rows as they are now, or with what rows want at `gamma`."""
        layers = list(self.formats.layers.values())
        bits = integer_depth(torch.cat([layer.bit_depth for layer in layers]))
        if gamma is not None:
            wanted = self.formats.wanted(gamma)
            # Depths are rounded up to whole bits, which adds half a bit on average.
            then = (wanted + 0.5).clamp(min=2).clamp(max=self.formats.most_bits)
            then = torch.where(wanted < 1, 0, then)
            bits = then.where(bits > 0, 0)
        weights = of_rows(layers, [layer.fan_in for layer in layers]).double()
        return float((weights * bits + self.besides * (bits > 0)).sum())

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain numbers, what a resumed run needs to go on as if it had not stopped."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])
