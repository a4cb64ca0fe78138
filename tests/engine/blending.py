"""Scheduler and executor over a real model, step by step, with sequences that reuse chunks among the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.attention import AttentionBackend, KvPool
from engine.attention.sdpa import SdpaBackend
from engine.blocks import BlockManager
from engine.checkpoint import Checkpoint
from engine.executor import BLOCK_SIZE, Executor
from engine.reuse.blending import Selector
from engine.reuse.chunks import BlendPrompt, ChunkKv, Placed
from engine.reuse.steps import Blended
from engine.reuse.trial import Trial
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler, Step
from engine.sequence import NO_CHUNKS, State, Used
from engine.sequence import Sequence as Row


def some(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    row: list[int] = torch.randint(0, 256, (count,), generator=generator).tolist()
    return row


def as_it_stands(checkpoint: Checkpoint, tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> BlendPrompt:
    """A prompt whose chunks were computed in itself, so that they are exact there."""
    trial = Trial(checkpoint, 128)
    trial.compute(tokens, 1)
    placed = tuple(Placed(trial.taken(tokens, start, stop), start, 0, stop - start) for start, stop in spans)
    return BlendPrompt(tokens, placed)


def from_elsewhere(checkpoint: Checkpoint, tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> BlendPrompt:
    """A prompt whose chunks were computed alone."""
    trial = Trial(checkpoint, 128)
    pieces = [(trial.chunk(tokens[start:stop]), start, stop) for start, stop in spans]
    names = enumerate(pieces)
    placed = tuple(Placed(chunk, start, 0, stop - start, bytes([name])) for name, (chunk, start, stop) in names)
    return BlendPrompt(tokens, placed)


@dataclass(eq=False)
class Chunks:
    """Has a prompt's chunks, gives their layers one by one, and may lose them."""

    prompt: BlendPrompt
    selector: Selector
    lost_at: int | None = None
    """Layer that does not come."""
    waits: bool = False
    """Still on their way, …"""
    needed: bool = False
    """… and worth waiting for even when nobody else runs."""
    ranked: bool = False
    """Whether what is dropped is told with what it costs."""
    calls: list[str] = field(default_factory=list)
    taken: list[ChunkKv] = field(default_factory=list)

    def held(self, idle: bool) -> bool:
        return self.waits and (self.needed or not idle)

    def likely(self, first: int) -> int:
        return sum(max(0, piece.stop - max(piece.start, first)) for piece in self.prompt.placed)

    def admitted(self, sequence: Row) -> Blended | None:
        self.calls.append("admitted")
        return Blended(self.prompt, self.selector, self, self.ranked)

    def released(self, sequence: Row) -> None:
        self.calls.append("released")

    def prefilled(self, sequence: Row, pool: KvPool, slots: Tensor) -> None:
        assert len(slots) == len(sequence.prompt)
        self.calls.append("prefilled")

    def scored(self, sequence: Row, scores: Tensor) -> None:
        self.calls.append("scored")

    @property
    def used(self) -> Used:
        return NO_CHUNKS

    def layer(self, index: int) -> list[Tensor | None]:
        self.calls.append(f"layer {index}")
        if self.lost_at == index:
            return [None] * len(self.prompt.placed)
        return [piece.chunk.layers[index] for piece in self.prompt.placed]


def row(prompt: Sequence[int], max_tokens: int = 3, chunks: Chunks | None = None) -> Row:
    """A sequence; with chunks in a namespace of its own."""
    salt = "" if chunks is None else "reuse"
    return Row(list(prompt), SamplingParams(max_tokens=max_tokens), salt=salt, reuse=chunks)


class Served:
    """Steps until all is answered; keeps the scores that every token was drawn from."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        blocks: int = 64,
        max_running: int = 8,
        token_budget: int = 512,
        repairs: int = 0,
        backend: AttentionBackend | None = None,
    ) -> None:
        self.books = BlockManager(blocks, BLOCK_SIZE, root=b"tiny")
        self.scheduler = Scheduler(
            self.books,
            max_running=max_running,
            max_waiting=100,
            token_budget=token_budget,
            patience=1e6,
            repairs=repairs,
        )
        self.executor = Executor(checkpoint, backend or SdpaBackend(), blocks=blocks, context=128)
        self.scores: dict[Row, list[Tensor]] = {}
        self.lost: list[Row] = []
        self.now = 0.0

    def add(self, *rows: Row) -> None:
        self.scheduler.add(rows, self.now)
        self.scores |= {row: [] for row in rows}

    def step(self) -> Step | None:
        self.now += 1.0
        step = self.scheduler.schedule(self.now)
        if step is None:
            return None
        for row in step.preempted:
            self.executor.forget(row)
        with torch.inference_mode():
            self.executor.copy(step.copies)
            outcome = self.executor.run(step.chunks)
        self.lost += outcome.lost
        self.scheduler.settle(outcome.lost, outcome.dropped)
        chunks = tuple(chunk for chunk in step.chunks if chunk.sequence not in outcome.lost)
        drawing = [chunk.sequence for chunk in chunks if chunk.draws]
        for row, scores in zip(drawing, outcome.scores, strict=True):
            self.scores[row].append(scores.clone())  # graphs overwrite theirs
        # Any token will do, and the same one whatever was computed.
        drawn = {row: (7 * len(row.tokens) + row.prompt[0]) % 256 for row in drawing}
        self.scheduler.complete(Step(chunks, (), ()), drawn)
        self.scheduler.check()
        for row in drawing:
            if row.drawn >= row.params.max_tokens:
                self.scheduler.finish(row)
                self.executor.forget(row)
        return step

    def run(self) -> list[Step]:
        steps = list(iter(self.step, None))
        assert all(row.state is State.FINISHED for row in self.scores)
        assert self.books.used() == 0
        return steps

    def agrees(self, checkpoint: Checkpoint, row: Row) -> None:
        """Every token was drawn from the scores of an ordinary prefill of all before it."""
        expected = Trial(checkpoint, 128).compute(row.tokens[:-1], row.drawn)
        torch.testing.assert_close(torch.stack(self.scores[row]), expected, atol=1e-4, rtol=0)
