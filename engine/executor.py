"""Runs a scheduler's step on the model: packs its tokens, computes them, returns the scores that are wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachestore.kv.threads import helpers_apart
from engine.attention import AttentionBackend, KvPool, Packed
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.graphs import DecodeGraphs, Record
from engine.model import stored_tensors
from engine.reuse.steps import Piece, StepBlend
from engine.scheduler import Chunk
from engine.sequence import Dropped, Positions
from engine.sequence import Sequence as Row
from engine.threads import Threads

BLOCK_SIZE = 16
"""Tokens of a block: fine enough that little of a shared prefix is lost, coarse enough for the kernels."""

_WORTH_SHARING = 200_000_000
"""Multiply-adds of a step from which on more than one thread computes it: below, threads wait more than they work."""


def block_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of keys and values of one block over all layers."""
    config = checkpoint.config
    per_token = 2 * config.layers * config.kv_heads * config.head_dim * checkpoint.dtype.itemsize
    return BLOCK_SIZE * per_token


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a step computed."""

    scores: Tensor
    """[R, V], for the chunks that draw, in their order."""
    prompt: Tensor
    """Hidden states [T, E] of all tokens of the chunks whose prompt is scored, in their order."""
    lost: frozenset[Row] = frozenset()
    """Whose chunks did not come: what was computed for them is void, and `scores` has no rows of them."""
    dropped: Mapping[Row, Dropped] = field(default_factory=dict)
    """What was not computed in all layers, of sequences that have such."""


class Executor:
    """The model, its pool, and for every running sequence a row of block numbers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: AttentionBackend,
        *,
        blocks: int,
        context: int,
        threads: int = 1,
    ) -> None:
        """Allocates the pool; `threads` at most compute a step.

        Raises RuntimeError or torch.OutOfMemoryError where the memory cannot be had.
        """
        config = checkpoint.config
        self._threads, self._per_token = Threads(threads, apart=helpers_apart), _multiply_adds(config)
        self._checkpoint, self._model, self._backend = checkpoint, checkpoint.model, backend
        # One block is nobody's: captured steps let their padding write there.
        self._pool = KvPool(
            layers=config.layers,
            blocks=blocks + 1,
            block_size=BLOCK_SIZE,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=checkpoint.dtype,
            device=checkpoint.device,
        )
        self._scratch, self._context = blocks, context
        self._graphs: DecodeGraphs | None = None
        self._width = -(-context // BLOCK_SIZE)
        self._tables: NDArray[np.int32] = np.zeros((16, self._width), dtype=np.int32)
        self._rows: dict[Row, int] = {}
        self._free = list(range(16))
        self._placed: set[Row] = set()
        """Those whose chunks are in the pool."""

    def capture(self, most: int, record: Record | None = None) -> None:
        """From now on decode up to `most` sequences through CUDA graphs, or whatever `record` makes.

        Raises ValueError for a backend that cannot be captured, torch.OutOfMemoryError where memory is short.
        """
        self._graphs = DecodeGraphs(
            self._model,
            self._pool,
            self._backend,
            context=self._context,
            most=most,
            scratch=self._scratch,
            record=record,
        )

    @property
    def pool(self) -> KvPool:
        """Keys and values of all sequences; for the thread that computes."""
        return self._pool

    def slots(self, sequence: Row, positions: Positions) -> Tensor:
        """Where in the pool these tokens of a sequence lie that was computed last step: int64 [N]."""
        blocks = self._tables[self._rows[sequence], positions // BLOCK_SIZE].astype(np.int64)
        return torch.from_numpy(blocks * BLOCK_SIZE + positions % BLOCK_SIZE).to(self._checkpoint.device)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in order."""
        self._pool.copy_blocks(pairs)

    def run(self, chunks: tuple[Chunk, ...]) -> Outcome:
        """Compute every chunk and return the scores."""
        packed, drawn = self._packed(chunks)
        if self._checkpoint.device.type != "cpu":
            return self._computed(chunks, packed, drawn)
        if len(packed.ids) * self._per_token < _WORTH_SHARING:
            torch.set_num_threads(1)
            return self._computed(chunks, packed, drawn)
        with self._threads.step() as threads:
            torch.set_num_threads(threads)
            return self._computed(chunks, packed, drawn)

    def _computed(self, chunks: tuple[Chunk, ...], packed: Packed, drawn: int) -> Outcome:
        if pieces := self._pieces(chunks):
            return self._blend(chunks, packed, pieces)
        if self._graphs is not None and drawn == len(chunks) and self._graphs.fits(packed):
            scores = self._graphs.scores(packed)
            return Outcome(scores, scores[:0])
        hidden = self._model.forward(packed, self._pool, self._backend)
        return Outcome(self._model.logits(hidden[:drawn]), hidden[drawn:])

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [T, V] of hidden states [T, E]."""
        return self._model.logits(hidden)

    def forget(self, sequence: Row) -> None:
        """The sequence is finished or was set back."""
        self._placed.discard(sequence)
        if (row := self._rows.pop(sequence, None)) is not None:
            self._free.append(row)

    def _pieces(self, chunks: tuple[Chunk, ...]) -> dict[int, Piece]:
        """Per place in the step, of whom chunks are to be placed or tokens to be dropped in it."""
        pieces: dict[int, Piece] = {}
        for index in [i for i, chunk in enumerate(chunks) if chunk.sequence.blended is not None]:
            chunk, sequence, blended = chunks[index], chunks[index].sequence, chunks[index].sequence.blended
            if blended is None or chunk.start >= len(sequence.prompt):
                continue
            slots = None
            if sequence not in self._placed:
                slots = self.slots(sequence, np.arange(len(sequence.prompt)))
            if slots is not None or blended.selector.checks:
                positions = np.arange(chunk.start, chunk.start + chunk.count) if chunk.rows is None else chunk.rows
                pieces[index] = Piece(blended, chunk.start, chunk.start + chunk.count, positions, slots)
        return pieces

    def _blend(self, chunks: tuple[Chunk, ...], packed: Packed, pieces: dict[int, Piece]) -> Outcome:
        """A step in which chunks are placed or tokens dropped."""
        blend = StepBlend(pieces, self._model.rope)
        hidden = self._model.forward(packed, self._pool, self._backend, blend)
        self._placed |= {chunks[index].sequence for index in pieces}
        lost = frozenset(chunks[index].sequence for index in blend.lost)
        drawing = [chunk.sequence not in lost for chunk in chunks if chunk.draws]
        drawn = torch.tensor(drawing, dtype=torch.bool, device=hidden.device)
        return Outcome(
            self._model.logits(hidden[: len(drawn)][drawn]),
            hidden[len(drawn) :],
            lost,
            {chunks[index].sequence: dropped for index, dropped in blend.dropped().items()},
        )

    def _packed(self, chunks: tuple[Chunk, ...]) -> tuple[Packed, int]:
        """The step as tensors, and how many chunks draw."""
        places = np.fromiter((self._row(chunk) for chunk in chunks), np.int64, len(chunks))
        counts, firsts, positions = _positions(chunks)
        repeats, ends = np.asarray(counts), np.cumsum(counts)
        blocks = self._tables[np.repeat(places, repeats), positions // BLOCK_SIZE].astype(np.int64)
        ids = np.fromiter(_ids(chunks), np.int64, ends[-1])
        totals = positions[ends - 1] + 1
        wanted, drawn = _wanted(chunks, ends)
        device = self._checkpoint.device

        def on_device(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        packed = Packed(
            ids=on_device(ids),
            positions=on_device(positions),
            slots=on_device(blocks * BLOCK_SIZE + positions % BLOCK_SIZE),
            tables=on_device(self._tables[places, : -(-totals.max() // BLOCK_SIZE)]),
            starts=on_device(np.concatenate(([0], ends)).astype(np.int32)),
            lengths=on_device(totals.astype(np.int32)),
            counts=counts,
            totals=tuple(totals.tolist()),
            drawing=on_device(wanted),
            spans=on_device(_spans(chunks, positions, repeats)) if self._model.rope.stretches else None,
            firsts=firsts,
        )
        return packed, drawn

    def _row(self, chunk: Chunk) -> int:
        """The row of the sequence, brought up to date from the first block that this chunk writes."""
        sequence = chunk.sequence
        row = self._rows.get(sequence)
        first = chunk.start // BLOCK_SIZE
        if row is None:
            if not self._free:
                self._free = list(range(len(self._tables), 2 * len(self._tables)))
                self._tables = np.concatenate((self._tables, np.zeros_like(self._tables)))
            row = self._rows[sequence] = self._free.pop()
            first = 0
        table = sequence.table
        # Blocks before the first written one cannot have changed while the sequence runs.
        self._tables[row, first : len(table)] = table[first:]
        return row


def _multiply_adds(config: ModelConfig) -> int:
    """Of one token in all layers, attention not counted."""
    return sum(math.prod(part.shape) for name, part in stored_tensors(config) if name.startswith("layers."))


def _positions(chunks: tuple[Chunk, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None, Positions]:
    """How many tokens of each chunk are computed, `Packed.firsts`, and where they all are."""
    starts = np.fromiter([chunk.start for chunk in chunks], np.int64, len(chunks))
    if all([chunk.rows is None for chunk in chunks]):  # noqa: C419 - a list is twice as fast, and steps are many
        counts = tuple([chunk.count for chunk in chunks])
        ends = np.cumsum(counts)
        return counts, None, np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
    rows = [np.arange(chunk.start, chunk.start + chunk.count) if chunk.rows is None else chunk.rows for chunk in chunks]
    counts, firsts = tuple(map(len, rows)), tuple(int(positions[0]) for positions in rows)
    gaps = any(positions[-1] - positions[0] >= len(positions) for positions in rows)
    return counts, firsts if gaps else None, np.concatenate(rows)


def _ids(chunks: tuple[Chunk, ...]) -> Iterator[int]:
    """The tokens that are computed."""
    for chunk in chunks:
        tokens = chunk.sequence.tokens
        if chunk.rows is None:
            yield from tokens[chunk.start : chunk.start + chunk.count]
        else:
            yield from map(tokens.__getitem__, chunk.rows.tolist())


def _wanted(chunks: tuple[Chunk, ...], ends: Any) -> tuple[Any, int]:
    """Rows whose scores are wanted, int64: the last of every chunk that draws, then all of those that are scored."""
    last = [int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.draws]
    scored = [
        np.arange(end - chunk.count, end) for chunk, end in zip(chunks, ends, strict=True) if chunk.sequence.fresh
    ]
    return np.concatenate((np.asarray(last, dtype=np.int64), *scored)), len(last)


def _spans(chunks: tuple[Chunk, ...], positions: Any, repeats: Any) -> Any:
    """Length of the text in which each token is computed: the prompt's, and for drawn tokens up to themselves."""
    prompts = np.fromiter((len(chunk.sequence.prompt) for chunk in chunks), np.int64, len(chunks))
    return np.maximum(np.repeat(prompts, repeats), positions + 1)
