"""A size asked for instead of γ: γ is pressed with as it takes for the file to get there.

Between --penalty-from and --penalty-until the file follows a planned path from its size then to
the target, a bit faster at first, and γ is what a controller makes of how far the file is from it.
Nothing in it depends on what a γ is worth: it starts anywhere and moves by factors.
When the formats freeze, `trim.Fitter` makes up for what is missing, and again whenever training
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
from selfcompress.quantizer import integer_depth
from selfcompress.training.trim import Fitter

TOLERANCE = 0.01  # of the target, by which a file may be below it before it is filled up
LANDING = 1.02  # times the target is where the path ends: what was taken off does not come back
SLOWING = 1.5  # the logarithm of what is to go is as (1 - time)^SLOWING
PROPORTIONAL = 15.0  # log γ for an error of 1
INTEGRAL = 100.0  # how fast log γ moves while it stays, per window
LARGEST = 0.08  # error, to either side; for a larger one the path is drawn anew
START = 0.01  # γ to begin with
LOWEST, HIGHEST = 1e-6, 1e4
CONTROLS = 200  # times in a window that γ is set
MEASUREMENTS = 20  # times in a window that the file is measured

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


class GammaController:
    """Keeps a size on a path from `start` to `end` by setting γ.

    A proportional-integral controller of log γ by the error log(size / planned). Where the size
    cannot follow, whatever γ is, the path is drawn anew from where the size is: so γ does not run
    away meanwhile, and comes down as soon as the size falls faster than it has to.

    Args:
        start, end: sizes, in any unit.
    """

    def __init__(self, start: float, end: float) -> None:
        self.end = end
        self.distance = max(0.0, math.log(start / end))  # of the path, from 0 to 1
        self.progress = 0.0
        self.integral = math.log(START)

    def planned(self, progress: float) -> float:
        """The size to have after `progress`, 0 to 1, of the time."""
        return self.end * math.exp(self.distance * self._left(progress))

    def update(self, progress: float, size: float) -> float:
        """γ from `progress` on, where the size is `size`."""
        error = math.log(size / self.planned(progress))
        bounded = max(-LARGEST, min(LARGEST, error))
        if bounded != error and progress < 1:
            to_go = math.log(size / self.end) - bounded
            self.distance = max(0.0, to_go / self._left(progress))
        low, high = math.log(LOWEST), math.log(HIGHEST)
        self.integral += INTEGRAL * bounded * (progress - self.progress)
        self.integral = max(low, min(high, self.integral))
        self.progress = progress
        return math.exp(max(low, min(high, self.integral + PROPORTIONAL * bounded)))

    @staticmethod
    def _left(progress: float) -> float:
        return float(max(0.0, 1 - progress) ** SLOWING)


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
        self.controller: GammaController | None = None
        self.ratio = 1.0  # bytes of the file over those stored, when last measured
        self.measured_at = 0.0

    def press(self, progress: float) -> None:
        """Set γ. `progress` goes from 0 to 1 in the time there is to press."""
        if progress < 0:
            self.compressor.gamma = 0.0
            return
        if self.controller is None:
            self._measure(progress)
            self.controller = GammaController(self.size(), LANDING * self.target)
            self.compressor.gamma = self.controller.update(progress, self.size())
        elif progress - self.controller.progress >= 1 / CONTROLS:
            if progress - self.measured_at >= 1 / MEASUREMENTS:
                self._measure(progress)
            self.compressor.gamma = self.controller.update(progress, self.size())

    def size(self) -> float:
        """Bytes of the file, estimated, and continuous in the bit depths."""
        return self._stored_bytes() * self.ratio

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

    def _measure(self, progress: float) -> None:
        self.ratio = self.file_bytes() / (self.compressor.size().stored_bits / 8)
        self.measured_at = progress

    @torch.no_grad()
    def _stored_bytes(self) -> float:
        """Bytes stored, with every row's depth as far as it has come to the next whole one."""
        size = self.compressor.size()
        bits = float(size.stored_bits)
        for layer in self.compressor.layers.values():
            if layer.integer_bits:
                # A row enters a depth in its middle, and leaves it half a bit farther on.
                depth = integer_depth(layer.bit_depth)
                ahead = torch.where(depth > 0, 2 * (layer.bit_depth - depth) + 1, 0)
                bits += layer.fan_in * float(ahead.sum())
        return bits / 8

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: what a run needs to go on as if it had not stopped."""
        controller = None if self.controller is None else dict(vars(self.controller))
        return {"ratio": self.ratio, "measured_at": self.measured_at, "controller": controller}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratio, self.measured_at = state["ratio"], state["measured_at"]
        if state["controller"] is not None:
            self.controller = GammaController(1.0, 1.0)
            vars(self.controller).update(state["controller"])
