"""What is known, hot, written down and on its way of stored chunks, each by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachestore.kv import Chunk, Geometry, KvStore, Options, Slot, note_size
from cachestore.kv.controller import Choice, Loaded, Plan, Recomputed, Wanted
from cachestore.kv.shelf import Blob, MemoryShelf, Ticket, Tier
from engine.reuse.cachecraft import overlap
from engine.reuse.chunks import ChunkKv, ContextIndex
from engine.reuse.fetching import Fetch, Order
from engine.reuse.hot import Held, Hot
from engine.reuse.idle import compared
from engine.reuse.known import Known, text_of
from engine.reuse.writing import REFINED, SEEN, note_of, read_note, refined_as, stacked

LAYERS, HEADS, SIZE = 3, 2, 4
GEOMETRY = Geometry("weights", LAYERS, HEADS, SIZE, torch.float32)


def chunk_of(tokens: Sequence[int], **settings: object) -> ChunkKv:
    generator = torch.Generator().manual_seed(sum(tokens))
    layers = tuple(torch.randn(2, len(tokens), HEADS, SIZE, generator=generator) for _ in range(LAYERS))
    return ChunkKv(tuple(tokens), layers, **settings)  # type: ignore[arg-type]


def words(seed: int, count: int = 40) -> tuple[int, ...]:
    return tuple((seed * 97 + place * (seed + 3)) % 1009 for place in range(count))


# Notes


@given(
    st.integers(1, 30), st.booleans(), st.integers(0, 2**31), st.none() | st.integers(1, 2**31), st.booleans(),
    st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60)
def test_a_note_says_what_was_written(
    count: int, refined: bool, before: int, span: int | None, sensitive: bool, padding: int
) -> None:
    sensitivity = torch.linspace(0, 1e9, count) if sensitive else None
    chunk = chunk_of(range(count), before=before, span=span, sensitivity=sensitivity)
    note = note_of(chunk, refined=refined)
    assert len(note) <= note_size(count)
    noted = read_note(note + b"\0" * padding, count)
    assert (noted.refined, noted.before, noted.span) == (refined, before, span)
    assert (noted.sensitivity is None) == (sensitivity is None)
    again = noted.chunk(chunk.tokens, chunk.layers)
    assert sensitivity is None or torch.equal(again.sensitivity, sensitivity)  # type: ignore[arg-type]


@given(st.integers(1, 40), st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0, 1), st.integers(0, 16))
@settings(max_examples=100)
def test_a_note_has_the_context_index_as_far_as_there_is_room(
    count: int, inter: list[float], impact: float, slot: int
) -> None:
    names = tuple(bytes([place + 1] * 8) for place in range(len(inter)))
    outside = torch.linspace(0, 1, count)
    chunk = chunk_of(range(count), before=7, context=ContextIndex(names, tuple(inter), outside, impact))
    note = note_of(chunk, refined=True, slot=slot)
    assert len(note) <= note_size(count)
    noted = read_note(note.ljust(note_size(count), b"\0"), count)
    assert (noted.refined, noted.slot, noted.before) == (True, slot, 7)
    context = noted.context
    most = (note_size(count) - 18 - 2 * count) // 10
    if most < len(inter) and most < 2:
        assert context is None
        return
    assert context is not None
    assert context.impact == pytest.approx(impact, rel=1e-6)
    torch.testing.assert_close(context.outside, outside, atol=1e-3, rtol=0)
    assert len(context.prefix) == min(most, len(inter))
    assert context.prefix[0] == names[0]
    known = dict(zip(names, inter, strict=True))
    for name, mass in zip(context.prefix, context.inter, strict=True):
        assert name not in known or mass == pytest.approx(min(known[name], 65_000), rel=1e-3, abs=1e-6)
    assert [name for name in context.prefix if name in known] == sorted(name for name in context.prefix if any(name))
    if len(inter) <= most:
        assert overlap(context, names) == 1.0


def test_a_chunk_without_a_note_is_a_plain_one() -> None:
    noted = read_note(b"", 5)
    assert (noted.refined, noted.slot, noted.before, noted.span) == (False, 0, 0, None)
    assert noted.sensitivity is None
    assert noted.context is None


# Known


def test_texts_are_forgotten_with_their_last_holder() -> None:
    known = Known(1000)
    text = text_of("a", words(1))
    assert known.add(text, words(1), SEEN)
    assert not known.add(text, words(1), REFINED)
    assert not known.remove(text, SEEN)
    [match] = known.find("a", [7, *words(1)[5:], 7], 0, 16)
    assert (match.text, match.start, match.stop, match.offset) == (text, 1, 36, 5)
    assert known.find("b", words(1), 0, 16) == ()
    assert known.remove(text, REFINED)
    assert known.find("a", words(1), 0, 16) == ()
    assert not known.remove(text, REFINED)
    assert known.check() == []


def test_the_least_recently_found_text_goes_first() -> None:
    known = Known(100)
    for seed in (1, 2):
        known.add(text_of("a", words(seed)), words(seed), SEEN)
    assert known.find("a", words(1), 0, 16)
    known.add(text_of("b", words(3)), words(3), SEEN)
    assert [bool(known.find(owner, words(seed), 0, 16)) for owner, seed in (("a", 1), ("a", 2), ("b", 3))] == [
        True,
        False,
        True,
    ]
    assert known.others(text_of("a", words(1)), 5) == []
    known.add(text_of("a", words(4, 200)), words(4, 200), SEEN)  # more than there may be
    assert len(known) == 2
    assert known.check() == []


# Hot


def test_hot_chunks_are_bounded_and_the_better_version_stays() -> None:
    size = Held(chunk_of(words(1)), False).size
    hot = Hot(2 * size)
    one, two, three = (text_of("a", words(seed)) for seed in (1, 2, 3))
    assert hot.put(one, Held(chunk_of(words(1)), True)) == []
    assert hot.put(one, Held(chunk_of(words(1)), False)) == []
    held = hot.get(one)
    assert held is not None
    assert held.refined
    hot.put(two, Held(chunk_of(words(2)), False))
    hot.get(one)
    assert hot.put(three, Held(chunk_of(words(3)), False)) == [two]
    assert hot.put(two, Held(chunk_of(words(2, 200)), False)) == [two]
    assert (len(hot), hot.used, hot.check()) == (2, 2 * size, [])


# Checks


def test_divergence_is_that_of_the_first_token() -> None:
    scores = torch.randn(50)
    same = compared(scores, scores[None] + 3.0)
    assert same.kl == pytest.approx(0.0, abs=1e-5)
    assert same.agrees
    other = scores.clone()
    other[int(scores.argmax())] = -torch.inf
    assert compared(other, scores).kl > 0
    assert not compared(scores, other).agrees


# Fetching


class SlowShelf(MemoryShelf):
    """Blobs come when the test says so, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def fetch(self, blob: Blob) -> Ticket:
        return _Slow(super().fetch(blob), self.go)


