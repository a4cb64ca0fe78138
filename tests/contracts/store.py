"""What every store must do, whatever its log is kept in; a test class for a store inherits from this one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachestore import Filter, Store
from policies.reasons import NotStored
from tests.cachestore.samples import NOW, ManualClock, digest, document, put, vector


class StoreContract:
    async def open(self, directory: Path, clock: ManualClock, **options: Any) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    async def store(self, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Store]:
        store = await self.open(tmp_path, clock)
        yield store
        assert await store.check() == []
        await store.close()

    async def test_what_was_put_is_found_by_key_by_meaning_and_by_id(self, store: Store) -> None:
        wanted = document("a")
        id_ = await put(store, wanted)
        hit = store.hot(wanted.key)
        assert hit is not None
        assert (hit.id, hit.body, hit.text, hit.category) == (id_, wanted.body, wanted.text, "code")
        assert (hit.endpoint, hit.upstream, hit.created, hit.expires) == ("chat", "local", NOW, NOW + 1000)
        assert await store.get(wanted.key) == hit
        assert await store.fetch(id_) == hit
        assert wanted.vector is not None
        [neighbour] = store.search(wanted.scope, wanted.vector, 3, 0.9)
        assert neighbour.id == id_
        assert neighbour.similarity == pytest.approx(1.0, abs=1e-5)

    async def test_absent(self, store: Store) -> None:
        assert store.hot(digest("no")) is None
        assert await store.get(digest("no")) is None
        assert await store.fetch(77) is None
        assert not store.has_scope(digest("scope"))
        assert store.search(digest("scope"), vector(1), 3, -1.0) == []

    async def test_the_newest_of_a_key_replaces_the_older(self, store: Store) -> None:
        first = await put(store, document("a", body=b"old"))
        second = await put(store, document("a", body=b"new"))
        assert first != second
        assert await store.fetch(first) is None
        hit = await store.get(digest("a"))
        assert hit is not None
        assert hit.body == b"new"
        assert [neighbour.id for neighbour in store.search(digest("scope"), vector(1), 9, -1.0)] == [second]

    async def test_equal_keys_in_one_group(self, store: Store) -> None:
        outcomes = await asyncio.gather(*(store.put(document("a", body=b"%d" % n)) for n in range(20)))
        assert len(set(outcomes)) == 20
        hit = await store.get(digest("a"))
        assert hit is not None
        assert hit.id == max(outcome for outcome in outcomes if isinstance(outcome, int))
        assert store.stats().entries == 1

    async def test_neighbours_come_from_the_same_scope_most_similar_first(self, store: Store) -> None:
        vectors = [vector(n) for n in range(30)]
        ids = [await put(store, document(n, vector=vectors[n])) for n in range(30)]
        await put(store, document("elsewhere", scope=digest("other"), vector=vectors[3]))
        found = store.search(digest("scope"), vectors[3], 5, -1.0)
        cosines = np.array([v @ vectors[3] for v in vectors])
        assert [n.id for n in found] == [ids[i] for i in np.argsort(-cosines)[:5]]
        assert store.search(digest("scope"), vectors[3], 5, 0.999)[0].id == ids[3]
        assert len(store.search(digest("scope"), vectors[3], 5, 0.999)) == 1

    async def test_a_document_without_scope_or_vector_is_never_compared(self, store: Store) -> None:
        await put(store, document("a", scope=b""))
        await put(store, document("b", vector=None))
        assert not store.has_scope(digest("scope"))
        assert not store.has_scope(b"")
        assert await store.get(digest("a")) is not None

    async def test_vectors_that_do_not_belong_are_not_compared(self, store: Store) -> None:
        await put(store, document("a"))
        await put(store, document("b", vector=vector(1, dim=8)))
        await put(store, document("c", vector=np.full(16, np.nan, np.float32)))
        await put(store, document("d", vector=vector(2, dim=8), scope=digest("of eight")))
        assert len(store.search(digest("scope"), vector(1), 9, -1.0)) == 1
        assert store.search(digest("scope"), vector(1, dim=8), 9, -1.0) == []
        assert len(store.search(digest("of eight"), vector(2, dim=8), 9, -1.0)) == 1
        assert await store.get(digest("b")) is not None

    async def test_expired_is_never_served_but_within_a_grace_that_is_asked_for(
        self, store: Store, clock: ManualClock
    ) -> None:
        id_ = await put(store, document("a", expires=NOW + 10))
        clock.advance(10)
        for _ in range(2):
            assert store.hot(digest("a")) is None
            assert await store.get(digest("a")) is None
            assert await store.fetch(id_) is None
            assert store.search(digest("scope"), vector(1), 9, -1.0) == []
            stale = await store.get(digest("a"), grace=50)
            assert stale is not None
            assert stale.id == id_
            await store.sweep()
        assert not store.has_scope(digest("scope"))
        clock.advance(101)
        await store.sweep()
        assert await store.get(digest("a"), grace=1000) is None
        assert (store.stats().entries, store.stats().expired) == (0, 1)

    async def test_expired_neighbours_do_not_crowd_out_the_living(self, store: Store, clock: ManualClock) -> None:
        for n in range(20):
            await put(store, document(n, vector=vector(1), expires=NOW + 10))
        alive = await put(store, document("alive", vector=vector(2)))
        clock.advance(20)
        assert [n.id for n in store.search(digest("scope"), vector(1), 1, -1.0)] == [alive]

    async def test_refusals(self, store: Store, clock: ManualClock) -> None:
        assert await store.put(document("a", body=b"x" * (1 << 20) + b"x")) is NotStored.TOO_LARGE
        assert await store.put(document("a", expires=NOW)) is NotStored.EXPIRED_AT_ONCE
        malformed: tuple[dict[str, Any], ...] = (
            {"key": b"short"},
            {"scope": b"short"},
            {"expires": float("nan")},
            {"created": float("inf")},
            {"vector": np.zeros((2, 16), np.float32)},
        )
        for changes in malformed:
            assert await store.put(document("a", **changes)) is NotStored.MALFORMED
        assert store.stats().entries == 0

    async def test_purge_takes_what_the_filter_means_and_nothing_else(self, store: Store) -> None:
        changed: dict[str, dict[str, Any]] = {
            "a": {},
            "b": {"category": "chat"},
            "c": {"namespace": "others"},
            "d": {"model": "model-b"},
            "e": {"text": "Wie schön ist SCHNEE?"},
            "f": {"body": b'{"x": "caf\\u00e9"}'},
        }
        for name, changes in changed.items():
            await put(store, document(name, **changes))
        ids = dict(zip("abcdef", range(1, 7), strict=True))
        for filter_, names in (
            (Filter(category="chat"), "b"),
            (Filter(namespace="others"), "c"),
            (Filter(model="model-b"), "d"),
            (Filter(contains="SCHÖN"), "e"),
            (Filter(contains="Café"), "f"),
            (Filter(contains='"answer": "a"'), "a"),
            (Filter(ids=(1, 2, 99)), "ab"),
            (Filter(category="code", namespace="team", contains="question", ids=(4, 6)), "df"),
            (Filter(category="none"), ""),
            (Filter(), "abcdef"),
        ):
            assert await store.purge(filter_, dry_run=True) == [ids[name] for name in names]
            assert len(await store.entries(filter_, limit=10)) == len(names)
        assert await store.purge(Filter(category="chat")) == [ids["b"]]
        assert await store.get(digest("b")) is None
        assert await store.purge(Filter(contains="schnee")) == [ids["e"]]
        assert await store.purge(Filter()) == [ids[name] for name in "acdf"]
        assert store.stats().entries == 0
        assert not store.has_scope(digest("scope"))

    async def test_a_purge_judges_what_was_put_before_it(self, store: Store) -> None:
        putting = [asyncio.create_task(store.put(document(n))) for n in range(50)]
        await asyncio.sleep(0)
        purged = await store.purge(Filter())
        assert sorted(await asyncio.gather(*putting)) == purged
        assert store.stats().entries == 0

    async def test_entries_newest_first_with_bodies_on_demand(self, store: Store) -> None:
        for n in range(5):
            await put(store, document(n))
        rows = await store.entries(Filter(), limit=2, offset=1)
        assert [row.id for row in rows] == [4, 3]
        assert rows[0].body is None
        assert (rows[0].key, rows[0].namespace, rows[0].text) == (digest(3), "team", "question 3")
        assert (await store.entries(Filter(ids=(1,)), limit=1, bodies=True))[0].body == document(0).body

    async def test_everything_survives_a_restart(self, tmp_path: Path, clock: ManualClock) -> None:
        store = await self.open(tmp_path / "s", clock)
        bodies = {n: (f"{n} " * 200).encode() + bytes(range(256)) for n in range(40)}
        ids = {n: await put(store, document(n, body=bodies[n])) for n in bodies}
        await store.purge(Filter(ids=(ids[7],)))
        await store.close()
        store = await self.open(tmp_path / "s", clock)
        assert await store.get(digest(7)) is None
        for n in bodies.keys() - {7}:
            hit = await store.get(digest(n))
            assert hit is not None
            assert (hit.id, hit.body) == (ids[n], bodies[n])
            stored = document(n).vector
            assert stored is not None
            assert store.search(digest("scope"), stored, 1, 0.99)[0].id == ids[n]
        assert await put(store, document("new")) > max(ids.values())
        assert await store.check() == []
        await store.close()

    async def test_a_cancelled_put_is_whole_or_not_at_all(self, store: Store) -> None:
        tasks = [asyncio.create_task(store.put(document(n))) for n in range(100)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, int) for outcome in outcomes[1::2])
        await put(store, document("after"))
        for n in range(100):
            hit = await store.get(digest(n))
            assert (hit is not None and hit.body == document(n).body) or (hit is None and n % 2 == 0)

    async def test_a_cancelled_purge_is_finished_all_the_same(self, store: Store) -> None:
        for n in range(20):
            await put(store, document(n))
        purge = asyncio.create_task(store.purge(Filter()))
        await asyncio.sleep(0)
        purge.cancel()
        await asyncio.gather(purge, return_exceptions=True)
        assert await store.check() == []
        assert store.stats().entries == 0
        assert store.hot(digest(3)) is None

    async def test_more_than_may_wait_is_refused(self, tmp_path: Path, clock: ManualClock) -> None:
        store = await self.open(tmp_path / "busy", clock, max_waiting=10)
        outcomes = await asyncio.gather(*(store.put(document(n)) for n in range(30)))
        assert outcomes.count(NotStored.STORE_BUSY) == 20
        assert store.stats().entries == 10
        await store.close()

    async def test_a_closed_store_refuses(self, tmp_path: Path, clock: ManualClock) -> None:
        store = await self.open(tmp_path / "closed", clock)
        waiting = [asyncio.create_task(store.put(document(n))) for n in range(5)]
        await asyncio.sleep(0)
        await store.close()
        await store.close()
        assert all(isinstance(outcome, int) for outcome in await asyncio.gather(*waiting))
        assert await store.put(document("late")) is NotStored.STORE_FAILED
