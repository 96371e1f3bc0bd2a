"""Channel ids while a graph is built: they are made, found to be the same, and frozen.

An *id* is the number of a channel. Every position of every tensor has one (see `channels.py` for
positions), and positions with the same id are of the same channel. A *frozen* id is never removed.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ids = np.ndarray  # (positions,) int64: the channel id of each position


class ChannelIds:
    """All channel ids, the pairs of them that are the same, and why some are frozen."""

    def __init__(self) -> None:
        self.count = 0
        self._unions: list[tuple[Ids, Ids]] = []
        self._freezes: list[tuple[Ids, str]] = []

    def new(self, count: int) -> Ids:
        """Return (count,) new ids."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def unite(self, a: Ids, b: Ids) -> None:
        """Record that `a[i]` and `b[i]` are the same channel, for every i."""
        self._unions.append((a, b))

    def freeze(self, ids: Ids, why: str) -> None:
        """Record that these channels are never to be removed, and why."""
        self._freezes.append((ids, why))

    def resolved(self) -> tuple[Ids, np.ndarray, dict[int, str]]:
        """Renumber the ids, with a single one for channels that are the same.

        Returns:
            (ids made,) int64, the new id of each; (new ids,) bool, whether each is frozen; and new
            frozen id → the first reason.
        """
        a = np.concatenate([np.zeros(0, np.int64), *(a for a, _ in self._unions)])
        b = np.concatenate([np.zeros(0, np.int64), *(b for _, b in self._unions)])
        shape = (self.count, self.count)
        pairs = coo_array((np.ones(len(a), bool), (a, b)), shape=shape)
        root = connected_components(pairs, directed=False)[1].astype(np.int64)
        frozen = np.zeros(root.max(initial=-1) + 1, bool)
        reasons: dict[int, str] = {}
        for ids, why in self._freezes:
            for i in np.unique(root[ids]).tolist():
                frozen[i] = True
                reasons.setdefault(i, why)
        return root, frozen, reasons
