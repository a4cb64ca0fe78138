"""The store over a shelf in memory, and over shelves that lie, stall and fail."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cachestore.kv.format import Chunk, Geometry, write_head
from cachestore.kv.ledger import Key
from cachestore.kv.shelf import Blob, MemoryShelf, Shelf, Ticket, Tier
from cachestore.kv.store import KvStore, Lost, Options, Slot
from tests.cachestore.kv.samples import GEOMETRY, LONG, chunk, kv_of, loaded, loading, stored
from tests.contracts.kv import LARGE, KvContract


class TestMemory(KvContract):
    def shelf(self, directory: Path, geometry: Geometry) -> Shelf:
        return MemoryShelf()


class _Never:
    """A ticket of a tier that does not answer."""

    tier = Tier.DISK

    def __init__(self) -> None:
        self.released = False

    def done(self, timeout: float = 0.0) -> bool:
        return False

    def code(self) -> Tensor | None:
        return None

    def release(self) -> None:
        self.released = True


class WrongShelf(MemoryShelf):
    """Blobs can be changed behind the store's back, stall, or not be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.stalled: set[int] = set()
        self.never: list[_Never] = []
        self.full = False
        self.unwritten: dict[Key, int] = {}

    def fetch(self, blob: Blob) -> Ticket:
        if blob.index in self.stalled:
            self.never.append(_Never())
            return self.never[-1]
        return super().fetch(blob)

    def put(self, key: Key, blobs: Sequence[Tensor]) -> bool:
        return not self.full and super().put(key, blobs)

    def failed(self) -> dict[Key, int]:
        failed, self.unwritten = self.unwritten, {}
        return failed

    def blob(self, wanted: Chunk, index: int) -> Tensor:
        return self._blobs[self.key(wanted), index]

    def replace(self, wanted: Chunk, index: int, blob: Tensor) -> None:
        self._blobs[self.key(wanted), index] = blob

    def key(self, wanted: Chunk) -> Key:
        [key] = {key for key, _ in self._blobs if key[1] == wanted.name(GEOMETRY)}
        return key


@pytest.fixture
def shelf() -> WrongShelf:
    return WrongShelf()


