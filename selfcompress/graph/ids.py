"""The numbers of channels while a graph is built: made, found to be the same, and frozen."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ids = np.ndarray  # (positions,) int64


class ChannelIds:
    """A union-find over channel ids, with the reasons why some of them may never go."""

    def __init__(self) -> None:
        self.count = 0
        self._unions: list[tuple[Ids, Ids]] = []
        self._freezes: list[tuple[Ids, str]] = []

    def new(self, count: int) -> Ids:
        """(count,) ids that nothing else has."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def unite(self, a: Ids, b: Ids) -> None:
        """Have the channels `a` be the channels `b`, one by one."""
        self._unions.append((a, b))

    def freeze(self, ids: Ids, why: str) -> None:
        """Have these channels stay."""
        self._freezes.append((ids, why))

    def resolved(self) -> tuple[Ids, np.ndarray, dict[int, str]]:
        """What has come of it, with one id for channels that are the same.

        Returns:
            (ids made,) the id that each one is now; (ids now,) bool, whether it is frozen; and of
            those that are, the first reason.
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