class _Slow:
    def __init__(self, ticket: Ticket, go: threading.Event) -> None:
        self._ticket, self._go = ticket, go

    @property
    def tier(self) -> Tier:
        return self._ticket.tier

    def done(self, timeout: float = 0.0) -> bool:
        return self._go.wait(timeout)

    def code(self) -> torch.Tensor | None:
        return self._ticket.code()

    def release(self) -> None:
        self._ticket.release()


def all_loaded(wanted: Sequence[Wanted]) -> Plan:
    choices: tuple[Choice, ...] = tuple(
        Loaded(one.sources[0], 0.0) if one.sources else Recomputed(0.0) for one in wanted
    )
    return Plan(choices, 0.2, 0.0, 0.0)


class Fetching:
    def __init__(self, patience: float = 5.0) -> None:
        self.shelf = SlowShelf()
        self.store = KvStore(GEOMETRY, self.shelf, Options(1 << 20, codec="raw", patience=patience))
        self.executor = ThreadPoolExecutor(1)
        self.changes = 0

    def keep(self, chunk: ChunkKv, variant: str, *, refined: bool = False, slot: int = 0) -> Chunk:
        named = Chunk(chunk.tokens, "t", variant)
        taken = self.store.prepare_store(named)
        assert isinstance(taken, Slot)
        self.store.complete_store(taken, stacked(chunk), note=note_of(chunk, refined=refined, slot=slot))
        assert self.store.flush(5)
        return named

    def begin(self, *orders: tuple[Chunk, ...], patience: float = 5.0, prefix: tuple[bytes, ...] = ()) -> Fetch:
        def changed() -> None:
            self.changes += 1

        return Fetch(
            self.store,
            [Order(text_of("t", order[0].tokens), order, len(order[0].tokens), prefix) for order in orders],
            all_loaded,
            executor=self.executor,
            changed=changed,
            device=torch.device("cpu"),
            patience=patience,
        )

    def close(self) -> None:
        self.executor.shutdown()
        assert self.store.check() == []
        self.store.close()


