"""The worker thread with prompts whose chunks are there, late, lost or in the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from torch import Tensor

from engine.attention import KvPool
from engine.attention.sdpa import SdpaBackend
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.errors import QueueFull
from engine.executor import BLOCK_SIZE, Executor, Outcome
from engine.reuse.selectors import Nothing
from engine.runner import Failed, Happened, Job, Prompted, Runner
from engine.scheduler import Chunk, Scheduler
from engine.sequence import Sequence
from tests.engine import checkpoints
from tests.engine.blending import Chunks, as_it_stands, some
from tests.engine.test_runner import Asked

PROMPT = some(60, 1)
SPANS = [(4, 30), (33, 55)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.write(directory)
    return load_checkpoint(directory, name="tiny")


@pytest.fixture
def chunks(checkpoint: Checkpoint) -> Chunks:
    return Chunks(as_it_stands(checkpoint, PROMPT, SPANS), Nothing())


class Shelf:
    """Has these chunks for this prompt, and nothing for others."""

    def __init__(self, chunks: Chunks | None) -> None:
        self.chunks = chunks

    def begin(self, job: Job, row: Sequence) -> None:
        if job.prompt == PROMPT and self.chunks is not None:
            row.reuse, row.salt = self.chunks, "reuse"

    def computed(self, tokens: int, seconds: float) -> None:
        assert tokens > 1

    def told(self, pool: KvPool) -> None:
        pass

    def idle(self) -> bool:
        return False


class Running:
    """Runners that end with the test."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.all = checkpoint, list[Runner]()

    def __call__(self, chunks: Chunks | None, *, executor: type[Executor] = Executor) -> Runner:
        def deliver(happened: Happened) -> None:
            for job, event in happened:
                job.emit(event)

        books = BlockManager(64, BLOCK_SIZE, root=b"tiny")
        scheduler = Scheduler(books, max_running=4, max_waiting=2, token_budget=32, patience=30.0)
        computing = executor(self._checkpoint, SdpaBackend(), blocks=64, context=128)
        self.all.append(Runner(self._checkpoint, scheduler, computing, deliver=deliver, library=Shelf(chunks)))
        return self.all[-1]


@pytest.fixture
def running(checkpoint: Checkpoint) -> Iterator[Running]:
    made = Running(checkpoint)
    yield made
    for runner in made.all:
        runner.close()


def asked(prompt: list[int] = PROMPT) -> Asked:
    one = Asked(max_tokens=6)
    one.job.prompt = prompt
    return one


def answered(runner: Runner, one: Asked) -> tuple[Prompted, list[int]]:
    runner.submit([one.job])
    return told(one)


def told(one: Asked) -> tuple[Prompted, list[int]]:
    first = one.events.get(timeout=20)
    assert isinstance(first, Prompted)
    return first, one.answer()[0]


def test_the_answer_is_the_same_and_says_what_was_kept(running: Running, chunks: Chunks) -> None:
    plain, blending = running(None), running(chunks)
    plain.start()
    blending.start()
    expected = answered(plain, asked())
    first, tokens = answered(blending, asked())
    assert tokens == expected[1]
    assert (expected[0].kept, first.cached, first.kept) == (0, 0, 48)
    blending.close()
    assert chunks.calls == ["admitted", "layer 0", "layer 1", "layer 2", "prefilled", "scored", "released"]


def test_a_lost_chunk_is_computed(running: Running, chunks: Chunks) -> None:
    plain, losing = running(None), running(chunks)
    chunks.lost_at = 1
    other, same = asked(some(20, 3)), asked(some(20, 3))
    plain.submit([asked().job, same.job])
    lost = asked()
    losing.submit([lost.job, other.job])  # not started: both are in its first step
    plain.start()
    losing.start()
    first, tokens = told(lost)
    assert first.kept == 0
    assert tokens == answered(plain, asked())[1]
    assert told(other) == told(same)
    assert losing.depth() == (0, 0)


def test_who_waits_for_chunks_is_woken(running: Running, chunks: Chunks) -> None:
    runner = running(chunks)
    chunks.waits = chunks.needed = True
    runner.start()
    held, other = asked(), asked(some(20, 3))
    runner.submit([held.job])
    assert answered(runner, other)[0].kept == 0
    assert chunks.calls == []
    assert runner.depth() == (0, 1)
    chunks.waits = False
    runner.wake()
    assert told(held)[0].kept == 48


def test_who_is_refused_lets_go_of_its_chunks(running: Running, chunks: Chunks) -> None:
    runner = running(chunks)  # not started: everything waits
    runner.submit([asked(some(20, 3)).job])
    with pytest.raises(QueueFull):
        runner.submit([asked().job, asked(some(9, 1)).job])
    assert chunks.calls == ["released"]


class Breaking(Executor):
    """Cannot compute a prompt that begins with 66."""

    def run(self, chunks: tuple[Chunk, ...]) -> Outcome:
        outcome = super().run(chunks)
        if any(chunk.sequence.prompt[0] == 66 for chunk in chunks):
            raise ArithmeticError("broken")
        return outcome


def test_a_step_that_breaks_is_run_again_with_its_chunks(running: Running, chunks: Chunks) -> None:
    plain, breaking = running(None), running(chunks, executor=Breaking)
    bad, good = asked([66, 1, 2]), asked()
    breaking.submit([bad.job, good.job])
    plain.start()
    breaking.start()
    assert isinstance(bad.events.get(timeout=20), Failed)
    assert told(good)[1] == answered(plain, asked())[1]


def test_what_cannot_be_taken_breaks_no_answer(running: Running, chunks: Chunks) -> None:
    class Full(Chunks):
        def prefilled(self, sequence: Sequence, pool: KvPool, slots: Tensor) -> None:
            raise OSError("no room")

    runner = running(Full(chunks.prompt, chunks.selector))
    runner.start()
    assert len(answered(runner, asked())[1]) == 6


def test_chunks_come_while_others_are_computed(running: Running, chunks: Chunks) -> None:
    """A layer may be waited for: those in the same step wait with it, and nobody is lost."""
    come = threading.Event()

    class Slow(Chunks):
        def layer(self, index: int) -> list[Tensor | None]:
            assert come.wait(20)
            return super().layer(index)

    runner = running(Slow(chunks.prompt, chunks.selector))
    both = asked(), asked(some(20, 3))
    runner.submit([one.job for one in both])
    runner.start()
    come.set()
    assert [len(told(one)[1]) for one in both] == [6, 6]
