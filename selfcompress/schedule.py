"""When to press: learn; then give channels up; make those that stay coarse; train what is left."""

from dataclasses import dataclass

RISE = 0.6  # fraction of the time of the penalty in which γ rises, by equal factors, to its value
RISE_FROM = 0.01  # of it
COARSE_FROM = 0.45  # fraction of that time from which channels may have fewer bits than at first
TRAVEL = 16.0  # bits: the sum of all largest steps of a bit depth in that time
LARGEST_STEP = 0.1  # of a bit depth, however short the time


@dataclass(frozen=True)
class Schedule:
    """The course of a training of known length, to be given to a `Compressor`.

    A network under the full penalty from its first step loses channels before they have learnt
    anything. And one that is made coarse before it has become small has all of its channels learn
    with the noise of few bits, those that go and those that stay.

    Args:
        steps: of the whole training: calls of `Compressor.step`, one for each optimiser step.
        begin, end: fractions of them between which there is a penalty; bit depths and exponents
            freeze at the end of it.
        rise: whether γ rises; if not, it is at its value from `begin` on.

    Raises:
        ValueError: `steps` is no whole number of at least 1, or 0 ≤ begin < end ≤ 1 does not hold.
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
        """Where in the time of the penalty `step` is: 0 at its begin, 1 at its end."""
        return (step / self.steps - self.begin) / (self.end - self.begin)

    def ended(self, step: int) -> bool:
        """Whether bit depths are frozen at `step`."""
        return step >= self.end * self.steps

    def share(self, step: int) -> float:
        """The fraction of γ, from 0 to 1, that presses at `step`."""
        progress = self.progress(step)
        if progress < 0:
            return 0.0
        return float(RISE_FROM ** max(0.0, 1 - progress / RISE)) if self.rise else 1.0

    def least_bits(self, step: int, at_first: float) -> float:
        """The bit depth that a channel has at the least, unless it has none: from `at_first` to 2.

        Args:
            at_first: the bit depth that channels started at.
        """
        coarse = (self.progress(step) - COARSE_FROM) / (1 - COARSE_FROM)
        return at_first - min(1.0, max(0.0, coarse)) * max(0.0, at_first - 2)

    @property
    def bit_step(self) -> float:
        """The largest step of a bit depth: the way to go is the same in a run of any length."""
        return min(LARGEST_STEP, TRAVEL / max(1.0, (self.end - self.begin) * self.steps))