def test_layers_are_waited_for_and_the_best_version_is_taken() -> None:
    fetching = Fetching()
    seen, refined = chunk_of(words(1)), chunk_of(words(1), before=3, sensitivity=torch.ones(40))
    versions = (fetching.keep(refined, REFINED, refined=True), fetching.keep(seen, SEEN))
    other = fetching.keep(chunk_of(words(2)), SEEN)
    fetch = fetching.begin(versions, (other,), (Chunk(words(3), "t", SEEN),))
    assert not fetch.planned
    fetching.shelf.go.set()
    for layer in range(LAYERS):
        piece = fetch.layer(0, layer)
        assert piece is not None
        assert torch.equal(piece, refined.layers[layer])
    fetching.executor.shutdown()
    assert (fetch.planned, fetch.over, fetch.ratio) == (True, True, 0.2)
    assert fetching.changes in (1, 2)  # what comes fast is planned when it is over
    whole = fetch.chunk(0)
    assert whole is not None
    assert (whole.before, len(whole.layers)) == (3, LAYERS)
    assert fetch.note(2) is None
    assert fetch.chunk(2) is None
    assert fetch.tiers == {0: Tier.MEMORY, 1: Tier.MEMORY}
    fetching.close()


def test_of_several_versions_the_one_from_the_nearest_context_is_taken() -> None:
    fetching = Fetching()
    fetching.shelf.go.set()
    kept = []
    for slot, name in enumerate((b"x" * 8, b"y" * 8, b"z" * 8)):
        context = ContextIndex((b"h" * 8, name), (1.0, 1.0), torch.zeros(40), 0.9)
        chunk = chunk_of(words(1), before=slot + 1, context=context)
        kept.append(fetching.keep(chunk, refined_as(slot), refined=True, slot=slot))
    for slot, name in ((1, b"y" * 8), (2, b"z" * 8), (0, b"w" * 8)):
        fetch = fetching.begin((*kept, Chunk(words(1), "t", SEEN)), prefix=(b"h" * 8, name))
        while not fetch.over:
            time.sleep(0.001)
        noted = fetch.note(0)
        assert noted is not None
        assert (noted.slot, noted.before) == (slot, slot + 1)
    fetching.close()


def test_what_does_not_answer_is_not_waited_for_longer_than_patience() -> None:
    fetching = Fetching()
    named = fetching.keep(chunk_of(words(1)), SEEN)
    fetch = fetching.begin((named,), patience=0.01)
    fetching.executor.shutdown()
    assert fetch.over
    assert fetch.note(0) is None
    fetching.shelf.go.set()
    fetching.close()


def test_who_waits_for_a_layer_when_nobody_wants_it_any_more_is_told_so() -> None:
    fetching = Fetching()
    named = fetching.keep(chunk_of(words(1)), SEEN)
    fetch = fetching.begin((named,))
    threading.Timer(0.05, fetch.close).start()
    assert fetch.layer(0, 0) is None
    fetching.shelf.go.set()
    fetching.close()
    assert fetch.over
