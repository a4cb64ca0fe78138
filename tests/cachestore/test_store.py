from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cachestore import Filter, Store, StoreOptions
from policies.eviction import Lru
from policies.quota import Quota
from policies.reasons import NotStored
from tests.cachestore.samples import NOW, ManualClock, digest, document, open_store, put
from tests.contracts.store import StoreContract


class TestSqliteStore(StoreContract):
    async def open(self, directory: Path, clock: ManualClock, **options: Any) -> Store:
        return await open_store(directory, clock, **options)


@pytest.mark.parametrize("name", ["memory_budget", "disk_budget", "max_body", "max_waiting"])
def test_an_option_that_makes_no_sense_is_named(name: str) -> None:
    arguments: dict[str, Any] = {"memory_budget": 1, "disk_budget": 1, "max_body": 1, "embedder": "", name: 0}
    with pytest.raises(ValueError, match=name):
        StoreOptions(**arguments)


async def test_the_memory_budget_is_kept_hot_bodies_go_first(tmp_path: Path) -> None:
    budget = 400_000
    store = await open_store(tmp_path, memory_budget=budget)
    for n in range(100):
        await put(store, document(n, body=b"%d " % n * 3000))
        assert store.stats().memory_used <= budget
    stats = store.stats()
    assert stats.entries == 100
    assert 0 < stats.hot_bodies < 100
    assert (await store.get(digest(0))) is not None, "given up as a hot body, still in the log"
    store.charge("streams", 300_000)
    assert store.stats().memory_used <= budget
    assert store.stats().memory_by_kind["streams"] == 300_000
    await store.sweep()
    assert await store.check() == []
    store.charge("streams", -300_000)
    await store.close()


async def test_over_the_memory_budget_entries_are_evicted(tmp_path: Path) -> None:
    store = await open_store(tmp_path, memory_budget=100_000)
    for n in range(400):
        await put(store, document(n))
        assert store.stats().memory_used <= 100_000
    assert 0 < store.stats().entries < 400
    assert store.stats().entries + store.stats().evicted == 400
    assert await store.check() == []
    left = store.stats().entries
    await store.close()
    store = await open_store(tmp_path)
    assert store.stats().entries == left, "what was evicted does not come back"
    await store.close()


async def test_the_disk_budget_is_kept(tmp_path: Path) -> None:
    budget = 4 << 20
    store = await open_store(tmp_path, disk_budget=budget)
    for start in range(0, 3000, 100):
        bodies = [b"".join(digest((n, i)) for i in range(100)) for n in range(start, start + 100)]
        await asyncio.gather(*(put(store, document(start + i, body=body)) for i, body in enumerate(bodies)))
        assert bytes_in(tmp_path) <= budget
    assert store.stats().evicted > 0
    assert store.stats().entries > 500
    assert await store.check() == []
    await store.close()


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


async def test_a_budget_smaller_than_last_time(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await asyncio.gather(*(put(store, document(n)) for n in range(500)))
    await store.close()
    store = await open_store(tmp_path, memory_budget=100_000)
    await store.sweep()
    assert store.stats().memory_used <= 100_000
    assert store.stats().entries > 0
    assert await store.check() == []
    await store.close()


async def test_a_guarantee_holds_against_others_and_borrowed_room_is_given_back(tmp_path: Path) -> None:
    quotas = {"code": Quota(0.5, 1.0), "chat": Quota(0.0, 0.3)}
    store = await open_store(tmp_path, memory_budget=100_000, quotas=quotas)
    for n in range(200):
        await put(store, document(("chat", n), category="chat"))
    assert store.stats().memory_by_category["chat"] > 80_000, "a cap may be exceeded while the budget is free"
    for n in range(200):
        await put(store, document(("code", n)))
    assert store.stats().memory_by_category["chat"] < 31_000
    for n in range(400):
        await put(store, document(("more", n), category="chat", cost=1000.0))
    assert store.stats().memory_by_category["code"] >= 49_000
    assert await store.check() == []
    await store.close()


async def test_no_room_within_the_quotas(tmp_path: Path) -> None:
    store = await open_store(tmp_path, memory_budget=50_000, quotas={"code": Quota(1.0, 1.0)})
    while store.stats().evicted == 0:
        await put(store, document(store.stats().stored))
    assert await store.put(document("chat", category="chat")) is NotStored.OVER_QUOTA
    assert isinstance(await store.put(document("code")), int)
    assert await store.check() == []
    await store.close()


async def test_expired_entries_make_room_before_living_ones(tmp_path: Path) -> None:
    clock = ManualClock()
    store = await open_store(tmp_path, clock, memory_budget=100_000)
    while store.stats().memory_by_kind["entries"] < 90_000:
        n = store.stats().stored
        await put(store, document(n, expires=NOW + (10 if n % 2 else 1000)))
    living = store.stats().stored // 2
    clock.advance(20)
    for n in range(20):
        await put(store, document(("new", n)))
    for n in range(0, living * 2, 2):
        assert await store.get(digest(n)) is not None
    await store.close()


async def test_a_hit_counts_for_the_ranking_and_is_noted_in_the_log(tmp_path: Path) -> None:
    clock = ManualClock()
    store = await Store.open(
        tmp_path,
        StoreOptions(memory_budget=200_000, disk_budget=1 << 30, max_body=1 << 20, embedder="test"),
        eviction=Lru(),
        clock=clock,
    )
    await put(store, document("wanted"))
    for n in range(1000):
        clock.advance(0.1)
        await put(store, document(n, created=clock.now))
        assert await store.get(digest("wanted")) is not None
        await store.sweep()
    assert store.stats().evicted > 0
    [row] = await store.entries(Filter(ids=(1,)), limit=1)
    assert row.hits > 100
    await store.close()


async def test_lookups_work_while_everything_loads(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await asyncio.gather(*(put(store, document(n)) for n in range(1000)))
    await store.close()
    clock = ManualClock()
    store = await Store.open(
        tmp_path,
        StoreOptions(memory_budget=1 << 26, disk_budget=1 << 26, max_body=1 << 20, embedder="test"),
        eviction=Lru(),
        clock=clock,
    )
    hit, replaced, purged = await asyncio.gather(
        store.get(digest(999)), store.put(document(998, body=b"new")), store.purge(Filter(ids=(997, 3)))
    )
    assert hit is not None
    assert isinstance(replaced, int)
    assert purged == [3, 997]
    await store.loaded.wait()
    assert await store.check() == []
    new = await store.get(digest(998))
    assert new is not None
    assert new.body == b"new"
    assert await store.get(digest(996)) is None
    assert store.stats().entries == 998
    await store.close()
