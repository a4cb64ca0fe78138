"""What a store of keys and values must do, whatever shelf its bytes lie on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cachestore.kv.codecs import CODECS
from cachestore.kv.format import Chunk, Geometry, note_size
from cachestore.kv.shelf import Shelf
from cachestore.kv.store import Gone, Happening, Kept, KvStore, Lost, Options, Refusal, Slot, Transfer
from tests.cachestore.kv.samples import GEOMETRY, LONG, chunk, kv_of, loaded, loading, refused, stored

LARGE = 64 << 20


class KvContract:
    def shelf(self, directory: Path, geometry: Geometry) -> Shelf:
        raise NotImplementedError

    def open(self, directory: Path, geometry: Geometry = GEOMETRY, **options: Any) -> KvStore:
        settings: dict[str, Any] = {"capacity": LARGE, **options}
        observe = settings.pop("observe", None)
        return KvStore(geometry, self.shelf(directory, geometry), Options(**settings), observe=observe)

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[KvStore]:
        store = self.open(tmp_path)
        yield store
        assert store.check() == []
        store.close()

    @pytest.mark.parametrize("tokens", [1, 24, LONG])
    def test_what_was_stored_is_loaded(self, store: KvStore, tokens: int) -> None:
        wanted = chunk(1, tokens)
        stored(store, wanted)
        [kv] = loaded(store, wanted)
        assert kv is not None
        assert torch.equal(kv, kv_of(wanted))
        assert kv.dtype == GEOMETRY.dtype

    @pytest.mark.parametrize("codec", CODECS)
    def test_every_codec_comes_back(self, store: KvStore, codec: str) -> None:
        wanted = chunk(2, 96)
        stored(store, wanted, codec=codec)
        lookup = store.lookup([wanted])
        assert lookup.wait(10.0)
        [found] = lookup.found
        assert found is not None
        assert found.codec == codec
        load = store.prepare_load(lookup)
        [kv] = load.whole()
        store.complete_load(load)
        assert kv is not None
        assert (kv - kv_of(wanted)).norm() <= 0.6 * kv_of(wanted).norm()

    def test_layers_come_one_after_the_other_for_all_chunks(self, store: KvStore) -> None:
        chunks = [chunk(seed, tokens) for seed, tokens in ((3, LONG), (4, 24), (5, 600))]
        stored(store, chunks[0], chunks[2])
        load = loading(store, *chunks)
        for layer, row in enumerate(load.layers()):
            assert row[1] is None
            for piece, wanted in zip(row, chunks, strict=True):
                assert piece is None or torch.equal(piece, kv_of(wanted)[layer])
        store.complete_load(load)
        assert store.stats().hits == {load.pieces[0].tier: 2} if load.pieces[0] else False

    def test_only_what_is_wanted_is_loaded(self, store: KvStore) -> None:
        chunks = [chunk(seed) for seed in (6, 7, 8)]
        stored(store, *chunks)
        lookup = store.lookup(chunks)
        assert lookup.wait(10.0)
        load = store.prepare_load(lookup, {2, 0})
        first, last = load.whole()
        store.complete_load(load)
        assert first is not None
        assert last is not None
        assert torch.equal(first, kv_of(chunks[0]))
        assert torch.equal(last, kv_of(chunks[2]))

    def test_absent(self, store: KvStore) -> None:
        assert loaded(store, chunk(9)) == [None]
        assert store.stats().lost == {Lost.ABSENT: 1}

    def test_what_is_stored_for_one_tenant_does_not_exist_for_another(self, store: KvStore) -> None:
        mine = chunk(10, tenant="a")
        stored(store, mine)
        for other in (replace(mine, tenant="b"), replace(mine, tenant=""), replace(mine, variant="a")):
            assert loaded(store, other) == [None]
        assert loaded(store, mine) != [None]

    def test_names_do_not_run_together(self) -> None:
        one, two = Chunk((1,), "ab", "c"), Chunk((1,), "a", "bc")
        assert one.name(GEOMETRY) != two.name(GEOMETRY)

    def test_known_chunks_are_refused(self, store: KvStore) -> None:
        stored(store, chunk(11))
        assert refused(store.prepare_store(chunk(11))) is Refusal.KNOWN
        slot = store.prepare_store(chunk(12))
        assert isinstance(slot, Slot)
        assert refused(store.prepare_store(chunk(12))) is Refusal.KNOWN
        store.complete_store(slot, None)
        stored(store, chunk(12))
        assert store.stats().refused == {Refusal.KNOWN: 2}

    def test_values_that_do_not_fit_a_codec_are_kept_raw(self, store: KvStore) -> None:
        wanted = chunk(13)
        slot = store.prepare_store(wanted, "int4")
        assert isinstance(slot, Slot)
        kv = kv_of(wanted)
        kv[0, 0, 10, 0, 0] = torch.inf
        store.complete_store(slot, kv)
        assert store.flush(10.0)
        [back] = loaded(store, wanted)
        assert back is not None
        assert torch.equal(back, kv)

    def test_another_shape_is_refused_and_frees_its_room(self, store: KvStore) -> None:
        slot = store.prepare_store(chunk(14))
        assert isinstance(slot, Slot)
        with pytest.raises(ValueError, match="is not"):
            store.complete_store(slot, kv_of(chunk(14, 25)))
        assert store.stats().writing == 0

    @pytest.mark.parametrize("bound", ["in_flight", "capacity"])
    def test_back_pressure(self, tmp_path: Path, bound: str) -> None:
        size = 24 * GEOMETRY.token_bytes
        bounds: dict[str, Any] = {bound: 2 * size + 1000}
        store = self.open(tmp_path, **bounds)
        slots = [store.prepare_store(chunk(seed)) for seed in (15, 16)]
        assert refused(store.prepare_store(chunk(17))) is Refusal.BUSY
        for slot in slots:
            assert isinstance(slot, Slot)
            store.complete_store(slot, kv_of(slot.chunk))
        assert store.flush(10.0)
        stored(store, chunk(17))
        assert store.check() == []
        store.close()

    def test_a_chunk_larger_than_what_may_wait_is_stored_alone(self, tmp_path: Path) -> None:
        store = self.open(tmp_path, in_flight=1)
        stored(store, chunk(18))
        assert loaded(store, chunk(18)) != [None]
        store.close()

    def test_the_least_recently_used_goes_first(self, tmp_path: Path) -> None:
        size = 24 * GEOMETRY.token_bytes + 1000
        store = self.open(tmp_path, capacity=3 * size)
        chunks = [chunk(seed) for seed in range(20, 24)]
        stored(store, *chunks[:3])
        assert loaded(store, chunks[0]) != [None]
        stored(store, chunks[3])
        assert [kv is not None for kv in loaded(store, *chunks)] == [True, False, True, True]
        stats = store.stats()
        assert stats.evicted == 1
        assert stats.bytes <= 3 * size
        assert store.check() == []
        store.close()

    def test_a_quota_takes_from_its_tenant_only(self, tmp_path: Path) -> None:
        size = 24 * GEOMETRY.token_bytes + 1000
        store = self.open(tmp_path, quota=2 * size)
        theirs = chunk(30, tenant="b")
        mine = [chunk(seed, tenant="a") for seed in range(31, 34)]
        stored(store, theirs, *mine)
        assert [kv is not None for kv in loaded(store, theirs, *mine)] == [True, False, True, True]
        assert refused(store.prepare_store(chunk(35, 100, tenant="a"))) is Refusal.LARGE
        assert store.check() == []
        store.close()

    def test_what_is_being_loaded_is_not_evicted(self, tmp_path: Path) -> None:
        size = 24 * GEOMETRY.token_bytes + 1000
        store = self.open(tmp_path, capacity=size)
        wanted, other = chunk(40), chunk(41)
        stored(store, wanted)
        load = loading(store, wanted)
        slot = store.prepare_store(other, "raw")
        assert isinstance(slot, Slot)
        store.complete_store(slot, kv_of(other))
        assert store.flush(10.0)
        [kv] = load.whole()
        assert kv is not None
        assert torch.equal(kv, kv_of(wanted))
        store.complete_load(load)
        assert loaded(store, other) == [None]
        assert store.stats().unwritten == 1
        assert store.check() == []
        store.close()

    def test_a_load_that_is_given_up_leaves_nothing_pinned(self, store: KvStore) -> None:
        chunks = [chunk(seed, LONG) for seed in (42, 43)]
        stored(store, *chunks)
        store.complete_load(loading(store, *chunks))
        load = loading(store, *chunks)
        next(load.layers())
        store.complete_load(load)
        store.lookup(chunks).close()
        assert store.stats().hits == {}

    def test_transfers_are_observed(self, tmp_path: Path) -> None:
        seen: list[Happening] = []
        store = self.open(tmp_path, observe=seen.append)
        wanted = chunk(44, LONG)
        stored(store, wanted, codec="int8")
        assert loaded(store, wanted) != [None]
        [kept, transfer] = seen
        assert kept == Kept(store._key(wanted), wanted.tokens, b"")
        assert isinstance(transfer, Transfer)
        assert transfer.codec == "int8"
        assert transfer.plain == LONG * GEOMETRY.token_bytes
        assert transfer.size < transfer.plain / 3
        assert transfer.decoding > 0
        store.close()

    def test_a_note_comes_back_with_its_chunk(self, store: KvStore) -> None:
        wanted = chunk(47)
        room = note_size(len(wanted.tokens))
        slot = store.prepare_store(wanted)
        assert isinstance(slot, Slot)
        with pytest.raises(ValueError, match=f"with {room} or less"):
            store.complete_store(slot, kv_of(wanted), note=b"x" * (room + 1))
        slot = store.prepare_store(wanted)
        assert isinstance(slot, Slot)
        store.complete_store(slot, kv_of(wanted), note=b"written down")
        assert store.flush(20.0)
        load = loading(store, wanted, chunk(48))
        assert [load.note(index) for index in (0, 1)] == [b"written down".ljust(room, b"\0"), b""]
        store.complete_load(load)

    def test_what_comes_and_goes_is_told(self, tmp_path: Path) -> None:
        seen: list[Happening] = []
        one, other = chunk(49), chunk(50)
        size = len(one.tokens) * GEOMETRY.token_bytes + 2048
        store = self.open(tmp_path, observe=seen.append, capacity=size)
        stored(store, one, other)
        store.discard(other)
        assert store.flush(20.0)
        keys = [store._key(wanted) for wanted in (one, other)]
        assert [(type(event), event.key) for event in seen if not isinstance(event, Transfer)] == [
            (Kept, keys[0]),
            (Gone, keys[0]),
            (Kept, keys[1]),
            (Gone, keys[1]),
        ]
        assert loaded(store, one, other) == [None, None]
        assert store.stats().chunks == 0
        store.close()

    def test_what_is_discarded_while_it_is_loaded_is_loaded_to_the_end(self, store: KvStore) -> None:
        wanted = chunk(51, LONG)
        stored(store, wanted)
        load = loading(store, wanted)
        store.discard(wanted)
        [kv] = load.whole()
        store.complete_load(load)
        assert kv is None or torch.equal(kv, kv_of(wanted))
        stored(store, wanted)
        assert loaded(store, wanted) != [None]

    def test_a_closed_store_refuses(self, tmp_path: Path) -> None:
        store = self.open(tmp_path)
        store.close()
        assert refused(store.prepare_store(chunk(45))) is Refusal.CLOSED

    def test_unknown_codecs_are_refused(self, store: KvStore) -> None:
        with pytest.raises(ValueError, match="raw, fp8"):
            store.prepare_store(chunk(46), "zip")
        with pytest.raises(ValueError, match="raw, fp8"):
            Options(capacity=1, codec="zip")
