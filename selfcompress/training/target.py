"""A size asked for instead of γ: the γ is looked for at which the network would have it.

What every row is worth is known (see `formats.py`), so for any γ the size of the network that it
leads to can be told. While γ rises, that size is to follow a path from the size at the start to the
target, a bit faster at first; then it stays there.
Once the formats are frozen `trim.Fitter` makes up for what is missing, and again whenever training
moves the entropy of the integers away from the target, for the last time in the finished network.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from selfcompress.compressor import Compressor
from selfcompress.layers import of_rows
from selfcompress.quantizer import integer_depth
from selfcompress.schedule import RISE
from selfcompress.training.runs import STORAGE
from selfcompress.training.trim import Fitter

TOLERANCE = 0.01  # of the target, by which a file may be below it before it is filled up
LANDING = 1.02  # times the target is where the path ends: what was taken off does not come back
SLOWING = 1.5  # the logarithm of what is to go is as (1 - time)^SLOWING
LOWEST, HIGHEST = 1e-8, 1e4
HALVINGS = 30  # of the interval between them, to find γ
CONTROLS = 100  # times on the path that γ is set
MEASUREMENTS = 20  # times on the path that the file is measured

_STATE = ("start", "ratio", "measured_at", "set_at")
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}


@dataclass(frozen=True)
class FileSize:
    """The size of a file as people write it: bytes, or percent of the starting weights in float."""

    amount: float
    unit: str  # B or %

    @classmethod
    def parse(cls, text: str) -> "FileSize":
        """From 150KB, 1.5 MB, 20000 (bytes; 1 KB is 1,000 of them) or 3%.

        Raises:
            ValueError: it is none of these, or zero.
        """
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmg]?b|%|)\s*", text, re.IGNORECASE)
        if not match or float(match[1]) == 0:
            raise ValueError(f"{text!r} is no size: give one such as 150KB, 1.5MB, 20000 or 3%")
        if match[2] == "%":
            return cls(float(match[1]), "%")
        return cls(float(match[1]) * _UNITS[match[2].lower()], "B")

    def bytes(self, float_bits: int) -> int:
        """Bytes of the file of a network that has `float_bits` at the start, rounded down."""
        share = self.amount / 100 * float_bits / 8 if self.unit == "%" else self.amount
        return math.floor(share)

    def __str__(self) -> str:
        return f"{self.amount:.15g}{self.unit}"


class SizeControl:
    """Has a network in training end in a file of at most `target` bytes, and hardly less.

    Args:
        compressor, optimizer: of the run.
        target: bytes of the file.
        most_bits: that a row may be given where there is room.
        file_bytes: the size of the network's file, were it cut now.
        losses: the task's loss on a few batches, one after the other, with gradients.
    """

    def __init__(
        self,
        compressor: Compressor,
        optimizer: Optimizer,
        target: int,
        most_bits: int,
        file_bytes: Callable[[], int],
        losses: Callable[[], Iterable[Tensor]],
    ) -> None:
        self.compressor, self.target, self.most_bits = compressor, target, most_bits
        self.file_bytes = file_bytes
        self.fitter = Fitter(compressor, optimizer, losses, file_bytes)
        self.start: float | None = None  # bytes of the file where the path begins
        self.ratio = 1.0  # bytes of the file over those stored, when last measured
        self.measured_at = self.set_at = 0.0

    def press(self) -> None:
        """Set γ for the next step. It rises by itself."""
        schedule, step = self.compressor.schedule, self.compressor.steps
        assert schedule is not None and not schedule.rise
        progress = schedule.progress(step) / RISE
        if progress < 0 or self.compressor.frozen:
            return
        if self.start is None:
            self.start = self._measure(progress)
        elif progress - self.set_at < 1 / CONTROLS:
            return
        elif progress - self.measured_at >= 1 / MEASUREMENTS:
            self._measure(progress)
        self.compressor.gamma = self._gamma_for(self.planned(progress))
        self.set_at = progress

    def planned(self, progress: float) -> float:
        """The bytes that γ has to lead to after `progress` of the path."""
        assert self.start is not None
        end = LANDING * self.target
        left = max(0.0, 1 - progress) ** SLOWING
        return float(end * max(1.0, self.start / end) ** left)

    def _gamma_for(self, size: float) -> float:
        """The smallest γ that leads to a file of at most `size` bytes, or the largest there is."""
        low, high = math.log(LOWEST), math.log(HIGHEST)
        now = self.compressor.size(**STORAGE).stored_bits
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            small = self.ratio * (now + self._change_of_bits(math.exp(middle))) / 8 <= size
            low, high = (low, middle) if small else (middle, high)
        return math.exp(high)

    def settle(self, last: bool = False) -> None:
        """Once formats are frozen: back to the target, if the file has left it.

        The `last` time, this is exact: batch-norm statistics have to be estimated anew after it.
        """
        if last:
            self.compressor.freeze()
            self.fitter.drop_zero_rows()
        if not self.compressor.frozen:
            return
        least = round((1 - TOLERANCE) * self.target)
        self.fitter.fit(self.target, least, self.most_bits)

    def _measure(self, progress: float) -> float:
        """The bytes of the file, were it cut now; how that compares to what is stored is kept."""
        measured = self.file_bytes()
        self.ratio = measured / (self.compressor.size(**STORAGE).stored_bits / 8)
        self.measured_at = progress
        return measured

    @torch.no_grad()
    def _change_of_bits(self, gamma: float) -> float:
        """Bits of weights there would be more if every row had what it is worth at `gamma`."""
        layers = list(self.compressor.layers.values())
        now = integer_depth(torch.cat([layer.bit_depth for layer in layers]))
        wanted = self.compressor.formats.wanted(gamma)
        # What is between two depths is rounded up: half a bit more on average.
        then = torch.where(wanted < 1, 0, (wanted + 0.5).clamp(min=2))
        weights = of_rows(layers, [layer.fan_in for layer in layers]).double()
        return float((weights * (then.where(now > 0, 0) - now)).sum())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: what a run needs to go on as if it had not stopped."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])