@pytest.fixture
def store(shelf: WrongShelf) -> KvStore:
    return KvStore(GEOMETRY, shelf, Options(capacity=LARGE, patience=0.2))


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("codec", ["raw", "entropy"])
def test_a_flipped_bit_is_a_miss(store: KvStore, shelf: WrongShelf, index: int, codec: str) -> None:
    wanted = chunk(1, LONG)
    stored(store, wanted, codec=codec)
    blob = shelf.blob(wanted, index)
    blob[len(blob) // 2] ^= 4
    assert loaded(store, wanted) == [None]
    assert store.stats().lost == {Lost.DAMAGED: 1}
    assert store.flush(5.0)
    assert not shelf._blobs, "what is damaged is removed, so that it can be stored anew"
    stored(store, wanted, codec=codec)
    assert loaded(store, wanted) != [None]
    assert store.check() == []
    store.close()


def test_every_byte_of_a_head_counts(store: KvStore, shelf: WrongShelf) -> None:
    wanted = chunk(2, 4)
    stored(store, wanted)
    key, head, part = shelf.key(wanted), shelf.blob(wanted, 0).clone(), shelf.blob(wanted, 1).clone()
    for at in range(len(head)):
        bad = head.clone()
        bad[at] ^= 1
        slot = store.prepare_store(wanted)
        if isinstance(slot, Slot):
            store.complete_store(slot, kv_of(wanted))
            assert store.flush(5.0)
        shelf.put(key, [bad, part])
        assert loaded(store, wanted) == [None]
    assert store.stats().lost == {Lost.DAMAGED: len(head)}
    store.close()


def test_layers_before_the_damage_are_not_wrong(store: KvStore, shelf: WrongShelf) -> None:
    wanted = chunk(3, LONG)
    stored(store, wanted)
    shelf.blob(wanted, 3)[0] ^= 1
    load = loading(store, wanted)
    rows = [row[0] for row in load.layers()]
    store.complete_load(load)
    assert [row is not None for row in rows] == [True, True, False, False]
    assert rows[1] is not None
    assert torch.equal(rows[1], kv_of(wanted)[1])
    store.close()


def test_truncated_and_missing_parts_are_misses(store: KvStore, shelf: WrongShelf) -> None:
    for seed, blob in ((4, torch.empty(0, dtype=torch.uint8)), (5, shelf)):
        wanted = chunk(seed, LONG)
        stored(store, wanted)
        if isinstance(blob, Tensor):
            shelf.replace(wanted, 2, shelf.blob(wanted, 2)[:-1])
        else:
            del shelf._blobs[shelf.key(wanted), 2]
        assert loaded(store, wanted) == [None]
    assert store.stats().lost == {Lost.ABSENT: 2}
    store.close()


@pytest.mark.parametrize(
    "other",
    [
        replace(GEOMETRY, fingerprint="weights-2"),
        replace(GEOMETRY, dtype=torch.bfloat16),
        replace(GEOMETRY, kv_heads=1, head_dim=32),
    ],
)
def test_another_models_head_under_this_name_is_foreign(store: KvStore, shelf: WrongShelf, other: Geometry) -> None:
    wanted = chunk(6)
    stored(store, wanted)
    shelf.replace(wanted, 0, write_head(other, wanted, "raw", [shelf.blob(wanted, 1)]))
    assert loaded(store, wanted) == [None]
    assert store.stats().lost == {Lost.FOREIGN: 1}
    store.close()


def test_other_tokens_under_this_name_are_foreign(store: KvStore, shelf: WrongShelf) -> None:
    wanted, other = chunk(7), chunk(8)
    stored(store, wanted, other)
    shelf.replace(wanted, 0, shelf.blob(other, 0))
    assert loaded(store, wanted) == [None]
    assert store.stats().lost == {Lost.FOREIGN: 1}
    store.close()


@pytest.mark.parametrize("index", [0, 3])
def test_a_tier_that_does_not_answer_is_a_miss(store: KvStore, shelf: WrongShelf, index: int) -> None:
    wanted = chunk(9, LONG)
    stored(store, wanted)
    shelf.stalled = {index}
    lookup = store.lookup([wanted])
    assert lookup.wait(0.05) == (index != 0)
    load = store.prepare_load(lookup)
    assert load.whole() == [None]
    store.complete_load(load)
    assert store.stats().lost == {Lost.LATE: 1}
    assert all(never.released for never in shelf.never)
    assert store.check() == []
    shelf.stalled = set()
    assert loaded(store, wanted) != [None], "late is not lost for good"
    store.close()


def test_no_room_is_a_miss(store: KvStore, shelf: WrongShelf) -> None:
    shelf.full = True
    stored(store, chunk(10))
    assert loaded(store, chunk(10)) == [None]
    assert store.stats().unwritten == 1
    shelf.full = False
    stored(store, chunk(10))
    assert loaded(store, chunk(10)) != [None]
    store.close()


@pytest.mark.parametrize("noticed", [False, True])
def test_a_failed_write_makes_room(store: KvStore, shelf: WrongShelf, noticed: bool) -> None:
    old, new = chunk(11), chunk(12)
    stored(store, old, new)
    failed = shelf.key(new)
    if noticed:  # by a reader, before it is told
        shelf.drop(failed, 9)
        assert loaded(store, new) == [None]
    shelf.unwritten = {failed: 1}
    stored(store, chunk(13))
    assert [kv is not None for kv in loaded(store, old, new, chunk(13))] == [False, False, True]
    assert store.check() == []
    store.close()


def test_codecs_that_ask_are_told_what_is_important(store: KvStore) -> None:
    wanted = chunk(14, 64)
    importance = torch.zeros(64)
    importance[10:26] = 1
    slot = store.prepare_store(wanted, "mixed")
    assert isinstance(slot, Slot)
    store.complete_store(slot, kv_of(wanted), importance=importance)
    assert store.flush(5.0)
    [kv] = loaded(store, wanted)
    assert kv is not None
    errors = (kv - kv_of(wanted)).abs().amax((0, 1, 3, 4))
    assert errors[10:26].max() < 0.05
    assert errors[26:].min() > 0.05
    store.close()


def test_what_is_still_waiting_when_the_store_closes_is_given_up_before_the_shelf_goes() -> None:
    class Slow(MemoryShelf):
        closed = False
        late = 0

        def put(self, key: Key, blobs: Sequence[Tensor]) -> bool:
            time.sleep(0.05)
            self.late += self.closed
            return super().put(key, blobs)

        def close(self) -> None:
            self.closed = True

    shelf = Slow()
    store = KvStore(GEOMETRY, shelf, Options(1 << 24))
    for seed in range(20):
        slot = store.prepare_store(chunk(seed))
        assert isinstance(slot, Slot)
        store.complete_store(slot, kv_of(slot.chunk))
    store.close(0.1)
    assert store.stats().orders
    time.sleep(0.2)
    assert not shelf.late
