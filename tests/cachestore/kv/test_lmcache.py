"""The store over LMCache: the contract, and tiers that are full, broken, slow, gone and back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cachestore.errors import StoreLocked
from cachestore.kv.format import Chunk, Geometry
from cachestore.kv.shelf import Blob, Shelf, Tier, Tiers
from cachestore.kv.store import Gone, Happening, Kept, KvStore, Lost, Options
from tests.cachestore.kv.samples import GEOMETRY, LONG, chunk, kv_of, loaded, loading, stored
from tests.contracts.kv import LARGE, KvContract

pytest.importorskip("lmcache", reason="LMCache is not installed: pip install 'hitpath[tiers]'")

from cachestore.kv.lmcache_shelf import LmcacheShelf

MEMORY = 16 << 20


def opened(tiers: Tiers, geometry: Geometry = GEOMETRY, capacity: int = LARGE, patience: float = 5.0) -> KvStore:
    shelf = LmcacheShelf(geometry.identity, tiers)
    return KvStore(geometry, shelf, Options(capacity=capacity, patience=patience))


def shelf_of(store: KvStore) -> LmcacheShelf:
    assert isinstance(store._shelf, LmcacheShelf)
    return store._shelf


def forget_memory(store: KvStore) -> None:
    """From now on everything must come from the slower tiers."""
    shelf_of(store).manager.clear()


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.data"))


class Reused(LmcacheShelf):
    """Opening and closing takes LMCache two seconds: one shelf, emptied, serves every test of the contract."""

    def emptied(self) -> Reused:
        self.manager.clear()
        assert self._directory is not None
        for path in self._directory.glob("*.data"):
            path.unlink()
        return self

    def close(self) -> None:
        """It is used again."""


@pytest.fixture(scope="module")
def reused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reused]:
    shelf = Reused(GEOMETRY.identity, Tiers(MEMORY, tmp_path_factory.mktemp("kv")))
    yield shelf
    LmcacheShelf.close(shelf)


class TestDisk(KvContract):
    @pytest.fixture(autouse=True)
    def given(self, reused: Reused) -> None:
        self.reused = reused

    def shelf(self, directory: Path, geometry: Geometry) -> Shelf:
        return self.reused.emptied()


def test_memory_alone() -> None:
    store = opened(Tiers(MEMORY))
    stored(store, chunk(66, LONG))
    assert loaded(store, chunk(66, LONG), chunk(67))[0] is not None
    forget_memory(store)
    assert loaded(store, chunk(66, LONG)) == [None]
    assert store.check() == []
    store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KvStore]:
    store = opened(Tiers(MEMORY, tmp_path))
    yield store
    assert store.check() == []
    store.close()


def test_from_memory_then_from_disk_then_from_memory(store: KvStore) -> None:
    wanted = chunk(1, LONG)
    stored(store, wanted)
    assert loaded(store, wanted) != [None]
    forget_memory(store)
    [kv] = loaded(store, wanted)
    assert kv is not None
    assert torch.equal(kv, kv_of(wanted))
    assert loaded(store, wanted) != [None]
    assert store.stats().hits == {Tier.MEMORY: 2, Tier.DISK: 1}


def test_it_survives_a_restart(tmp_path: Path) -> None:
    first = opened(Tiers(MEMORY, tmp_path))
    chunks = [chunk(seed, tokens) for seed, tokens in ((2, 24), (3, LONG))]
    stored(first, *chunks)
    held = first.stats()
    first.close()
    second = opened(Tiers(MEMORY, tmp_path))
    assert (second.stats().chunks, second.stats().bytes) == (held.chunks, held.bytes)
    for kv, wanted in zip(loaded(second, *chunks), chunks, strict=True):
        assert kv is not None
        assert torch.equal(kv, kv_of(wanted))
    assert second.stats().hits == {Tier.DISK: 2}
    assert second.check() == []
    second.close()


def test_what_an_earlier_process_left_is_recalled_and_what_is_damaged_removed(tmp_path: Path) -> None:
    first = opened(Tiers(MEMORY, tmp_path))
    chunks = [chunk(2, 24, tenant="a"), chunk(3, LONG, variant="v"), chunk(4)]
    stored(first, *chunks)
    first.close()
    [head] = [path for path in files(tmp_path) if path.name.split("@")[2:4] == ["0", chunks[2].name(GEOMETRY).hex()]]
    _harm(head, "flip")
    seen: list[Happening] = []
    shelf = LmcacheShelf(GEOMETRY.identity, Tiers(MEMORY, tmp_path))
    second = KvStore(GEOMETRY, shelf, Options(LARGE), observe=seen.append)
    assert [second.recall(2), second.recall(2), second.recall(2)] == [1, 0, 0]
    kept = {event.key: event.tokens for event in seen if isinstance(event, Kept)}
    assert kept == {second._key(wanted): wanted.tokens for wanted in chunks[:2]}
    assert [event.key for event in seen if isinstance(event, Gone)] == [second._key(chunks[2])]
    assert second.stats().lost == {Lost.DAMAGED: 1}
    assert second.flush(20.0)
    assert second.check() == []
    second.close()


def test_what_an_earlier_process_left_is_evicted_in_order(tmp_path: Path) -> None:
    first = opened(Tiers(MEMORY, tmp_path))
    stored(first, chunk(4))
    stored(first, chunk(5))
    used = first.stats().bytes
    first.close()
    for path in files(tmp_path):
        if chunk(4).name(GEOMETRY).hex() in path.name:
            os.utime(path, (1, 1))
    second = opened(Tiers(MEMORY, tmp_path), capacity=used)
    stored(second, chunk(6))
    assert [kv is not None for kv in loaded(second, chunk(4), chunk(5), chunk(6))] == [False, True, True]
    second.close()
    assert {path.name.split("@")[3] for path in files(tmp_path)} == {
        wanted.name(GEOMETRY).hex() for wanted in (chunk(5), chunk(6))
    }


def test_two_processes_do_not_share_a_directory(store: KvStore, tmp_path: Path) -> None:
    with pytest.raises(StoreLocked):
        opened(Tiers(MEMORY, tmp_path))


def test_another_model_has_a_directory_of_its_own(store: KvStore, tmp_path: Path) -> None:
    stored(store, chunk(7))
    other = replace(GEOMETRY, fingerprint="weights-2")
    second = opened(Tiers(MEMORY, tmp_path), other)
    assert loaded(second, chunk(7)) == [None]
    second.close()


def test_another_models_files_under_our_names_are_not_used(tmp_path: Path) -> None:
    other = replace(GEOMETRY, fingerprint="weights-2")
    first = opened(Tiers(MEMORY, tmp_path), other)
    stored(first, chunk(8))
    first.close()
    mine, theirs = GEOMETRY.identity.hex(), other.identity.hex()
    (tmp_path / mine).mkdir()
    for path in files(tmp_path):
        name = path.name.replace(theirs, mine).replace(chunk(8).name(other).hex(), chunk(8).name(GEOMETRY).hex())
        shutil.copy(path, tmp_path / mine / name)
    second = opened(Tiers(MEMORY, tmp_path))
    assert loaded(second, chunk(8)) == [None]
    assert second.stats().lost == {Lost.FOREIGN: 1}
    second.close()


def _harm(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "flip":
            data[len(data) // 3] ^= 16
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-1])
        case "empty":
            path.write_bytes(b"")
        case "noise":
            path.write_bytes(os.urandom(len(data)))
        case _:
            path.unlink()


def test_damaged_files_are_misses_and_are_replaced(store: KvStore, tmp_path: Path) -> None:
    harms = [(how, index) for how in ("flip", "cut", "empty", "noise", "remove") for index in (0, 2)]
    for seed, (how, index) in enumerate(harms, 90):
        wanted = chunk(seed, LONG)
        stored(store, wanted)
        forget_memory(store)
        name = wanted.name(GEOMETRY).hex()
        [path] = [path for path in files(tmp_path) if path.name.split("@")[2:4] == [f"{index:x}", name]]
        _harm(path, how)
        assert loaded(store, wanted) == [None], (how, index)
        assert store.flush(10.0)
        stored(store, wanted)
        forget_memory(store)
        [kv] = loaded(store, wanted)
        assert kv is not None, (how, index)
        assert torch.equal(kv, kv_of(wanted))
    assert store.stats().lost == {Lost.DAMAGED: 4, Lost.ABSENT: 6}


def test_killed_while_writing(tmp_path: Path) -> None:
    program = (
        "import sys, itertools, time; from pathlib import Path\n"
        "from cachestore.kv.shelf import Tiers\n"
        "from cachestore.kv.store import Slot\n"
        "from tests.cachestore.kv.samples import chunk, kv_of, LONG\n"
        "from tests.cachestore.kv.test_lmcache import opened\n"
        "store = opened(Tiers(64 << 20, Path(sys.argv[1])))\n"
        "for seed in itertools.cycle(range(100, 120)):\n"
        "    slot = store.prepare_store(chunk(seed, LONG), 'raw')\n"
        "    if isinstance(slot, Slot): store.complete_store(slot, kv_of(slot.chunk))\n"
        "    if len(list(Path(sys.argv[1]).glob('*/*.data'))) > 10: print('go', flush=True)\n"
        "    time.sleep(0.002)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        process.send_signal(signal.SIGKILL)
    (next(tmp_path.iterdir()) / "half.tmp").write_bytes(b"x")
    store = opened(Tiers(MEMORY, tmp_path))
    assert not list(tmp_path.glob("*/*.tmp"))
    found = 0
    for seed in range(100, 120):
        [kv] = loaded(store, chunk(seed, LONG))
        found += kv is not None
        assert kv is None or torch.equal(kv, kv_of(chunk(seed, LONG)))
    assert found
    assert store.check() == []
    store.close()


def test_a_directory_that_is_deleted_is_made_again(store: KvStore, tmp_path: Path) -> None:
    stored(store, chunk(10))
    shutil.rmtree(tmp_path)
    forget_memory(store)
    assert loaded(store, chunk(10)) == [None]
    unwritten(store, 11)
    for seed in range(12, 20):
        stored(store, chunk(seed))
    forget_memory(store)
    assert loaded(store, chunk(19)) != [None]


def unwritten(store: KvStore, seed: int) -> None:
    """Store, and wait until the store has noticed that it was not written."""
    before = store.stats().unwritten
    stored(store, chunk(seed))
    until = time.monotonic() + 20
    while store.stats().unwritten == before:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_directory_that_cannot_be_written(store: KvStore, tmp_path: Path) -> None:
    # Not by permissions: the superuser has them all. A file where the folder was refuses everyone.
    stored(store, chunk(20))
    shutil.rmtree(next(tmp_path.iterdir()))
    (tmp_path / GEOMETRY.identity.hex()).write_bytes(b"")
    unwritten(store, 21)
    forget_memory(store)
    assert loaded(store, chunk(20), chunk(21)) == [None, None]


def test_a_read_that_fails_and_one_that_hangs(tmp_path: Path) -> None:
    store = opened(Tiers(MEMORY, tmp_path), patience=0.3)
    broken, hanging, sound = (chunk(seed, LONG) for seed in (22, 23, 24))
    stored(store, broken, hanging, sound)
    forget_memory(store)
    [error] = tmp_path.glob(f"*/*@1@{broken.name(GEOMETRY).hex()}@*")
    error.unlink()
    error.mkdir()
    [fifo] = tmp_path.glob(f"*/*@0@{hanging.name(GEOMETRY).hex()}@*")
    fifo.unlink()
    os.mkfifo(fifo)
    lookup = store.lookup([broken, hanging, sound])
    assert not lookup.wait(0.3)
    load = store.prepare_load(lookup)
    kvs = load.whole()
    store.complete_load(load)
    assert [kv is not None for kv in kvs] == [False, False, True]
    assert store.stats().lost == {Lost.ABSENT: 1, Lost.LATE: 1}
    with fifo.open("wb"):
        pass
    assert loaded(store, sound) != [None]
    until = time.monotonic() + 10
    while shelf_of(store)._flights:
        assert store.check() == []
        assert time.monotonic() < until
    assert store.check() == []
    store.close()


def hang(directory: Path, *chunks: Chunk) -> list[Path]:
    """Their heads' files become pipes that nobody writes to."""
    fifos = [fifo for one in chunks for fifo in directory.glob(f"*/*@0@{one.name(GEOMETRY).hex()}@*")]
    for fifo in fifos:
        fifo.unlink()
        os.mkfifo(fifo)
    return fifos


