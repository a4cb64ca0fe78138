"""Chunks in several versions, each from another context: kept, found again, chosen, repaired, given up."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachestore.kv import Tiers
from cachestore.kv.controller import Controller
from engine.attention.sdpa import SdpaBackend
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.executor import Executor, Outcome
from engine.reuse.chunks import ChunkKv, ContextIndex
from engine.reuse.hot import Held, Hot
from engine.reuse.idle import PIECE, IdleJobs, Observation
from engine.reuse.known import name_of, text_of
from engine.reuse.trial import Trial
from engine.reuse.versions import Versions
from engine.scheduler import Chunk
from tests.engine import checkpoints
from tests.engine.library import Answer, Rig, document, folder, prompt_of, rig
from tests.engine.test_keeping import chunk_of, words

ONE, TWO, THREE, FOUR = (document(seed) for seed in range(1, 5))
TEXT = text_of("a", words(1))


def context(*names: bytes, impact: float = 0.8) -> ContextIndex:
    """Behind a head its tokens attended to all of these alike."""
    return ContextIndex((b"h", *names), (1.0,) * (len(names) + 1), torch.zeros(40), impact)


# The books


def test_the_version_that_is_used_least_for_its_repair_goes() -> None:
    versions = Versions(2)
    assert versions.room(TEXT) == (0, None)
    versions.add(TEXT, 0, context(b"x"))
    assert versions.room(TEXT) == (1, None)
    versions.add(TEXT, 1, context(b"y"))
    assert versions.room(TEXT) == (2, 0)
    for slot, cost in ((0, 0.1), (1, 0.8), (1, 0.8)):
        versions.used(TEXT, slot, cost)
    assert versions.room(TEXT) == (2, 1)  # twice as often, and eight times as dear
    versions.add(TEXT, 2, None)
    assert versions.room(TEXT) is None
    versions.remove(TEXT, 1)
    assert versions.room(TEXT) == (1, 2)  # without an index it is worth nothing
    for slot in range(4):
        versions.remove(TEXT, slot)
    assert versions.room(TEXT) == (0, None)


def test_the_best_version_is_told_without_its_tokens() -> None:
    versions = Versions(3)
    assert versions.least(TEXT, [b"h", b"x"]) == (True, float("inf"))
    versions.add(TEXT, 0, context(b"x"))
    versions.add(TEXT, 1, context(b"y"))
    assert versions.least(TEXT, [b"h", b"y"]) == (False, 0.0)
    assert versions.least(TEXT, [b"h"]) == (False, 0.8)
    assert versions.least(TEXT, [b"h", b"y"], 1) == (False, 0.8)
    assert [versions.familiar(TEXT, [b"h", name]) for name in (b"x", b"z")] == [True, False]
    assert not versions.familiar(text_of("b", words(1)), [b"h", b"x"])


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), max_size=30))
@settings(max_examples=60)
def test_never_more_than_there_may_be(most: int, uses: list[tuple[int, float]]) -> None:
    versions, kept = Versions(most), set[int]()
    for slot, cost in uses:
        versions.used(TEXT, slot, cost)
        room = versions.room(TEXT)
        assert room is not None
        new, goes = room
        assert new not in kept
        versions.add(TEXT, new, context(b"x"))
        kept.add(new)
        if goes is not None:
            versions.remove(TEXT, goes)
            kept.remove(goes)
        assert len(kept) <= most


def test_hot_versions_of_a_text_stay_and_go_together() -> None:
    def held(slot: int, *names: bytes) -> Held:
        return Held(chunk_of(words(1), before=3, context=context(*names)), True, slot)

    size = held(0).size
    hot = Hot(3 * size)
    other = text_of("a", words(2))
    assert hot.put(TEXT, Held(chunk_of(words(1)), False)) == []
    assert hot.put(TEXT, held(0, b"x")) == []  # instead of the one that was not refined
    assert hot.put(TEXT, held(1, b"y")) == []
    assert hot.put(other, Held(chunk_of(words(2)), False)) == []
    assert (len(hot), hot.used) == (3, 3 * size)
    for name, slot in ((b"x", 0), (b"y", 1)):
        best = hot.get(TEXT, [b"h", name])
        assert best is not None
        assert best.slot == slot
    hot.get(other)
    assert hot.put(other, Held(chunk_of(words(2, 50)), False)) == [TEXT]
    assert hot.check() == []


# In the engine


class Recording(Executor):
    """Keeps the scores of every step that computed more than a token."""

    scores: list[Tensor]

    def run(self, chunks: tuple[Chunk, ...]) -> Outcome:
        outcome = super().run(chunks)
        if any(chunk.count > 1 and chunk.draws for chunk in chunks):
            type(self).scores.append(outcome.scores.clone())
        return outcome


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.write(directory, max_position_embeddings=4096)
    return load_checkpoint(directory, name="tiny")


def take_of(checkpoint: Checkpoint, tokens: list[int]) -> tuple[Tensor, ...]:
    return Trial(checkpoint, len(tokens)).chunk(tokens).layers


def nobody(*_: object) -> Any:
    raise AssertionError


def test_prompts_are_observed_in_pieces_and_no_text_twice_at_a_time(checkpoint: Checkpoint) -> None:
    """A request that comes meanwhile waits for one piece, or for one text to be taken out."""
    found: list[tuple[bytes, str, ChunkKv]] = []
    jobs = IdleJobs(
        checkpoint,
        SdpaBackend(),
        "seen",
        seen=nobody,
        others=nobody,
        refined=nobody,
        compared=nobody,
        indexed=lambda text, tenant, chunk: found.append((text.name, tenant, chunk)),
    )
    tokens = tuple((place * 7) % 251 for place in range(2 * PIECE + 100))
    one, two, three = (text_of("a", words(seed)) for seed in (1, 2, 3))
    texts = ((0, b"head"), (10, one.name), (2 * PIECE, two.name))
    jobs.observe(Observation(tokens, "t", texts, ((one, 10, 50), (two, 2 * PIECE, 2 * PIECE + 40))))
    jobs.observe(Observation(tokens, "t", texts, ((one, 10, 50),)))
    assert len(jobs) == 1
    jobs.observe(Observation(tokens, "t", texts, ((one, 10, 50), (three, 10, 60))))
    assert len(jobs) == 2
    done = []
    while jobs.step():
        done.append(len(found))
    assert done[:7] == [0, 0, 0, 1, 2, 2, 2]  # three pieces, two texts, the end, and the next prompt
    assert [name for name, *_ in found] == [one.name, two.name, three.name]
    assert len(jobs) == 0
    chunk = found[1][2]
    exact = Trial(checkpoint, len(tokens))
    exact.compute(tokens, 1)
    for ours, theirs in zip(chunk.layers, exact.taken(tokens, 2 * PIECE, 2 * PIECE + 40).layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert chunk.context is not None
    assert chunk.context.prefix == (b"head", one.name)
    for other in range(200):
        jobs.observe(Observation(tokens, "t", texts, ((text_of("a", (other,)), 10, 50),)))
    assert len(jobs) == 64


def crafting(checkpoint: Checkpoint, **settings: Any) -> Any:
    return rig(checkpoint, selector="cachecraft", ratio=0.5, stored="seen", **settings)


def asked(made: Rig, *parts: list[int], question: int = 5, **settings: Any) -> Answer:
    prompt, spans = prompt_of(*parts, question=(question, 6, 7, 8))
    return made.ask(prompt, *spans, **settings)


def refined(made: Rig, count: int) -> None:
    made.settled(lambda: made.library.figures().refined == count)
    made.settled()


def test_two_contexts_are_two_versions_and_the_right_one_is_placed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("lmcache", reason="LMCache is not installed: pip install 'hitpath[tiers]'")
    with crafting(checkpoint, tiers=folder(tmp_path)) as made:
        assert asked(made, ONE, TWO).chunks[0] == 0
        refined(made, 2)
        again = asked(made, THREE, TWO)
        assert again.chunks == (1, "pool")
        assert 0 < again.prompted.used.recomputed < len(TWO)
        refined(made, 4)
        assert made.library.figures().store.chunks == 4  # what the prompts had computed has gone
        asked(made, THREE, TWO, question=9)
        made.settled()
        assert made.library.figures().refined == 4
    # Nothing is known as a prefix in another process.
    for parts in ((ONE, TWO), (THREE, TWO)):
        with crafting(checkpoint, tiers=folder(tmp_path), executor=Recording) as made:
            made.settled(lambda made=made: len(made.library.known) == 3)
            Recording.scores = []
            answer = asked(made, *parts)
            assert answer.chunks == (2, "disk")
            assert answer.prompted.used.recomputed == 0
            exact = asked(made, *parts, exact=True)
            assert answer.tokens == exact.tokens
            torch.testing.assert_close(*Recording.scores, atol=1e-3, rtol=0)


@pytest.mark.parametrize("hot", [3, 8], ids=["from the store where that is better", "hot"])
def test_versions_that_are_hot(checkpoint: Checkpoint, hot: int) -> None:
    size = Held(ChunkKv(tuple(ONE), take_of(checkpoint, ONE)), True).size
    with crafting(checkpoint, hot=hot * size, blocks=16) as made:
        for count, parts in ((2, (ONE, TWO)), (4, (THREE, TWO))):
            asked(made, *parts)
            refined(made, count)
        for parts in ((ONE, TWO), (THREE, TWO)):
            asked(made, FOUR, exact=True)
            made.library._controller = Controller(prefill=1.0)  # however long it took to load
            answer = asked(made, *parts)
            assert answer.prompted.cached < 16 * 4
            assert answer.chunks == (2, "pool" if hot == 8 else "memory")
            assert answer.prompted.used.recomputed == 0


def test_before_an_earlier_process_s_chunks_are_looked_through_their_heads_say_which_is_best(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pytest.importorskip("lmcache", reason="LMCache is not installed: pip install 'hitpath[tiers]'")
    with crafting(checkpoint, tiers=folder(tmp_path)) as made:
        asked(made, ONE, TWO)
        refined(made, 2)
        asked(made, THREE, TWO)
        refined(made, 4)
    with crafting(checkpoint, tiers=folder(tmp_path)) as made:
        made.library.versions = Versions(3)
        assert asked(made, THREE, TWO).prompted.used.recomputed == 0


def test_of_a_text_no_more_versions_are_kept_than_the_point_says(checkpoint: Checkpoint) -> None:
    with crafting(checkpoint, versions=2) as made:
        count = 0
        for other in (ONE, THREE, FOUR, document(5)):
            asked(made, other, TWO)
            count += 2
            refined(made, count)
        figures = made.library.figures()
        assert figures.store.chunks == 4 + 2
        assert figures.store.evicted == 0
        assert made.library.store.check() == []


@pytest.mark.parametrize("stored", [True, False])
def test_of_a_text_one_version_is_written_at_a_time(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    with crafting(checkpoint) as made:
        library, go_on = made.library, threading.Event()
        put = library.store._shelf.put
        monkeypatch.setattr(library.store._shelf, "put", lambda *args: go_on.wait(20) and stored and put(*args))
        asked(made, ONE, TWO)
        asked(made, THREE, TWO)
        while len(library.idle_jobs):
            time.sleep(0.005)
        text = text_of("t", TWO)
        (text,) = (key for key in library.hot._chunks if key.name == text.name)
        hot = library.hot.get(text)
        assert hot is not None
        assert hot.chunk.context is not None
        assert hot.chunk.context.prefix[1] == name_of(ONE)  # the later one would have lain where the first is written
        assert library._worse
        go_on.set()
        made.settled()
        assert not library._worse
        # What goes once the first is written has gone, and the next one finds its place.
        assert library.known.holders(text) == ({"pool", "refined"} if stored else {"pool"})
        asked(made, FOUR, TWO)
        made.settled()
        assert library.known.holders(text) == ({"pool", "refined", "refined1"} if stored else {"pool"})


def test_what_is_behind_the_known_prefix_is_named_as_before(checkpoint: Checkpoint) -> None:
    """A text that is not placed, since its blocks are known, is still what the next one's attention was on."""
    with crafting(checkpoint) as made:
        asked(made, ONE, TWO)
        refined(made, 2)
        asked(made, ONE, THREE)
        refined(made, 3)
        answer = asked(made, ONE, THREE, TWO)
        assert answer.prompted.cached > len(ONE)
        assert answer.prompted.used.recomputed == 0  # all that TWO had attended to is there again
        assert asked(made, FOUR, TWO).prompted.used.recomputed > 0


def test_tenants_and_unmarked_runs_and_long_prompts(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.reuse.library.LONGEST", 100)
    with crafting(checkpoint, tiers=Tiers(1 << 26)) as made:
        asked(made, ONE, TWO, tenant="a")  # TWO ends behind what is observed
        refined(made, 1)
        assert made.library.figures().store.chunks == 2
        assert asked(made, TWO, ONE, tenant="b").chunks[0] == 0
        made.settled()
        answer = made.ask([7, 7, *TWO[10:70], 8, 8, *ONE, 9], tenant="a")
        assert answer.chunks[0] == 2
        assert answer.prompted.used.recomputed > 0
