"""A pool without tensors: each slot holds a number that stands for its token and all tokens before it.

Like keys and values, a slot is computed from what the slots before it hold, so a wrong block shows in all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Row

from engine.blocks import AllCleared, BlockEvent, BlockManager, BlockRemoved, BlockStored
from engine.hashing import chain
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler, Step
from engine.sequence import Sequence, State


def sequence(
    prompt: Row[int], max_tokens: int = 4, *, tenant: str = "", parent: Sequence | None = None, fresh: bool = False
) -> Sequence:
    return Sequence(list(prompt), SamplingParams(max_tokens=max_tokens), tenant=tenant, parent=parent, fresh=fresh)


class Pool:
    """Slots of all blocks, and the pass that fills them."""

    def __init__(self, total: int, size: int) -> None:
        self.size = size
        self.slots = [[0] * size for _ in range(total)]

    def copy(self, copies: Iterable[tuple[int, int]]) -> None:
        for source, target in copies:
            self.slots[target] = list(self.slots[source])

    def read(self, sequence: Sequence, position: int) -> int:
        return self.slots[sequence.table[position // self.size]][position % self.size]

    def write(self, sequence: Sequence, start: int, count: int) -> None:
        for position in range(start, start + count):
            before = self.read(sequence, position - 1) if position else hash(sequence.tenant)
            block = self.slots[sequence.table[position // self.size]]
            block[position % self.size] = hash((before, sequence.tokens[position]))

    def verify(self, sequence: Sequence) -> None:
        """Its blocks hold its computed tokens, and nothing else."""
        value = hash(sequence.tenant)
        for position in range(sequence.computed):
            value = hash((value, sequence.tokens[position]))
            assert self.read(sequence, position) == value, (position, sequence.tokens, sequence.table)


class Listener:
    """Follows the events as a router would; an event that makes no sense fails."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()

    def __call__(self, event: BlockEvent) -> None:
        match event:
            case BlockStored(hashes, parent, tokens, size):
                assert len(tokens) == size * len(hashes)
                assert self.known.isdisjoint(hashes)
                for place, name in enumerate(hashes):
                    before = hashes[place - 1] if place else parent
                    assert before is None or name == chain(before, tokens[place * size : place * size + size])
                self.known.update(hashes)
            case BlockRemoved(hashes):
                assert self.known.issuperset(hashes)
                self.known.difference_update(hashes)
            case AllCleared():
                self.known.clear()


class Engine:
    """Scheduler, blocks and pool; an answer is whatever `draw` says, and ends with `max_tokens`."""

    def __init__(
        self,
        *,
        total: int = 64,
        size: int = 4,
        max_running: int = 8,
        max_waiting: int = 100,
        token_budget: int = 16,
        patience: float = 1000.0,
        draw: Callable[[Sequence], int] = lambda sequence: len(sequence.tokens) % 3,
    ) -> None:
        self.listener = Listener()
        self.blocks = BlockManager(total, size, root=b"model", sink=self.listener)
        self.scheduler = Scheduler(
            self.blocks,
            max_running=max_running,
            max_waiting=max_waiting,
            token_budget=token_budget,
            patience=patience,
        )
        self.pool = Pool(total, size)
        self.now = 0.0
        self.admitted: list[Sequence] = []
        """In the order of their first piece."""
        self._draw = draw

    def add(self, *sequences: Sequence) -> None:
        self.scheduler.add(sequences, self.now)

    def begin(self) -> Step | None:
        """Schedule and compute, without telling the scheduler yet."""
        self.now += 1.0
        step = self.scheduler.schedule(self.now)
        if step is None:
            return None
        self.pool.copy(step.copies)
        for chunk in step.chunks:
            assert chunk.start == chunk.sequence.computed
            assert chunk.draws == (chunk.start + chunk.count == len(chunk.sequence.tokens))
            self.pool.write(chunk.sequence, chunk.start, chunk.count)
            if chunk.sequence not in self.admitted:
                self.admitted.append(chunk.sequence)
        return step

    def end(self, step: Step) -> None:
        self.scheduler.complete(step, {c.sequence: self._draw(c.sequence) for c in step.chunks if c.draws})
        for chunk in step.chunks:
            if chunk.sequence.drawn >= chunk.sequence.params.max_tokens:
                self.scheduler.finish(chunk.sequence)
        self.check(chunk.sequence for chunk in step.chunks)

    def step(self) -> Step | None:
        step = self.begin()
        if step is not None:
            self.end(step)
        return step

    def run(self, limit: int = 10_000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            if self.step() is None:
                break
        assert self.scheduler.depth() == (0, 0)
        assert self.blocks.used() == 0

    def check(self, sequences: Iterable[Sequence] = ()) -> None:
        self.scheduler.check()
        for sequence in sequences:
            if sequence.state is State.RUNNING:
                self.pool.verify(sequence)
