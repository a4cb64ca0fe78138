"""Chunks of prompts through the runner: found, fetched, placed, kept, refined, checked."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from cachestore.kv import Geometry, Happening, Key, KvStore, Lost, Options, Tier
from cachestore.kv.shelf import Blob, MemoryShelf, Ticket
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.reuse.known import ChunkRemoved, ChunkStored
from engine.runner import Event, Finished, Job
from engine.sampling import SamplingParams
from tests.engine import checkpoints
from tests.engine.library import Rig, document, folder, prompt_of, rig

ONE, TWO, THREE = document(1), document(2), document(3, 120)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.write(directory, max_position_embeddings=4096)
    return load_checkpoint(directory, name="tiny")


@pytest.fixture
def reusing(checkpoint: Checkpoint) -> Iterator[Rig]:
    with rig(checkpoint) as made:
        yield made


def asked(made: Rig, *parts: list[int], **settings: object) -> tuple[int, str]:
    prompt, spans = prompt_of(*parts)
    return made.ask(prompt, *spans, **settings).chunks  # type: ignore[arg-type]


def test_documents_in_another_order_are_reused(reusing: Rig) -> None:
    prompt, spans = prompt_of(ONE, TWO)
    cold = reusing.ask(prompt, *spans)
    assert (cold.chunks, cold.prompted.cached) == ((0, "none"), 0)
    prompt, spans = prompt_of(TWO, ONE)
    warm = reusing.ask(prompt, *spans)
    assert warm.chunks == (2, "pool")
    assert warm.prompted.cached == 0
    again = round(0.15 * len(ONE)) + round(0.15 * len(TWO))
    assert warm.prompted.used.recomputed == again
    assert warm.prompted.used.kept == warm.prompted.kept == len(ONE) + len(TWO) - again
    figures = reusing.library.figures()
    assert (figures.prompts, figures.placed, figures.kept, figures.recomputed) == (1, 2, warm.prompted.kept, again)
    assert figures.hot_hits == 2


def test_with_everything_computed_again_answers_are_those_without_reuse(checkpoint: Checkpoint) -> None:
    orders = [(ONE, TWO, THREE), (THREE, ONE, TWO), (TWO, ONE), (THREE, THREE)]
    with rig(checkpoint, selector="full") as made:
        prompts = [prompt_of(*order) for order in orders]
        blended = [made.ask(prompt, *spans, count=12) for prompt, spans in prompts]
        exact = [made.ask(prompt, *spans, count=12, exact=True) for prompt, spans in prompts]
    assert [answer.tokens for answer in blended] == [answer.tokens for answer in exact]
    assert [answer.chunks[0] for answer in blended] == [0, 3, 2, 1]  # the last begins like the second
    assert [answer.prompted.kept for answer in blended] == [0] * 4
    assert all(answer.chunks == (0, "none") for answer in exact)


def test_what_is_known_exactly_goes_first(reusing: Rig) -> None:
    prompt, spans = prompt_of(ONE, TWO)
    reusing.ask(prompt, *spans)
    answer = reusing.ask([*prompt, *THREE, *ONE, 4], *spans)
    assert answer.prompted.cached >= len(prompt) // 16 * 16
    assert answer.chunks == (1, "pool")  # ONE once more, behind what is known


def test_runs_that_nobody_marked_are_found_wherever_they_begin(reusing: Rig) -> None:
    prompt, spans = prompt_of(ONE, THREE)
    reusing.ask(prompt, *spans)
    answer = reusing.ask([7, 7, *THREE[10:110], 8, 8, *ONE[:15], 9])  # of ONE too little
    assert answer.chunks == (1, "pool")
    assert answer.prompted.used.kept + answer.prompted.used.recomputed == 100


def test_of_a_text_that_is_partly_known_the_rest_is_kept(reusing: Rig) -> None:
    """As with prompts that are one message, and begin alike."""
    for text in ([*THREE, *ONE], [*THREE, *TWO]):
        reusing.ask([1, *text, 5], (1, 1 + len(text)))
    answer = reusing.ask([2, *TWO, 8, *ONE, 9])
    assert answer.chunks[0] == 2
    used = answer.prompted.used
    assert used.kept + used.recomputed >= len(ONE) + len(TWO) - 16  # blocks of the prefix are whole


def test_of_a_text_in_which_a_chunk_stands_the_rest_is_kept(reusing: Rig) -> None:
    reusing.ask([1, *ONE, 5], (1, 1 + len(ONE)))
    text = [*THREE, *ONE, *TWO]
    assert reusing.ask([2, *text, 5], (1, 1 + len(text))).chunks[0] == 1
    assert reusing.ask([3, *TWO, 8, *THREE, 9]).chunks[0] == 2


def test_tenants_do_not_see_each_others_chunks(reusing: Rig) -> None:
    assert asked(reusing, ONE, TWO, tenant="a")[0] == 0
    assert asked(reusing, TWO, ONE, tenant="b")[0] == 0
    assert asked(reusing, TWO, ONE, tenant="a") == (2, "pool")


def test_who_wants_it_exact_neither_reuses_nor_meets_what_was_reused(reusing: Rig) -> None:
    prompt, spans = prompt_of(ONE, TWO)
    reusing.ask(prompt, *spans)
    prompt, spans = prompt_of(TWO, ONE)
    reusing.ask(prompt, *spans)
    exact = reusing.ask(prompt, *spans, exact=True)
    assert (exact.chunks, exact.prompted.cached) == ((0, "none"), 0)
    assert reusing.ask(prompt, *spans, exact=True).prompted.cached > 0
    assert reusing.ask(prompt, *spans).prompted.cached > 0  # its own kind


def test_what_is_not_hot_comes_from_the_store(checkpoint: Checkpoint) -> None:
    with rig(checkpoint, hot=0) as made:
        assert asked(made, ONE, TWO)[0] == 0
        made.settled()
        assert made.library.figures().store.chunks == 2
        assert asked(made, TWO, ONE) == (2, "memory")
        assert made.library.figures().store.hits == {Tier.MEMORY: 2}
        assert {type(event) for event in made.told} == {ChunkStored}
        assert {event.tokens for event in made.told if isinstance(event, ChunkStored)} == {tuple(ONE), tuple(TWO)}


def test_of_what_was_reused_nothing_is_stored(reusing: Rig) -> None:
    asked(reusing, ONE, TWO)
    asked(reusing, TWO, ONE, THREE)
    reusing.settled()
    figures = reusing.library.figures()
    assert figures.store.stored - figures.refined == figures.store.chunks == 3


def test_what_the_store_evicts_is_forgotten(checkpoint: Checkpoint) -> None:
    size = 100 * checkpoint.config.layers * 2 * checkpoint.config.kv_heads * checkpoint.config.head_dim * 4 + 4096
    with rig(checkpoint, hot=0, capacity=size) as made:
        for part in (ONE, TWO):
            asked(made, part)
            made.settled()
        assert len(made.library.known) == 1
        assert asked(made, ONE, THREE[:40]) == (0, "none")
        made.settled()
        assert any(isinstance(event, ChunkRemoved) for event in made.told)


def test_an_earlier_process_left_chunks_for_marked_and_unmarked_texts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("lmcache", reason="LMCache is not installed: pip install 'hitpath[tiers]'")
    with rig(checkpoint, tiers=folder(tmp_path)) as made:
        asked(made, ONE, TWO, tenant="a")
        made.settled()
    with rig(checkpoint, tiers=folder(tmp_path)) as made:
        made.settled(lambda: len(made.library.known) == 2)
        prompt, spans = prompt_of(TWO)
        assert made.ask([*prompt, *ONE, 1], *spans, tenant="a").chunks == (2, "disk")
        assert asked(made, ONE, tenant="b")[0] == 0
        made.settled()
        path = next(path for path in sorted(tmp_path.glob("*/*.data")) if path.name.split("@")[2] == "1")
        shutil.rmtree(path.parent)
    # The store closes; the next finds nothing, and says so by computing.
    with rig(checkpoint, tiers=folder(tmp_path)) as made:
        assert asked(made, ONE, TWO, tenant="a") == (0, "none")


def test_damaged_files_are_computed_and_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("lmcache", reason="LMCache is not installed: pip install 'hitpath[tiers]'")
    with rig(checkpoint, tiers=folder(tmp_path), selector="full") as made:
        prompt, spans = prompt_of(ONE, TWO)
        expected = made.ask(prompt, *spans).tokens
        made.settled()
    for path in tmp_path.glob("*/*.data"):
        if path.name.split("@")[2] != "0":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
    with rig(checkpoint, tiers=folder(tmp_path), selector="full") as made:
        made.settled(lambda: len(made.library.known) == 2)
        answer = made.ask(prompt, *spans)
        assert answer.tokens == expected
        assert answer.chunks == (0, "none")
        made.settled()
        assert made.library.figures().store.lost == {Lost.DAMAGED: 2}


@pytest.mark.parametrize("stored", ["seen", "alone", "head", "mean"])
def test_when_there_is_time_chunks_are_refined(
    checkpoint: Checkpoint, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Proving an attention backend takes longer than the chunk, and a request may be waiting.
    monkeypatch.delattr("engine.reuse.trial.choose")
    with rig(checkpoint, stored=stored, selector="sensitive", hot=0) as made:
        asked(made, ONE, TWO)
        made.settled(lambda: made.library.figures().refined == 2)
        made.settled(lambda: made.library.figures().store.chunks == 2)
        prompt, spans = prompt_of(TWO, ONE)
        answer = made.ask(prompt, *spans)
        assert answer.chunks == (2, "memory")
        assert answer.prompted.used.recomputed == round(0.15 * (len(ONE) + len(TWO)))
        made.settled()
        assert made.library.figures().refined == 2


def test_who_has_an_answer_sees_that_its_texts_are_still_to_be_kept(checkpoint: Checkpoint) -> None:
    prompt, spans = prompt_of(ONE, TWO)
    waiting: list[int] = []
    with rig(checkpoint, stored="mean") as made:
        over = threading.Event()

        def heard(event: Event) -> None:
            if isinstance(event, Finished):
                waiting.append(made.library.figures().waiting)
                over.set()

        made.runner.submit([Job(prompt, SamplingParams(max_tokens=1), heard, spans=spans)])
        assert over.wait(20)
        made.settled()
        assert made.library.figures().refined == 2
    assert waiting == [2]


def test_checks_switch_reuse_off_when_it_loses_too_much(checkpoint: Checkpoint) -> None:
    with rig(checkpoint, selector="none", most_loss=1e-9, check_share=1.0) as made:
        asked(made, ONE, TWO, THREE)
        asked(made, THREE, TWO, ONE)
        for place in range(200):
            prompt, _ = prompt_of(THREE, TWO, ONE)
            made.ask([place % 250, place // 250, *prompt], count=1)
            made.settled()
            if not made.library.gate.open:
                break
        figures = made.library.figures()
        assert (figures.gate.open, figures.gate.closings) == (False, 1)
        checks = figures.gate.checks
        assert asked(made, TWO, THREE, ONE, TWO) == (0, "none")
        made.settled()
        assert made.library.figures().gate.checks == checks + 1  # they go on


class Broken(MemoryShelf):
    """Cannot be asked for anything."""

    def fetch(self, blob: Blob) -> Ticket:
        raise OSError("broken")

    def tier(self, key: Key, index: int) -> Tier:
        raise OSError("broken")


def test_a_store_that_breaks_costs_nobody_an_answer(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    config = checkpoint.config
    geometry = Geometry(checkpoint.fingerprint, config.layers, config.kv_heads, config.head_dim, checkpoint.dtype)

    def opened(observe: Callable[[Happening], None]) -> KvStore:
        return KvStore(geometry, Broken(), Options(1 << 24, codec="raw"), observe=observe)

    with rig(checkpoint, hot=0, store=opened) as made:
        assert asked(made, ONE, TWO)[0] == 0
        made.settled()
        prompt, spans = prompt_of(TWO, ONE)
        assert made.ask(prompt, *spans).tokens == made.ask(prompt, *spans, exact=True).tokens
        made.library.store._asked = 0  # what broke while it was asked never came back
    assert "chunks could not be looked for" in caplog.text


@pytest.mark.parametrize("stalled", ["heads", "parts"])
def test_a_store_that_does_not_answer_is_not_waited_for(checkpoint: Checkpoint, stalled: str) -> None:
    shelf = Stalling(range(1) if stalled == "heads" else range(1, 9))
    config = checkpoint.config
    geometry = Geometry(checkpoint.fingerprint, config.layers, config.kv_heads, config.head_dim, checkpoint.dtype)

    def opened(observe: Callable[[Happening], None]) -> KvStore:
        return KvStore(geometry, shelf, Options(1 << 24, codec="raw", patience=0.1), observe=observe)

    with rig(checkpoint, hot=0, store=opened, patience=0.1, selector="full") as made:
        asked(made, ONE, TWO)
        made.settled()
        prompt, spans = prompt_of(TWO, ONE)
        late = made.ask(prompt, *spans)
        assert late.chunks == (0, "none")
        assert late.tokens == made.ask(prompt, *spans, exact=True).tokens
        made.settled()
        assert made.library.figures().store.lost == {Lost.LATE: 1 if stalled == "heads" else 2}


class Stalling(MemoryShelf):
    """These of every chunk's blobs never come."""

    def __init__(self, stalled: range) -> None:
        super().__init__()
        self._stalled = stalled

    def fetch(self, blob: Blob) -> Ticket:
        return Never() if blob.index in self._stalled else super().fetch(blob)


