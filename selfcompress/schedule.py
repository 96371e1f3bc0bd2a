"""When the penalty acts: first learn, then drop channels, then lower bit depths, then fine-tune."""

from dataclasses import dataclass

RISE = 0.6  # fraction of the penalty's time in which γ rises, by equal factors, to its full value
RISE_FROM = 0.01  # fraction of its full value that γ rises from
COARSE_FROM = 0.45  # fraction of the penalty's time before which channels keep all bits, or go
TRAVEL = 16.0  # bits: the sum of the largest steps of a bit depth over the penalty's time
LARGEST_STEP = 0.1  # bits: upper limit of `bit_step`, however short the penalty's time is


@dataclass(frozen=True)
class Schedule:
    """The course of the penalty in a training of known length, to be given to a `Compressor`.

    Without one, a network loses channels under the full penalty before they have learnt anything.
    And if bit depths fell before channels were dropped, all channels, also those that stay, would
    learn with the noise of few bits.

    Args:
        steps: number of steps of the whole training, with one `Compressor.step` per optimiser step.
        begin, end: the penalty acts between these fractions of `steps`. Bit depths and exponents
            freeze at `end`.
        rise: whether γ rises to its full value; if not, it has it from `begin` on.

    Raises:
        ValueError: `steps` is not a whole number of at least 1, or 0 ≤ begin < end ≤ 1 is violated.
    """

    steps: int
    begin: float = 0.1
    end: float = 0.85
    rise: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.steps % 1 != 0:
            raise ValueError(f"steps must be a whole number and at least 1, not {self.steps}")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"0 ≤ begin < end ≤ 1 does not hold: {self.begin}, {self.end}")

    def progress(self, step: int) -> float:
        """Return the fraction of the penalty's time gone by at `step`: 0 at `begin`, 1 at `end`."""
        return (step / self.steps - self.begin) / (self.end - self.begin)

    def ended(self, step: int) -> bool:
        """Return whether bit depths and exponents are frozen at `step`."""
        return step >= self.end * self.steps

    def share(self, step: int) -> float:
        """Return the fraction of γ, from 0 to 1, that applies at `step`."""
        progress = self.progress(step)
        if progress < 0:
            return 0.0
        return float(RISE_FROM ** max(0.0, 1 - progress / RISE)) if self.rise else 1.0

    def least_bits(self, step: int, at_first: float) -> float:
        """Return the least bit depth at `step` of a channel that has bits.

        It falls linearly from `at_first` to 2 after `COARSE_FROM` of the penalty's time.

        Args:
            at_first: the bit depth that channels started at. If it is 2 or less, nothing falls.
        """
        coarse = (self.progress(step) - COARSE_FROM) / (1 - COARSE_FROM)
        return at_first - min(1.0, max(0.0, coarse)) * max(0.0, at_first - 2)

    @property
    def bit_step(self) -> float:
        """The largest step of a bit depth, in bits: `TRAVEL` spread over the penalty's time."""
        return min(LARGEST_STEP, TRAVEL / max(1.0, (self.end - self.begin) * self.steps))