def test_reads_that_hang_keep_nobody_from_reading(tmp_path: Path) -> None:
    store = opened(Tiers(MEMORY, tmp_path), patience=0.3)
    sound, *hanging = (chunk(seed, LONG) for seed in range(50, 56))
    stored(store, sound, *hanging)
    forget_memory(store)
    fifos = hang(tmp_path, *hanging)
    try:
        lookup = store.lookup(hanging)
        assert not lookup.wait(1.1)
        store.complete_load(store.prepare_load(lookup))
        lookup = store.lookup([hanging[0]])
        assert not lookup.wait(1000.0), "nobody waits for it again"
        store.complete_load(store.prepare_load(lookup))
        assert loaded(store, sound) != [None]
    finally:
        for fifo in fifos:
            with fifo.open("wb"):
                pass
    until = time.monotonic() + 10
    while shelf_of(store)._flights:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert store.check() == []
    store.close()


def test_a_read_that_hangs_keeps_no_process_from_ending(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from tests.cachestore.kv.samples import LONG, chunk, stored\n"
        "from tests.cachestore.kv.test_lmcache import MEMORY, Tiers, forget_memory, hang, opened\n"
        "directory = pathlib.Path(sys.argv[1])\n"
        "store = opened(Tiers(MEMORY, directory), patience=0.3)\n"
        "stored(store, chunk(1, LONG))\n"
        "forget_memory(store)\n"
        "hang(directory, chunk(1, LONG))\n"
        "lookup = store.lookup([chunk(1, LONG)])\n"
        "assert not lookup.wait(0.3)\n"
        "store.complete_load(store.prepare_load(lookup))\n"
        "store.close()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a small file system here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    store = opened(Tiers(64 << 20, small_disk))
    chunks = [chunk(seed, LONG) for seed in range(30, 40)]
    stored(store, *chunks)
    assert store.stats().unwritten or shelf_of(store)._failed
    # Which of them were written whole is chance. Of what was not, none is left, and there is room for the next one, or,
    # where that is what shows that the disk is full again, for the one after it.
    latest = chunk(40, LONG)
    for _ in range(2):
        stored(store, latest)
        forget_memory(store)
        if loaded(store, latest)[0] is not None:
            break
    found = {wanted: kv for wanted in (*chunks, latest) if (kv := loaded(store, wanted)[0]) is not None}
    assert latest in found
    assert len(found) <= 2
    assert all(torch.equal(kv, kv_of(wanted)) for wanted, kv in found.items())
    assert store.stats().unwritten
    assert store.check() == []
    store.close()


def test_more_than_memory_holds(tmp_path: Path) -> None:
    store = opened(Tiers(4 << 20, tmp_path))
    chunks = [chunk(seed, LONG) for seed in range(40, 47)]
    for wanted in chunks:
        stored(store, wanted)
    load = loading(store, *chunks)
    kept = [kv for kv in load.whole() if kv is not None]
    store.complete_load(load)
    assert kept
    assert store.flush(10.0)
    assert store.check() == []
    store.close()


def test_a_chunk_that_waits_for_room_is_no_failure_of_the_books(tmp_path: Path) -> None:
    shelf = LmcacheShelf(GEOMETRY.identity, Tiers(4 << 20, tmp_path))
    large = torch.zeros(2 << 20, dtype=torch.uint8)
    assert shelf.put(("", b"first"), [large])
    ticket = shelf.fetch(Blob(("", b"first"), 0, len(large)))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shelf.put, ("", b"second"), [large[: 1 << 20], large])
        while not waiting.done():
            wrong = shelf._held_now()
            assert wrong == [] or waiting.done()
    assert not waiting.result()
    ticket.release()
    assert shelf.check() == []
    shelf.close()


