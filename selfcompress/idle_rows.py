"""Rows that have bits and yet quantise to nothing but zeros: in the end they lose their bits.

One step may round a row to zeros and the next wake it up; a row that was zero at every step between
two cuts is given up.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfcompress.layers.quantized import QuantizedLayer


class IdleRows:
    """The rows that have been zero at every step since the last `look`.

    Args:
        layers: by name, those whose rows can go.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self.layers = layers
        self.look()

    @torch.no_grad()
    def look(self) -> None:
        """Begin anew with the rows that are zero now."""
        self.load(
            {
                name: (layer.zero_rows() & layer.live_rows()).nonzero().flatten()
                for name, layer in self.layers.items()
            }
        )

    @torch.no_grad()
    def update(self) -> None:
        """Note which have woken up. Nothing is read, as a GPU would be waited for."""
        for name, rows in self._rows.items():
            if len(rows):
                woken = ~self.layers[name].zero_rows(among=rows)
                self._awake[name] = self._awake[name].to(woken.device) | woken

    def still(self) -> dict[str, Tensor]:
        """(rows,) int64 by layer: those that have not."""
        # The model may have moved to another device since.
        asleep = {name: ~awake.to(self._rows[name].device) for name, awake in self._awake.items()}
        return {name: rows[asleep[name]] for name, rows in self._rows.items()}

    @torch.no_grad()
    def give_up(self) -> None:
        """Take the bits of those that have not."""
        for name, rows in self.still().items():
            depth = self.layers[name].bit_depth
            depth.index_fill_(0, rows.to(depth.device), 0)

    def load(self, rows: Mapping[str, Tensor]) -> None:
        """Take up what `still` was."""
        self._rows = {n: r.to(self.layers[n].bit_depth.device) for n, r in rows.items()}
        self._awake = {n: torch.zeros_like(r, dtype=torch.bool) for n, r in self._rows.items()}
