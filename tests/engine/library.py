"""A runner with a library over a small model, asked directly."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachestore.kv import Geometry, Happening, KvStore, Options, Tiers, open_store
from engine.attention.sdpa import SdpaBackend
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint
from engine.executor import BLOCK_SIZE, Executor
from engine.reuse.known import ChunkEvent
from engine.reuse.library import Library
from engine.reuse.point import Loss, OperatingPoint
from engine.runner import Event, Finished, Happened, Job, Progress, Prompted, Runner
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler

BLOCKS, CONTEXT = 256, 4096


def point_for(checkpoint: Checkpoint, **changes: Any) -> OperatingPoint:
    """An operating point that nobody measured."""
    point = OperatingPoint(
        model=checkpoint.fingerprint,
        dtype="float32",
        selector="epic",
        ratio=0.15,
        stored="seen",
        codec="raw",
        loss=Loss(0.0, 1.0, 0.3),
        most_loss=100.0,
        least_agreement=0.01,
        check_share=0.0,
        least=32,
    )
    return replace(point, **changes)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one job."""

    prompted: Prompted
    tokens: list[int]

    @property
    def chunks(self) -> tuple[int, str]:
        return self.prompted.used.chunks, self.prompted.used.tier


class Rig:
    """Runner, library and store."""

    def __init__(self, checkpoint: Checkpoint, runner: Runner, library: Library, told: list[ChunkEvent]) -> None:
        self.checkpoint, self.runner, self.library, self.told = checkpoint, runner, library, told

    def ask(self, prompt: Sequence[int], *spans: tuple[int, int], count: int = 8, **job: Any) -> Answer:
        return self.wait(self.submit(prompt, *spans, count=count, **job))

    def submit(self, prompt: Sequence[int], *spans: tuple[int, int], count: int = 8, **job: Any) -> queue.Queue[Event]:
        events: queue.Queue[Event] = queue.Queue()
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        self.runner.submit([Job(list(prompt), params, events.put, spans=spans, **job)])
        return events

    def wait(self, events: queue.Queue[Event]) -> Answer:
        first = events.get(timeout=20)
        assert isinstance(first, Prompted), first
        tokens = []
        while not isinstance(event := events.get(timeout=20), Finished):
            assert isinstance(event, Progress), event
            tokens.append(event.choice.token)
        return Answer(first, tokens)

    def settled(self, done: Callable[[], bool] = lambda: True) -> None:
        """Wait until what goes on behind the answers is over, and `done`."""
        until = time.monotonic() + 20
        while not done() or self.library.figures().waiting or not self.library.store.flush(5):
            assert time.monotonic() < until
            time.sleep(0.005)


@contextlib.contextmanager
def rig(
    checkpoint: Checkpoint,
    *,
    hot: int = 1 << 24,
    tiers: Tiers | None = None,
    patience: float = 5.0,
    capacity: int = 1 << 26,
    store: Callable[[Callable[[Happening], None]], KvStore] | None = None,
    blocks: int = BLOCKS,
    running: int = 4,
    executor: type[Executor] = Executor,
    **point: Any,
) -> Iterator[Rig]:
    config = checkpoint.config
    geometry = Geometry(checkpoint.fingerprint, config.layers, config.kv_heads, config.head_dim, checkpoint.dtype)
    chosen = point_for(checkpoint, **point)

    def opened(observe: Callable[[Happening], None]) -> KvStore:
        options = Options(capacity=capacity, codec=chosen.codec, patience=patience)
        return open_store(geometry, tiers or Tiers(1 << 26), options, observe=observe).store

    def deliver(happened: Happened) -> None:
        for job, event in happened:
            job.emit(event)

    books = BlockManager(blocks, BLOCK_SIZE, root=b"tiny")
    told: list[ChunkEvent] = []
    backend = SdpaBackend()
    library = Library(
        checkpoint,
        backend,
        chosen,
        open_store=store or opened,
        hot=hot,
        known=books.lookup,
        tell=told.append,
        patience=patience,
        seed=1,
    )
    scheduler = Scheduler(
        books,
        max_running=running,
        max_waiting=64,
        token_budget=256,
        patience=30.0,
        repairs=chosen.repair,
    )
    runner = Runner(
        checkpoint,
        scheduler,
        executor(checkpoint, backend, blocks=blocks, context=CONTEXT),
        deliver=deliver,
        library=library,
    )
    library.open(runner.wake)
    runner.start()
    try:
        yield Rig(checkpoint, runner, library, told)
    finally:
        runner.close()
        scheduler.check()
        assert books.used() == 0
        library.store.flush(5)
        assert library.check() == []
        library.close()


def document(seed: int, length: int = 96) -> list[int]:
    """Tokens that no other seed has in this order."""
    return [(seed * 7919 + place * (31 + seed)) % 251 for place in range(length)]


def prompt_of(*parts: Sequence[int], question: Sequence[int] = (5, 6, 7, 8)) -> tuple[list[int], list[tuple[int, int]]]:
    """A prompt of a short head, these parts with something between them, and a question; and the parts' spans."""
    tokens, spans = [1, 2, 3], []
    for part in parts:
        spans.append((len(tokens), len(tokens) + len(part)))
        tokens += [*part, 9]
    return [*tokens, *question], spans


def folder(path: Path) -> Tiers:
    """Memory and files."""
    return Tiers(1 << 26, path)
