"""Parse the size of a file as people write it, such as 150KB or 3%."""

import math
import re
from dataclasses import dataclass

_MOST = 1e18  # bytes or percent; far larger sizes would overflow floats
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}


@dataclass(frozen=True)
class FileSize:
    """The size of a file, in bytes or in percent of the starting weights at 32 bits."""

    amount: float
    unit: str  # B or %

    @classmethod
    def parse(cls, text: str) -> "FileSize":
        """Parse a size such as 150KB, 1.5 MB, 20000 (bytes; 1 KB is 1,000 bytes) or 3%.

        Raises:
            ValueError: `text` is no such size, is zero, or is above 10^18 bytes or percent.
        """
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmg]?b|%|)\s*", text, re.IGNORECASE)
        if not match or float(match[1]) == 0:
            raise ValueError(f"{text!r} is no size: give one such as 150KB, 1.5MB, 20000 or 3%")
        size = cls(float(match[1]), "%")
        if match[2] != "%":
            size = cls(size.amount * _UNITS[match[2].lower()], "B")
        if size.amount > _MOST:
            raise ValueError(f"{text.strip()[:9]}… is above {_MOST:g} {size.unit}: ask for less")
        return size

    def bytes(self, float_bits: int) -> int:
        """Return the size in bytes, rounded down, for a network of `float_bits` at the start."""
        share = self.amount / 100 * float_bits / 8 if self.unit == "%" else self.amount
        return math.floor(share)

    def __str__(self) -> str:
        return f"{self.amount:.15g}{self.unit}"
