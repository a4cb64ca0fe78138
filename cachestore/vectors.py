"""The index: vectors by scope, in memory only. The store calls it from the event loop."""

from __future__ import annotations

import numpy as np

from cachestore.entry import Vector

Found = list[tuple[int, float]]
"""Slots with their cosines, most similar first."""


class FlatScope:
    """The vectors of one scope in one contiguous area, searched flat."""

    __slots__ = ("_count", "_matrix", "_slots")

    def __init__(self, dim: int) -> None:
        self._matrix = np.zeros((0, dim), np.float32)
        self._slots = np.zeros(0, np.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, slot: int, vector: Vector) -> int:
        """Append; returns the row."""
        if self._count == len(self._slots):
            capacity = max(2, self._count * 5 // 4 + 1)
            self._matrix.resize((capacity, self._matrix.shape[1]), refcheck=False)
            self._slots.resize(capacity, refcheck=False)
        self._matrix[self._count] = vector
        self._slots[self._count] = slot
        self._count += 1
        return self._count - 1

    def remove(self, row: int) -> int | None:
        """Fill the row with the last one; returns the slot that moved there, if one did."""
        last = self._count = self._count - 1
        if row == last:
            return None
        self._matrix[row] = self._matrix[last]
        self._slots[row] = self._slots[last]
        return int(self._slots[row])

    def slots(self) -> list[int]:
        """The slots of all rows, in order."""
        return [int(slot) for slot in self._slots[: self._count]]

    def search(self, vector: Vector, k: int, floor: float) -> Found:
        """The k most similar rows at or above the floor."""
        similarities = self._matrix[: self._count] @ vector
        rows = np.flatnonzero(similarities >= floor)
        if len(rows) > k:
            rows = rows[np.argpartition(-similarities[rows], k - 1)[:k]]
        rows = rows[np.argsort(-similarities[rows], kind="stable")]
        return list(zip(self._slots[rows].tolist(), similarities[rows].tolist(), strict=True))


class VectorIndex:
    """All scopes."""

    def __init__(self) -> None:
        self._scopes: dict[bytes, FlatScope] = {}
        self._row = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._scopes)

    def has(self, scope: bytes) -> bool:
        """Whether the scope holds anything."""
        return scope in self._scopes

    def add(self, scope: bytes, slot: int, id: int, vector: Vector) -> None:
        """Put a vector under a slot that is not in the index."""
        area = self._scopes.get(scope)
        if area is None:
            area = self._scopes[scope] = FlatScope(len(vector))
        if slot >= len(self._row):
            self._row.resize(max(256, slot + 1, len(self._row) * 9 // 8), refcheck=False)
        self._row[slot] = area.add(slot, vector)

    def remove(self, scope: bytes, slot: int) -> None:
        """Take a slot's vector out."""
        area = self._scopes[scope]
        row = int(self._row[slot])
        moved = area.remove(row)
        if moved is not None:
            self._row[moved] = row
        if not len(area):
            del self._scopes[scope]

    def search(self, scope: bytes, vector: Vector, k: int, floor: float) -> Found:
        """The k most similar slots of a scope at or above the floor."""
        area = self._scopes.get(scope)
        return [] if area is None else area.search(vector, k, floor)

    def slots(self) -> dict[bytes, list[int]]:
        """Every scope's slots, for `check()`."""
        return {scope: area.slots() for scope, area in self._scopes.items()}
