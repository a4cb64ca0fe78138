"""Vectors in plain arrays: one contiguous area per scope, and a shared one for scopes of a single entry."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cachestore.entry import Vector

Found = list[tuple[int, float]]
"""Slots with their cosines."""


_GROWTH_MAX = 2048
"""Rows: new ones must be zeroed and old ones unmapped, and more at once would be felt as a pause."""


class FlatArea:
    """Vectors of one scope, contiguous, searched by one product."""

    __slots__ = ("_count", "_matrix", "_slots")

    def __init__(self, dim: int) -> None:
        self._matrix = np.zeros((0, dim), np.float32)
        self._slots = np.zeros(0, np.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self._matrix.shape[1]

    def add(self, slot: int, vector: Vector) -> int:
        """Append; returns the row."""
        if self._count == len(self._slots):
            self._resize(max(2, self._count + min(self._count // 4 + 1, _GROWTH_MAX)))
        row = self._count
        self._matrix[row] = vector
        self._slots[row] = slot
        self._count += 1
        return row

    def remove(self, row: int) -> int | None:
        """Fill the row with the last one; returns the slot that moved there, if one did."""
        last = self._count = self._count - 1
        moved = None
        if row != last:
            self._matrix[row] = self._matrix[last]
            self._slots[row] = self._slots[last]
            moved = int(self._slots[row])
        if len(self._slots) - self._count > min(self._count * 2 // 3 + 2, 2 * _GROWTH_MAX):
            self._resize(self._count + min(self._count // 8 + 2, _GROWTH_MAX))
        return moved

    def last(self, count: int) -> tuple[list[int], NDArray[np.float32]]:
        """The last rows: their slots and a copy of their vectors."""
        rows = slice(max(0, self._count - count), self._count)
        return self._slots[rows].tolist(), self._matrix[rows].copy()

    def slots(self) -> list[int]:
        """The slots of all rows, in order."""
        return [int(slot) for slot in self._slots[: self._count]]

    def search(self, vector: Vector, k: int, floor: float) -> Found:
        """The k most similar rows at or above the floor, in no order."""
        similarities = self._matrix[: self._count] @ vector
        rows = np.flatnonzero(similarities >= floor)
        if len(rows) > k:
            rows = rows[np.argpartition(-similarities[rows], k - 1)[:k]]
        return list(zip(self._slots[rows].tolist(), similarities[rows].tolist(), strict=True))

    def _resize(self, capacity: int) -> None:
        # In place (realloc moves pages, not bytes, once the area is large).
        self._matrix.resize((capacity, self.dim), refcheck=False)
        self._slots.resize(capacity, refcheck=False)


_SLAB_ROWS = 256


class Slabs:
    """One vector each for scopes of a single entry: rows of shared slabs, used again when freed.

    A slab of which every row is free is given back.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._slabs: list[NDArray[np.float32]] = []
        self._free: list[list[int]] = []
        """By slab: its free rows, numbered across all slabs."""
        self._open: dict[int, None] = {}
        """Slabs with a free row; a dict, so that the order is always the same."""

    def add(self, vector: Vector) -> int:
        """Keep a vector; returns its row."""
        slab = next(iter(self._open)) if self._open else self._begin(len(self._slabs))
        if not len(self._slabs[slab]):
            self._begin(slab)
        row = self._free[slab].pop()
        if not self._free[slab]:
            del self._open[slab]
        self.row(row)[:] = vector
        return row

    def _begin(self, slab: int) -> int:
        """Give a slab its rows."""
        if slab == len(self._slabs):
            self._slabs.append(np.empty((0, self.dim), np.float32))
            self._free.append([])
            self._open[slab] = None
        self._slabs[slab] = np.empty((_SLAB_ROWS, self.dim), np.float32)
        self._free[slab] = list(range((slab + 1) * _SLAB_ROWS - 1, slab * _SLAB_ROWS - 1, -1))
        return slab

    def remove(self, row: int) -> None:
        """Free a row."""
        slab = row // _SLAB_ROWS
        self._free[slab].append(row)
        self._open[slab] = None
        if len(self._free[slab]) == _SLAB_ROWS:
            self._slabs[slab] = np.empty((0, self.dim), np.float32)

    def held(self) -> int:
        """Rows that take up memory, free ones among them."""
        return sum(map(len, self._slabs))

    def row(self, row: int) -> Vector:
        """A view of one vector, valid until the row is freed."""
        vector: Vector = self._slabs[row // _SLAB_ROWS][row % _SLAB_ROWS]
        return vector