# -- Redis


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Redis:
    """A server of our own."""

    def __init__(self, port: int, *options: str) -> None:
        command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert time.monotonic() < until
            time.sleep(0.01)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


@needs_redis
class TestRedis:
    @pytest.fixture
    def redis(self, port: int) -> Iterator[Redis]:
        server = Redis(port)
        yield server
        server.stop()

    def test_two_stores_share_it(self, redis: Redis, port: int) -> None:
        tiers = Tiers(MEMORY, redis=f"redis://127.0.0.1:{port}")
        one, two = opened(tiers), opened(tiers)
        wanted = chunk(60, LONG)
        stored(one, wanted)
        [kv] = loaded(two, wanted)
        assert kv is not None
        assert torch.equal(kv, kv_of(wanted))
        assert two.stats().hits == {Tier.REMOTE: 1}
        for store in (one, two):
            assert store.check() == []
            store.close()

    def test_gone_and_back(self, redis: Redis, port: int, tmp_path: Path) -> None:
        store = opened(Tiers(MEMORY, tmp_path, f"redis://127.0.0.1:{port}"), patience=3.0)
        stored(store, chunk(61))
        redis.stop()
        assert loaded(store, chunk(61)) != [None]
        forget_memory(store)
        assert loaded(store, chunk(61)) != [None], "the disk has it as well"
        assert loaded(store, chunk(62)) == [None]
        stored(store, chunk(63))
        assert store.check() == []
        back = Redis(port)
        until = time.monotonic() + 20
        seed = 70
        while not _in_redis(port):
            assert time.monotonic() < until
            stored(store, chunk(seed := seed + 1))
        back.stop()
        assert store.check() == []
        store.close()

    def test_away_from_the_beginning(self, port: int) -> None:
        store = opened(Tiers(MEMORY, redis=f"redis://127.0.0.1:{port}"))
        stored(store, chunk(64))
        assert loaded(store, chunk(65)) == [None]
        assert store.check() == []
        store.close()

    def test_it_is_full(self, port: int) -> None:
        server = Redis(port, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction")
        store = opened(Tiers(MEMORY, redis=f"redis://127.0.0.1:{port}"))
        for seed in range(80, 86):
            stored(store, chunk(seed, LONG))
        assert store.check() == []
        store.close()
        server.stop()


def _in_redis(port: int) -> bool:
    import redis

    with redis.Redis(port=port) as client:
        return bool(client.dbsize())


def test_all_who_ask_at_once_after_a_restart_get_what_is_on_disk(tmp_path: Path) -> None:
    """LMCache tells only one of those who ask for the same object: the others took it for gone, and removed it."""
    tiers = Tiers(MEMORY, tmp_path)
    chunks = [chunk(seed) for seed in range(12)]
    store = opened(tiers)
    for one in chunks:
        stored(store, one)
    store.close()
    store = opened(tiers)
    with ThreadPoolExecutor(4) as threads:
        for one in chunks:
            for [found] in threads.map(lambda _, one=one: loaded(store, one), range(4)):
                assert found is not None
                assert torch.equal(found, kv_of(one))
    assert not any(store.stats().lost.values())
    assert store.check() == []
    store.close()