class Never:
    """A ticket for what does not come."""

    tier = Tier.DISK

    def done(self, timeout: float = 0.0) -> bool:
        time.sleep(timeout)
        return False

    def code(self) -> Tensor | None:
        return None

    def release(self) -> None:
        pass


def test_answers_given_up_leave_nothing_behind(checkpoint: Checkpoint) -> None:
    with rig(checkpoint, hot=0) as made:
        asked(made, ONE, TWO)
        made.settled()
        prompt, spans = prompt_of(TWO, ONE)
        for _ in range(20):
            made.submit(prompt, *spans, count=1000)
            with made.runner._changed:
                jobs = list(made.runner._rows)
            made.runner.cancel(jobs)
        assert asked(made, TWO, ONE)[0] <= 2  # it may know the prefix by now
        made.settled()
        assert made.library.store.check() == []


def test_many_at_once_get_what_they_get_alone(checkpoint: Checkpoint) -> None:
    orders = [(ONE, TWO), (TWO, ONE), (THREE, ONE), (TWO, THREE), (ONE, THREE, TWO)]
    with rig(checkpoint, selector="full", hot=0, blocks=48, running=4) as made:
        prompts = [prompt_of(*order) for order in orders]
        alone = [made.ask(prompt, *spans, exact=True).tokens for prompt, spans in prompts]
        for _ in range(3):
            waiting = [made.submit(prompt, *spans) for prompt, spans in prompts]
            assert [made.wait(events).tokens for events in waiting] == alone
            made.settled()
