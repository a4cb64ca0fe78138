"""Damaged rows and files, foreign and newer formats, locks, full disks."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path

import pytest

from cachestore import Filter, Store, StoreError, StoreLocked
from cachestore.errors import NewerLog, NotOurLog
from cachestore.log import FILE
from cachestore.offline import purge, verify
from policies.eviction import Lru
from policies.reasons import NotStored
from tests.cachestore.samples import OPTIONS, ManualClock, digest, document, open_store, put


async def filled(directory: Path, count: int = 20) -> None:
    store = await open_store(directory)
    await asyncio.gather(*(put(store, document(n)) for n in range(count)))
    await store.close()


def change(directory: Path, statement: str) -> None:
    connection = sqlite3.connect(directory / FILE)
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE payload SET body = x'7b7d' WHERE id = 3",
        "UPDATE payload SET body = substr(body, 1, 3) WHERE id = 3",
        "UPDATE payload SET packed = 1 - packed WHERE id = 3",
        "UPDATE payload SET text = 'another question' WHERE id = 3",
        "UPDATE payload SET body = 7.5 WHERE id = 3",
        "UPDATE entry SET upstream = 'someone' WHERE id = 3",
    ],
)
async def test_a_damaged_answer_is_reported_skipped_and_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    await filled(tmp_path)
    change(tmp_path, damage)
    assert any("entry 3" in problem for problem in verify(tmp_path))
    store = await open_store(tmp_path)
    with caplog.at_level(logging.ERROR, "hitpath.store"):
        key = (await store.entries(Filter(ids=(3,)), limit=1))[0].key
        results = await asyncio.gather(*(store.get(key) for _ in range(5)))
        assert results == [None] * 5
    assert sum("entry 3" in message for message in caplog.messages) == 1
    assert store.stats().damaged == 1
    await put(store, document("next"))
    assert await store.check() == []
    assert store.stats().entries == 20
    store._drop_damaged(3, "entry 3: by who read it at the same time, and is late")
    assert store.stats().damaged == 1
    await store.close()
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE entry SET scope = x'00112233445566778899aabbccddeeff' WHERE id = 3",
        "UPDATE entry SET key = x'00112233445566778899aabbccddeeff' WHERE id = 3",
        "UPDATE entry SET key = 'text' WHERE id = 3",
        "UPDATE entry SET expires = expires + 1000 WHERE id = 3",
        "UPDATE entry SET category = 'chat' WHERE id = 3",
        "UPDATE payload SET vector = zeroblob(64) WHERE id = 3",
        "UPDATE payload SET vector = x'00' WHERE id = 3",
        "UPDATE payload SET vector = NULL WHERE id = 3",
        "UPDATE entry SET cost = 'much' WHERE id = 3",
        "DELETE FROM payload WHERE id = 3",
    ],
)
async def test_damage_to_what_the_index_relies_on_is_found_while_loading(tmp_path: Path, damage: str) -> None:
    await filled(tmp_path)
    change(tmp_path, damage)
    assert verify(tmp_path)
    store = await open_store(tmp_path)
    assert store.stats().damaged == 1
    assert store.stats().entries == 19
    stored = document(2).vector
    assert stored is not None
    assert 3 not in [n.id for n in store.search(digest("scope"), stored, 20, -1.0)]
    await put(store, document("next"))
    assert await store.check() == []
    await store.close()
    assert verify(tmp_path) == []


@pytest.mark.parametrize("content", [b"this is not a database " * 500, b"SQLite format 3\x00" + b"\xff" * 8192])
async def test_a_file_that_is_no_database_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert verify(tmp_path)
    store = await open_store(tmp_path)
    [aside] = store.stats().moved_aside
    assert ".damaged-" in aside
    assert await asyncio.to_thread(Path(aside).read_bytes) == content
    await put(store, document("a"))
    assert await store.check() == []
    await store.close()
    assert verify(tmp_path) == []


async def test_broken_pages_are_met_while_loading(tmp_path: Path) -> None:
    await filled(tmp_path, 200)
    break_pages(tmp_path)
    assert verify(tmp_path)
    store = await open_store(tmp_path)
    assert len(store.stats().moved_aside) == 1
    await put(store, document("a"))
    assert await store.check() == []
    await store.close()


async def test_broken_pages_are_met_by_a_lookup(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await filled(tmp_path, 200)
    store = await open_store(tmp_path)
    break_pages(tmp_path)
    found = await asyncio.gather(*(store.get(digest(n)) for n in range(200)))
    assert found.count(None) > 0, "SQLite met the broken pages"
    outcome = await store.put(document("a"))
    assert isinstance(outcome, int), "serving and storing go on"
    assert len(store.stats().moved_aside) == 1
    assert any(FILE in message and "damaged" in message for message in caplog.messages)
    assert (await store.get(digest("a"))) is not None
    assert await store.check() == []
    await store.close()


def break_pages(directory: Path) -> None:
    path = directory / FILE
    content = bytearray(path.read_bytes())
    content[2 * 8192 :] = b"\xaa" * (len(content) - 2 * 8192)
    path.write_bytes(content)


async def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    await filled(tmp_path)
    change(tmp_path, "PRAGMA user_version = 99")
    with pytest.raises(NewerLog, match=rf"{FILE} has format 99, this Hitpath reads up to 1"):
        await open_store(tmp_path)
    assert "format 99" in verify(tmp_path)[0]
    change(tmp_path, "PRAGMA user_version = 1")
    await (await open_store(tmp_path)).close()


async def test_a_foreign_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    change(tmp_path, "CREATE TABLE photos (id INTEGER)")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(NotOurLog, match=FILE):
        await open_store(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


async def test_one_writer_per_directory(tmp_path: Path) -> None:
    import os

    store = await open_store(tmp_path)
    await put(store, document("a"))
    with pytest.raises(StoreLocked, match=f"process {os.getpid()}"):
        await open_store(tmp_path)
    with pytest.raises(StoreLocked):
        purge(tmp_path, Filter())
    assert verify(tmp_path) == [], "reading beside a running store is fine"
    await store.close()
    await (await open_store(tmp_path)).close()


async def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        await Store.open(tmp_path / "file" / "data", OPTIONS, eviction=Lru(), clock=ManualClock())


async def test_a_full_disk_turns_storing_off_not_serving(tmp_path: Path) -> None:
    store = await open_store(tmp_path, max_file=400_000, retry_after=3600.0)
    stored, n = [], 0
    outcome: int | NotStored = 0
    while isinstance(outcome, int):
        wanted = document(n, body=b"".join(digest((n, i)) for i in range(200)))
        outcome = await store.put(wanted)
        if isinstance(outcome, int):
            stored.append(wanted)
        n += 1
    assert outcome is NotStored.DISK_FULL
    assert store.stats().storing_off is not None
    assert await store.put(document("small")) is NotStored.DISK_FULL, "not tried again yet"
    for wanted in stored:
        hit = await store.get(wanted.key)
        assert hit is not None
        assert hit.body == wanted.body
    assert await store.check() == []
    await store.close()


async def test_storing_comes_back_when_there_is_room(tmp_path: Path) -> None:
    store = await open_store(tmp_path, max_file=400_000, retry_after=0.0)
    outcomes = [await store.put(document(n, body=b"".join(digest((n, i)) for i in range(200)))) for n in range(150)]
    assert NotStored.DISK_FULL in outcomes
    ids = [outcome for outcome in outcomes if isinstance(outcome, int)]
    await store.purge(Filter(ids=tuple(ids)))
    assert isinstance(await store.put(document("again")), int)
    assert store.stats().storing_off is None
    assert await store.check() == []
    await store.close()
