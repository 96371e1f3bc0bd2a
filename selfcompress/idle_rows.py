"""Find rows that have bits but quantise to all zeros ("idle" rows), and take their bits away.

Rounding can make a row zero at one step and not at the next, so only a row that was zero at every
step between two cuts loses its bits. In the code, `woken` and `_awake` mark rows that have
quantised to something else at some step; all others are `asleep`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfcompress.layers.quantized import QuantizedLayer


class IdleRows:
    """Tracks the rows that have quantised to all zeros at every step since the last `look`.

    Args:
        layers: the quantised layers to watch, by name.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self.layers = layers
        self.look()

    @torch.no_grad()
    def look(self) -> None:
        """Start tracking anew, with the rows that have bits and quantise to all zeros now."""
        self.load(
            {
                name: (layer.zero_rows() & layer.live_rows()).nonzero().flatten()
                for name, layer in self.layers.items()
            }
        )

    @torch.no_grad()
    def update(self) -> None:
        """Note which tracked rows no longer quantise to all zeros; call this after every step.

        No values are read, because that would wait for the GPU.
        """
        for name, rows in self._rows.items():
            if len(rows):
                woken = ~self.layers[name].zero_rows(among=rows)
                self._awake[name] = self._awake[name].to(woken.device) | woken

    def still(self) -> dict[str, Tensor]:
        """Return, by layer name, (rows,) int64: rows that were zero at every step since `look`."""
        # The model may have moved to another device in the meantime.
        asleep = {name: ~awake.to(self._rows[name].device) for name, awake in self._awake.items()}
        return {name: rows[asleep[name]] for name, rows in self._rows.items()}

    @torch.no_grad()
    def give_up(self) -> None:
        """Set the bit depth of all rows in `still()` to 0."""
        for name, rows in self.still().items():
            depth = self.layers[name].bit_depth
            depth.index_fill_(0, rows.to(depth.device), 0)

    def load(self, rows: Mapping[str, Tensor]) -> None:
        """Track the given rows, layer name → (rows,) int64, such as a saved result of `still`."""
        self._rows = {n: r.to(self.layers[n].bit_depth.device) for n, r in rows.items()}
        self._awake = {n: torch.zeros_like(r, dtype=torch.bool) for n, r in self._rows.items()}
