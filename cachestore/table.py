"""What memory knows of every entry: columns indexed by slot, and two maps that find the slot by key and by id."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

ENTRY_BYTES = 520
"""What an entry's place in the columns, the maps and the evictor costs, with the slack of growing tables."""


class Table:
    """Slots are small, dense and used again; ids are not."""

    def __init__(self) -> None:
        self.id = np.zeros(0, np.int64)
        """By slot: the entry's id, 0 when the slot is free."""
        self.key = np.zeros((0, 16), np.uint8)
        self.scope = np.zeros((0, 16), np.uint8)
        self.scoped = np.zeros(0, np.bool_)
        """By slot: whether the entry has a vector in the index."""
        self.expires = np.zeros(0)
        self.memory = np.zeros(0, np.int64)
        self.disk = np.zeros(0, np.int64)
        self._category = np.zeros(0, np.int32)
        self._categories: dict[str, int] = {}
        self._names: list[str] = []
        self._by_key: dict[bytes, int] = {}
        self._by_id: dict[int, int] = {}
        self._free: list[int] = []
        self._next = 0
        self.memory_by_category: Counter[str] = Counter()
        self.disk_by_category: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[int]:
        """The slots in use."""
        return iter(self._by_id.values())

    def add(self, id: int, key: bytes, scope: bytes, category: str, *, expires: float, memory: int, disk: int) -> int:
        """Give an entry a slot; its key and id must be new."""
        slot = self._free.pop() if self._free else self._next
        if slot == self._next:
            self._next += 1
            if slot >= len(self.id):
                self._grow(max(256, len(self.id) * 9 // 8))
        # One int object serves both maps.
        self._by_key[key] = self._by_id[id] = slot
        self.id[slot] = id
        self.key[slot] = np.frombuffer(key, np.uint8)
        self.scoped[slot] = bool(scope)
        self.scope[slot] = np.frombuffer(scope, np.uint8) if scope else 0
        self.expires[slot] = expires
        self.memory[slot] = memory
        self.disk[slot] = disk
        self._category[slot] = self._category_number(category)
        self.memory_by_category[category] += memory
        self.disk_by_category[category] += disk
        return slot

    def remove(self, slot: int) -> None:
        """Take an entry out; its slot may come back as another."""
        category = self.category_of(slot)
        self.memory_by_category[category] -= int(self.memory[slot])
        self.disk_by_category[category] -= int(self.disk[slot])
        del self._by_key[self.key_of(slot)]
        del self._by_id[int(self.id[slot])]
        self.id[slot] = 0
        self.expires[slot] = 0.0
        self._free.append(slot)

    def find(self, key: bytes) -> int | None:
        """The slot under a key."""
        return self._by_key.get(key)

    def slot_of(self, id: int) -> int | None:
        """The slot of an id."""
        return self._by_id.get(id)

    def key_of(self, slot: int) -> bytes:
        """The exact key of an entry."""
        return bytes(self.key[slot])

    def scope_of(self, slot: int) -> bytes:
        """The scope of an entry; empty when it is in no scope."""
        return bytes(self.scope[slot]) if self.scoped[slot] else b""

    def category_of(self, slot: int) -> str:
        """The category of an entry."""
        return self._names[int(self._category[slot])]

    def expired(self, before: float, limit: int) -> list[int]:
        """Up to `limit` slots whose entries expired before a time."""
        slots = np.flatnonzero((self.expires[: self._next] <= before) & (self.id[: self._next] != 0))
        return [int(slot) for slot in slots[:limit]]

    def outdated(self, now: float, limit: int) -> list[int]:
        """Up to `limit` slots whose entries expired and whose vectors are still in the index."""
        used = self._next
        slots = np.flatnonzero(self.scoped[:used] & (self.expires[:used] <= now) & (self.id[:used] != 0))
        return [int(slot) for slot in slots[:limit]]

    def check(self) -> list[str]:
        """Maps against columns against counters."""
        found = []
        memory: Counter[str] = Counter()
        disk: Counter[str] = Counter()
        for slot in self:
            memory[self.category_of(slot)] += int(self.memory[slot])
            disk[self.category_of(slot)] += int(self.disk[slot])
            if self.find(self.key_of(slot)) != slot or self.slot_of(int(self.id[slot])) != slot:
                found.append(f"slot {slot} is not found under its own key and id")
        if len(self._by_key) != len(self._by_id) or len(self) + len(self._free) != self._next:
            found.append(f"{len(self._by_key)} keys, {len(self)} ids, {len(self._free)} of {self._next} slots free")
        if +self.memory_by_category != +memory or +self.disk_by_category != +disk:
            found.append("the byte counters of the categories do not add up")
        return found

    def _category_number(self, category: str) -> int:
        number = self._categories.get(category)
        if number is None:
            number = self._categories[sys.intern(category)] = len(self._names)
            self._names.append(category)
        return number

    def _grow(self, length: int) -> None:
        # In place (realloc): a copy of every column would be a pause and twice the memory. Nothing outside keeps views.
        for column in self._columns():
            column.resize((length, *column.shape[1:]), refcheck=False)

    def _columns(self) -> list[NDArray[np.generic]]:
        return [self.id, self.key, self.scope, self.scoped, self.expires, self.memory, self.disk, self._category]
