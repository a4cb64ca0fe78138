"""The view of the log that memory holds: table, index, hot bodies, and the budgets that they and the log must keep.

Everything here is immediate and belongs to the event loop's thread; the store does the waiting.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from cachestore.entry import Hit, Neighbour, Vector
from cachestore.hot import HotBodies, HotBody
from cachestore.log import Loaded, Summary
from cachestore.options import StoreOptions
from cachestore.table import ENTRY_BYTES, Table
from cachestore.vectors import VectorIndex
from policies.eviction import Evictor
from policies.quota import allowances

logger = logging.getLogger("hitpath.store")

_BATCH_SHARE = 128
"""An eviction frees at least this part of its budget, so that a full store does not evict at every put."""


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits of one entry that the log does not know of yet."""

    id: int
    count: int
    last: float


class Resource(Enum):
    """What an entry takes up."""

    MEMORY = auto()
    DISK = auto()


class View:
    """What is remembered, and what it costs."""

    def __init__(self, options: StoreOptions, evictor: Evictor) -> None:
        self._options = options
        self._evictor = evictor
        self.table = Table()
        self.index = VectorIndex(lambda slot: int(self.table.id[slot]), self.table.slot_of)
        self.hot = HotBodies()
        self.charged: Counter[str] = Counter()
        self._touched: list[bytes] = []
        self._disk_limit = options.pages_budget
        self._disk_used = 0
        self._planned_memory = 0
        self._planned_disk = 0

    # Remembering and forgetting

    def remember(self, entry: Loaded, now: float) -> int:
        """Take a committed entry in; whatever had its key must have been forgotten. Returns its slot."""
        vector = entry.vector if entry.scope and entry.expires > now else None
        if vector is not None and not (self.index.fits(entry.scope, vector) and np.isfinite(vector).all()):
            logger.warning(
                "entry %d cannot be compared by meaning: its vector (of %s) is not like those of its scope",
                entry.id,
                self._options.embedder,
            )
            vector = None
        memory = footprint(entry.vector)
        slot = self.table.add(
            entry.id,
            entry.key,
            entry.scope if vector is not None else b"",
            entry.category,
            expires=entry.expires,
            memory=memory,
            disk=entry.size,
        )
        if vector is not None:
            self.index.add(entry.scope, slot, vector)
        self._evictor.admit(slot, entry.category, size=memory + entry.size, cost=entry.cost, now=entry.used)
        if entry.hits:
            self._evictor.touch(slot, entry.used, entry.hits)
        return slot

    def forget(self, slot: int) -> int:
        """Drop an entry everywhere in memory; returns its id."""
        id_ = int(self.table.id[slot])
        self._unindex(slot)
        self.hot.remove(self.table.key_of(slot))
        self._evictor.forget(slot)
        self.table.remove(slot)
        return id_

    def unindex_expired(self, now: float, limit: int) -> int:
        """Take the vectors of expired entries out of the index; the entries stay for their grace. Returns how many."""
        slots = self.table.outdated(now, limit)
        for slot in slots:
            self._unindex(slot)
        return len(slots)

    def _unindex(self, slot: int) -> None:
        scope = self.table.scope_of(slot)
        if scope:
            self.index.remove(scope, slot)
            self.table.scoped[slot] = False

    # Looking up

    def keep_hot(self, key: bytes, hit: Hit, now: float) -> HotBody | None:
        """Keep a body in memory when its entry is known and there is room; older ones give way."""
        slot = self.table.slot_of(hit.id)
        room = self._options.memory_budget - self._fixed_memory()
        if slot is None or len(hit.body) > room // 8:
            return None
        body = self.hot.add(key, hit)
        self.trim_hot(now)
        return body if self.hot.get(key) is body else None

    def count_hit(self, key: bytes, body: HotBody) -> None:
        """Note a hit on a hot body; cheap, the ranking learns of it later (`collect_hits`)."""
        if not body.hits:
            self._touched.append(key)
        body.hits += 1
        body.used = True

    def search(self, scope: bytes, vector: Vector, k: int, floor: float, now: float) -> list[Neighbour]:
        """The most similar entries that have not expired."""
        wanted = k
        while True:
            found = self.index.search(scope, vector, wanted, floor)
            alive = [(slot, cosine) for slot, cosine in found if self.table.expires[slot] > now][:k]
            # Expired entries leave the index within a sweep; until then they must not crowd out the living.
            if len(alive) == k or len(found) < wanted:
                return [Neighbour(int(self.table.id[slot]), cosine) for slot, cosine in alive]
            wanted *= 4

    def collect_hits(self, limit: int, now: float) -> list[Hits]:
        """Tell the evictor of up to `limit` entries that were hit; returns what the log should learn."""
        keys, self._touched = self._touched[:limit], self._touched[limit:]
        collected = []
        for key in keys:
            body = self.hot.get(key)
            if body is not None and body.hits:
                collected.append(self._collect(body, now))
        return collected

    def count_cold_hit(self, id: int, now: float) -> Hits:
        """Note a hit on an entry whose body is not hot."""
        slot = self.table.slot_of(id)
        if slot is not None:
            self._evictor.touch(slot, now)
        return Hits(id, 1, now)

    def _collect(self, body: HotBody, now: float) -> Hits:
        count, body.hits = body.hits, 0
        slot = self.table.slot_of(body.hit.id)
        if slot is not None:
            self._evictor.touch(slot, now, count)
        return Hits(body.hit.id, count, now)

    # Budgets

    def memory_used(self) -> int:
        """Bytes of everything that counts against the memory budget."""
        return self._fixed_memory() + self.hot.bytes

    def disk_used(self) -> int:
        """Bytes of the log, as last measured."""
        return self._disk_used

    def measured(self, disk_used: int) -> None:
        """A transaction is over and the log was measured: nothing is planned any more."""
        self._disk_used = disk_used
        self._planned_memory = self._planned_disk = 0

    def trim_hot(self, now: float) -> None:
        """Hot bodies are the first to go."""
        for _, body in self.hot.trim(self._options.memory_budget - self._fixed_memory()):
            if body.hits:
                self._collect(body, now)

    def plan(self, category: str, *, memory: int, disk: int, now: float) -> tuple[bool, list[int]]:
        """Make room for an entry that is about to be written.

        Returns whether there is room, and the ids of the entries that were forgotten for it and are now to be deleted
        from the log. When the quotas do not give enough room, no living entry is forgotten.
        """
        self._planned_memory += memory
        self._planned_disk += disk
        granted, doomed = self.relieve(now, incoming=category)
        if not granted:
            self._planned_memory -= memory
            self._planned_disk -= disk
        return granted, doomed

    def relieve(self, now: float, incoming: str | None = None) -> tuple[bool, list[int]]:
        """Bring memory and disk under their budgets; returns whether that was possible, and ids to delete."""
        doomed: list[int] = []
        if self._memory_excess() > 0 or self._disk_excess() > 0:
            doomed += self._drop(self.table.expired(now, 256))
        by_memory = self._victims(self._memory_excess(), self._options.memory_budget, Resource.MEMORY, incoming, now)
        if by_memory is None:
            return False, doomed
        freed = int(self.table.disk[by_memory].sum())
        by_disk = self._victims(self._disk_excess() - freed, self._disk_limit, Resource.DISK, incoming, now)
        if by_disk is None:
            return False, doomed
        doomed += self._drop(sorted({*by_memory, *by_disk}))
        self.trim_hot(now)
        return True, doomed

    def _drop(self, slots: list[int]) -> list[int]:
        # The file is measured after every commit; until then what is to be deleted counts as free.
        self._disk_used -= int(self.table.disk[slots].sum())
        return [self.forget(slot) for slot in slots]

    def _victims(
        self, excess: int, limit: int, resource: Resource, incoming: str | None, now: float
    ) -> list[int] | None:
        """Slots whose bytes cover the excess, None when the quotas forbid it."""
        if excess <= 0:
            return []
        match resource:
            case Resource.MEMORY:
                sizes, usage = self.table.memory, self.table.memory_by_category
            case Resource.DISK:
                sizes, usage = self.table.disk, self.table.disk_by_category
        rounds = allowances(usage, self._options.quotas, limit, incoming)
        slots = self._evictor.victims(rounds[:2], sizes, max(excess, limit // _BATCH_SHARE), now)
        if sizes[slots].sum() < excess:
            slots = self._evictor.victims(rounds, sizes, excess, now)
        return slots if sizes[slots].sum() >= excess else None

    def _fixed_memory(self) -> int:
        return self.table.memory_by_category.total() + self.charged.total()

    def _memory_excess(self) -> int:
        return self._fixed_memory() + self._planned_memory - self._options.memory_budget

    def _disk_excess(self) -> int:
        return self._disk_used + self._planned_disk - self._disk_limit

    # Checking

    def check(self, log: list[Summary], deleting: set[int]) -> list[str]:
        """Rows against memory; `deleting` are rows that memory forgot and the log is still to delete."""
        found = self.table.check()
        known = {int(self.table.id[slot]): slot for slot in self.table}
        rows = {row.id: row for row in log if row.id not in deleting}
        found += [f"entry {id_} is in the log but not in memory" for id_ in rows.keys() - known.keys()]
        found += [f"entry {id_} is in memory but not in the log" for id_ in known.keys() - rows.keys()]
        for id_ in rows.keys() & known.keys():
            row, slot = rows[id_], known[id_]
            same = (row.key, row.category, row.size) == (
                self.table.key_of(slot),
                self.table.category_of(slot),
                int(self.table.disk[slot]),
            )
            if not same:
                found.append(f"entry {id_} differs between log and memory")
        found += self._check_index()
        if len(self._evictor) != len(self.table):
            found.append(f"the evictor knows {len(self._evictor)} entries of {len(self.table)}")
        if self.hot.bytes != sum(body.bytes for _, body in self.hot):
            found.append("the byte counter of the hot bodies is wrong")
        found += [f"hot body of unknown entry {body.hit.id}" for _, body in self.hot if body.hit.id not in known]
        return found

    def _check_index(self) -> list[str]:
        indexed = Counter(self.index.check())
        expected = Counter((self.table.scope_of(slot), slot) for slot in self.table if self.table.scoped[slot])
        wrong = (indexed - expected) + (expected - indexed)
        return [f"slot {slot} is in the index or in the table, not once in both" for _, slot in wrong]


def footprint(vector: Vector | None) -> int:
    """Bytes of memory that an entry costs beside its hot body: its place in the tables and its vector's in the index.

    The vector counts with the links of a graph and with the slack and the deleted elements that graphs and growing
    arrays carry, so that the budget holds whichever form the scope has.
    """
    return ENTRY_BYTES + (0 if vector is None else vector.nbytes * 5 // 4 + 256)
