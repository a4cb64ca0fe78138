"""The index: forms of a scope, pouring into graphs, retiring them. Driven by hand, without a store."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachestore import Filter
from cachestore.flat import FlatArea, Slabs
from cachestore.vectors import VectorIndex
from tests.cachestore.samples import digest, document, open_store, put

DIM = 32
SCOPE = digest("scope")


class Harness:
    """An index, the ids of its slots, and a plain copy of what it should hold."""

    def __init__(self) -> None:
        self.ids: dict[int, int] = {}
        self.slots: dict[int, int] = {}
        self.vectors: dict[int, NDArray[np.float32]] = {}
        self.index = VectorIndex(self.ids.__getitem__, self.slots.get)
        self.random = np.random.default_rng(1)
        self._free: list[int] = []
        self._last = 0

    def draw(self) -> NDArray[np.float32]:
        drawn = self.random.standard_normal(DIM).astype(np.float32)
        unit: NDArray[np.float32] = drawn / np.linalg.norm(drawn)
        return unit

    def add(self, scope: bytes = SCOPE) -> int:
        self._last += 1
        slot = self._free.pop() if self._free else len(self.ids)
        self.ids[slot], self.slots[self._last], self.vectors[slot] = self._last, slot, self.draw()
        self.index.add(scope, slot, self.vectors[slot])
        return slot

    def remove(self, slot: int, scope: bytes = SCOPE) -> None:
        self.index.remove(scope, slot)
        del self.slots[self.ids.pop(slot)]
        del self.vectors[slot]
        self.ids.setdefault(slot, 0)
        self._free.append(slot)

    def settle(self) -> int:
        """Pour and retire until there is nothing left to do; returns the number of pours."""
        pours = 0
        while True:
            retired = self.index.retire_some()
            pour = self.index.next_pour()
            if pour is not None:
                pour.run()
                self.index.finish(pour)
                pours += 1
            elif not retired:
                assert not self.index.unsettled
                return pours

    def recall(self, queries: int = 200) -> float:
        slots = np.array(list(self.vectors))
        matrix = np.stack(list(self.vectors.values()))
        right = 0
        for _ in range(queries):
            query = self.draw()
            [(slot, cosine), *_] = self.index.search(SCOPE, query, 3, -1.0)
            right += slot == slots[np.argmax(matrix @ query)]
            assert abs(cosine - float(self.vectors[slot] @ query)) < 1e-5
        return right / queries

    def check(self) -> None:
        assert sorted(slot for _, slot in self.index.check()) == sorted(self.vectors)


def test_a_scope_of_one_then_two_then_none() -> None:
    harness = Harness()
    first = harness.add()
    assert harness.index.search(SCOPE, harness.vectors[first], 3, 0.99)[0][0] == first
    assert harness.index.search(SCOPE, -harness.vectors[first], 3, 0.0) == []
    second = harness.add()
    harness.check()
    assert harness.index.search(SCOPE, harness.vectors[first], 3, 0.99)[0][0] == first
    harness.remove(first)
    assert harness.index.search(SCOPE, harness.vectors[second], 3, 0.99)[0][0] == second
    harness.remove(second)
    assert not harness.index.has(SCOPE)
    assert len(harness.index) == 0


def test_rows_of_single_scopes_are_used_again() -> None:
    slabs = Slabs(4)
    rows = [slabs.add(np.full(4, n, np.float32)) for n in range(1024)]
    assert len(set(rows)) == 1024
    for row in rows[:500]:
        slabs.remove(row)
    assert slabs.held() == 3 * 256, "a slab that is free is given back"
    again = {slabs.add(np.full(4, -1.0, np.float32)) for _ in range(500)}
    assert again == set(rows[:500])
    assert slabs.held() == 4 * 256
    assert all(slabs.row(row)[0] == n for n, row in enumerate(rows[500:], start=500))


def test_a_flat_area_under_random_additions_and_removals() -> None:
    area, model, chance = FlatArea(2), list[int](), random.Random(2)
    for slot in range(3000):
        if model and chance.random() < (0.3 if slot < 1500 else 0.7):
            row = chance.randrange(len(model))
            moved = area.remove(row)
            last = model.pop()
            assert moved == (last if row < len(model) else None)
            if moved is not None:
                model[row] = last
        else:
            assert area.add(slot, np.array([slot, 1], np.float32)) == len(model)
            model.append(slot)
        assert len(area) == len(model)
    assert area.slots() == model
    assert sorted(area.search(np.array([1, 0], np.float32), 5000, -1.0)) == sorted((n, float(n)) for n in model)


def test_a_large_scope_is_poured_into_graphs_and_each_vector_is_there_once() -> None:
    harness = Harness()
    for _ in range(6000):
        harness.add()
    assert harness.index.unsettled
    assert harness.settle() > 10
    harness.check()
    assert harness.recall() >= 0.98


def test_what_is_forgotten_or_replaced_while_it_is_poured() -> None:
    harness = Harness()
    for _ in range(5000):
        harness.add()
    pour = harness.index.next_pour()
    assert pour is not None
    gone, kept = pour.slots[:50], pour.slots[50:]
    for slot in gone:
        harness.remove(slot)
    for _ in range(30):
        assert harness.add() in gone, "a slot comes back as another entry"
    pour.run()
    assert harness.index.search(SCOPE, harness.vectors[kept[0]], 1, 0.99)[0][0] == kept[0]
    harness.index.finish(pour)
    harness.check()
    harness.settle()
    harness.check()
    for slot in list(harness.vectors)[::50]:
        assert harness.index.search(SCOPE, harness.vectors[slot], 1, 0.99)[0][0] == slot


def test_a_scope_that_ends_while_it_is_poured() -> None:
    harness = Harness()
    for _ in range(5000):
        harness.add()
    pour = harness.index.next_pour()
    assert pour is not None
    for slot in list(harness.vectors):
        harness.remove(slot)
    again = harness.add()
    pour.run()
    harness.index.finish(pour)
    harness.check()
    assert [slot for slot, _ in harness.index.search(SCOPE, harness.vectors[again], 5, -1.0)] == [again]


def test_recall_survives_churn_and_sparse_graphs_are_retired() -> None:
    harness = Harness()
    for _ in range(8000):
        harness.add()
    harness.settle()
    for _ in range(2):
        for slot in list(harness.vectors)[::2]:
            harness.remove(slot)
        for _ in range(4000):
            harness.add()
        harness.settle()
    harness.check()
    assert harness.recall() >= 0.98
    for slot in list(harness.vectors)[:-3]:
        harness.remove(slot)
    harness.settle()
    harness.check()
    assert len(harness.index.search(SCOPE, harness.draw(), 9, -1.0)) == 3


async def test_the_store_pours_by_itself_and_answers_meanwhile(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    for start in range(0, 5000, 250):
        await asyncio.gather(*(put(store, document(n)) for n in range(start, start + 250)))
    wanted = document(17).vector
    assert wanted is not None
    while store.pouring:
        assert (await store.fetch(store.search(digest("scope"), wanted, 1, 0.99)[0].id)) is not None
        await asyncio.sleep(0)
    assert await store.check() == []
    purged = await store.purge(Filter(contains="7"))
    assert store.search(digest("scope"), wanted, 1, 0.99) == []
    assert store.stats().entries == 5000 - len(purged)
    await store.close()
